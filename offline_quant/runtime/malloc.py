"""Resident memory of this process."""

import ctypes
import resource
import sys
from pathlib import Path
from typing import Any

LARGE_BLOCK = 24 << 20
"""Always apart. Apart from 8 MB on, batches of small matrices take fresh pages again and again: a twelfth of a run on
tiny_moe."""
LARGE_MATRIX = 4 << 20
"""So much is worked on in a matrix of this size that fresh pages for it do not count."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return _of_status("VmHWM") or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_bytes() -> int:
    """Resident memory of this process now; where the system does not say, the largest so far."""
    return _of_status("VmRSS") or peak_bytes()


def _of_status(name: str) -> int | None:
    status = Path("/proc/self/status")
    if status.exists():  # the figures of `resource` begin with what the parent process had
        found = next((line for line in status.read_text().splitlines() if line.startswith(f"{name}:")), None)
        if found:
            return 1024 * int(found.split()[1])
    return None


def keep_large_blocks_apart(matrix_bytes: int) -> None:
    """Have large blocks mapped on their own, so that they go back once they are freed.

    glibc raises the size of these to 32 MB by itself, and matrices of large experts then lie among small blocks in its
    heap. They still do where the heap holds free room for them, and stay resident until `trim`.

    Args:
        matrix_bytes: of an expert's matrix in float32. From LARGE_MATRIX on, blocks of its size are large ones too.
    """
    block = min(matrix_bytes, LARGE_BLOCK) if matrix_bytes >= LARGE_MATRIX else LARGE_BLOCK
    if option := _of_glibc("mallopt"):
        option(_M_MMAP_THRESHOLD, block)
        option(_M_TRIM_THRESHOLD, 4 * LARGE_BLOCK)  # no longer raised with the other


def trim(matrix_bytes: int = LARGE_MATRIX) -> None:
    """Give freed memory back to the system.

    glibc keeps what lies between blocks that are still in use: of a large model more with every expert.

    Args:
        matrix_bytes: of an expert's matrix in float32. Below LARGE_MATRIX nothing is given back: it would be little,
            and fetching the pages again takes a twentieth of a run on tiny_moe.
    """
    if matrix_bytes >= LARGE_MATRIX and (trim := _of_glibc("malloc_trim")):
        trim(0)


def _of_glibc(function: str) -> Any:
    """A function of the C library; None where there is no such thing."""
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
