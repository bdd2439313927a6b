"""Read bandwidth: how fast as many threads as the kernels have read a buffer that no cache holds."""

import ctypes
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bitsmoe_kernels._cpu import library
from bitsmoe_kernels._cpu.build import compiler

SOURCE = Path(__file__).with_name("read.c")
LEAST_BYTES = 1 << 30
CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
UNKNOWN_CACHE = 64 << 20


def last_level_bytes(path: Path = CACHE) -> int:
    """Bytes of the last-level cache; `UNKNOWN_CACHE` where Linux does not say."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return UNKNOWN_CACHE
    units = {"K": 10, "M": 20, "G": 30}
    return int(text[:-1]) << units[text[-1]] if text[-1] in units else int(text)


def _compiled() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "read.so"
        flags = ["-x", "c", "-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([*compiler(), *flags, str(SOURCE), "-o", str(target)], check=True)
        found = ctypes.CDLL(str(target))
    found.read_words.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    found.read_words.restype = ctypes.c_uint64
    return found


class Reader:
    """A buffer of at least twice the last-level cache. Reading it also drives everything else out of the caches.

    Args:
        threads: that read, each a part of its own.
    """

    def __init__(self, threads: int):
        self.bytes = max(LEAST_BYTES, 2 * last_level_bytes())
        self._buffer = torch.empty(self.bytes // 8, dtype=torch.int64)
        library.large_pages(self._buffer)
        self._buffer.fill_(1)
        self._library = _compiled()
        self._pool = ThreadPoolExecutor(threads)
        self._threads = threads

    def read(self) -> float:
        """Bytes per second of one pass over the buffer."""
        words = len(self._buffer) // self._threads

        def part(i: int) -> int:
            return self._library.read_words(self._buffer.data_ptr() + 8 * i * words, words)

        before = time.perf_counter()
        sums = list(self._pool.map(part, range(self._threads)))
        seconds = time.perf_counter() - before
        assert sums == [words] * self._threads
        return 8 * words * self._threads / seconds
