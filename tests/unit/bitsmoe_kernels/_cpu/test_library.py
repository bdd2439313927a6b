"""The compiled CPU kernels as Python finds them: absent, broken, of another version, for another processor."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bitsmoe_kernels._cpu import library
from bitsmoe_kernels._cpu.rounding import pack_codes
from bitsmoe_kernels.backends.base import Target
from bitsmoe_kernels.backends.select import select
from builders import build_form
from cpu_cases import packed

ISAS = library.usable()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process that has not looked for the library yet; the environment names nothing."""
    caches = (library.load, library.why_not, library.usable, library.best)
    for cache in caches:
        cache.cache_clear()
    for name in (library.ENVIRONMENT, "BITSMOE_CPU_LIBRARY"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def refusal(reason: str) -> None:
    """The kernels cannot be used for this reason, and the reference is loud about it."""
    assert library.why_not() is not None
    assert reason in str(library.why_not())
    choice = select(build_form("natural").layer, Target("cpu", None, torch.bfloat16))
    assert choice.backend.slow
    assert choice.loud
    assert f"CPU kernels cannot be used: {library.why_not()}. Do not judge speed by this." in choice.message


def test_where_there_is_no_library(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(library, "PATH", tmp_path / "absent.so")
    refusal("they were not compiled when bitsmoe-vllm was installed: install a C++ compiler (Debian: g++)")


def test_where_the_library_is_none(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library at all")
    fresh.setattr(library, "PATH", tmp_path / "text.so")
    refusal("their library cannot be loaded (")


def test_where_the_library_is_of_another_version(fresh: pytest.MonkeyPatch) -> None:
    """One that loads and has none of the functions."""
    fresh.setenv("BITSMOE_CPU_LIBRARY", "libm.so.6")
    refusal("their library cannot be loaded (")


@pytest.mark.skipif(not ISAS, reason="no CPU kernels")
def test_a_library_that_is_loaded_again_is_called_with_whole_pointers(fresh: pytest.MonkeyPatch) -> None:
    codes, bits = torch.ones(16, 64, dtype=torch.uint8), torch.tensor([1], dtype=torch.uint8)
    first = pack_codes(codes, bits, 16)
    library.load.cache_clear()
    assert torch.equal(pack_codes(codes, bits, 16), first)


def test_where_the_environment_names_no_library(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("BITSMOE_CPU_LIBRARY", str(tmp_path / "absent.so"))
    refusal("their library cannot be loaded (")


def test_an_unknown_instruction_set_is_named(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv(library.ENVIRONMENT, "avx1024")
    refusal("BITSMOE_CPU_ISA is 'avx1024', not one of amx, avx512, avx2, neon")


def test_an_instruction_set_of_another_processor_is_named(fresh: pytest.MonkeyPatch) -> None:
    other = "avx2" if ISAS == ("neon",) else "neon"
    fresh.setenv(library.ENVIRONMENT, other)
    refusal(f"this processor has none of {library.TITLES[other]}")


def test_a_processor_with_none_of_them_is_told(fresh: pytest.MonkeyPatch) -> None:
    class Old:
        def bitsmoe_has(self, number: int) -> int:
            return 0

    fresh.setattr(library, "load", Old)
    refusal("this processor has none of AMX and AVX-512 VNNI, AVX-512 VNNI, AVX2, NEON dot products")


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_chooses_among_the_processors(isa: str, fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv(library.ENVIRONMENT, isa)
    assert library.why_not() is None
    assert library.usable() == (isa,)
    choice = select(build_form("natural").layer, Target("cpu", None, torch.bfloat16))
    assert choice.message.endswith(f"CPU kernels: mixed-bit dot products by {library.TITLES[isa]}, bfloat16")


def test_an_empty_choice_is_none(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv(library.ENVIRONMENT, "")
    assert library.usable() == ISAS
    assert library.best() == ISAS[0]


SHOW_MAPS = "from bitsmoe_kernels._cpu import library; library.load(); print(open('/proc/self/maps').read())"


@pytest.mark.slow
def test_a_process_has_one_openmp_runtime() -> None:
    done = subprocess.run([sys.executable, "-c", SHOW_MAPS], capture_output=True, text=True, check=True)
    files = {Path(line.split(maxsplit=5)[5]) for line in done.stdout.splitlines() if "/" in line}
    assert any(file.name == library.PATH.name for file in files)
    assert len([file for file in files if re.match(r"lib(gomp|omp|iomp)", file.name)]) == 1


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
def test_buffers_end_with_the_thread_that_called() -> None:
    made = build_form("natural", num_experts=2, hidden_size=512)
    block = packed(made)
    x = torch.randn(500, 512)
    weights, ids = torch.ones(500, 8), torch.zeros(500, 8, dtype=torch.int32)

    def in_a_thread() -> int:
        thread = threading.Thread(target=library.forward, args=(block, x, weights, ids, None, None, 1))
        thread.start()
        thread.join()
        return resident()

    for _ in range(2):
        before = in_a_thread()
    for _ in range(30):
        after = in_a_thread()
    # One array of a thread's buffers alone is 500 * 8 * 512 float32. The last thread may be about to end.
    assert after - before < 30 / 2 * 500 * 8 * 512 * 4


def test_threads_may_call_at_once() -> None:
    """Each has its own buffers."""
    made = build_form("shared_basis")
    block = packed(made)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(40, made.layer.hidden_size, generator=gen)
    weights, ids = torch.rand(40, 2, generator=gen), torch.randint(4, (40, 2), generator=gen)
    want = library.forward(block, x, weights, ids)
    wrong: list[int] = []

    def call(first: int) -> None:
        for n in range(1, 30):
            rows = slice(first, first + n % 10 + 1)
            if not torch.equal(library.forward(block, x[rows], weights[rows], ids[rows], None, None, 2), want[rows]):
                wrong.append(n)

    threads = [threading.Thread(target=call, args=(10 * i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
