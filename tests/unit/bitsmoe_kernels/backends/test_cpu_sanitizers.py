"""The cases of the CPU kernels where AddressSanitizer and UndefinedBehaviorSanitizer watch every access.

The sanitizers stop a process at the first fault. So the cases run in processes of their own, with a library that is
compiled for it. Margins between the pieces of a layer and between the buffers of a call are watched like the ends of an
allocation. Tile loads of AMX are not watched: no compiler instruments them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bitsmoe_kernels._cpu import build, library
from builders import REPO
from cpu_sources import PLANTED, RED_ZONES, SANITIZERS, Change, compile_changed
from moe_cases import CASES

pytestmark = pytest.mark.slow

FAULTS: dict[str, tuple[Change, str, str, str]] = {
    "a step beyond the codes": (
        ("avx2.cpp", "step < steps; step++, w += step_stride", "step < steps + FAULT; step++, w += step_stride"),
        "avx2", "2 bits, kwidth 2", "use-after-poison",
    ),
    "inputs beyond 16-bit weights": (
        ("avx512_dots.h", "k + 2 <= K; k += 2", "k + 2 <= K + 2 * FAULT; k += 2"),
        "avx512", "all experts kept", "heap-buffer-overflow|use-after-poison",
    ),
    "an id one beyond the map": (
        ("engine.h", "id >= 0 && id < known", "id >= 0 && id < known + FAULT"),
        "", "ids of no expert in a map", "heap-buffer-overflow",
    ),
    "a buffer one number short": (
        ("engine.h", "s.take<float>(n * ranks)", "s.take<float>(n * ranks - (ranks > 0 && FAULT))"),
        "", "compensators of a long down", "use-after-poison",
    ),
    "a shift beyond 31": (
        ("engine.h", "(float)(1 << run.shift)", "(float)(1 << (run.shift + 31 * FAULT))"),
        "", "7 bits, kwidth 4", "runtime error: shift exponent",
    ),
}  # fmt: skip
"""Faults to plant: a change of the sources, an instruction set or none, the case that meets it, and the report."""


@pytest.fixture(scope="module")
def runtime() -> str:
    """The library of AddressSanitizer, to be loaded before everything else."""
    command = [*build.compiler(), "-print-file-name=libasan.so"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"{command[0]} has no libasan.so")
    return path


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that the sanitizers watch. `PLANTED` in the environment makes one of its faults happen."""
    changes = [
        (file, right, wrong.replace("FAULT", f"(PLANTED == {number})"))
        for number, ((file, right, wrong), *_) in enumerate(FAULTS.values(), 1)
    ]
    return compile_changed(tmp_path_factory.mktemp("watched") / "sources", [*RED_ZONES, PLANTED, *changes], SANITIZERS)


def run_watched(
    command: list[str], compiled: Path, runtime: str, planted: int = 0, isa: str = ""
) -> subprocess.CompletedProcess[str]:
    """A Python command with that library, in a process of its own."""
    environment = os.environ | {
        "ASAN_OPTIONS": "detect_leaks=0",
        "BITSMOE_CPU_ISA": isa,
        "BITSMOE_CPU_LIBRARY": str(compiled),
        "LD_PRELOAD": runtime,
        "OMP_WAIT_POLICY": "passive",
        "PLANTED": str(planted),
        "PYTHONPATH": os.pathsep.join(map(str, (REPO, REPO / "kernels", REPO / "tests" / "support"))),
    }
    return subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)


def test_no_case_reads_or_writes_elsewhere(watched: Path, runtime: str, tmp_path: Path) -> None:
    done = run_watched(["cpu_cases", str(tmp_path / "report")], watched, runtime)
    assert done.returncode == 0, done.stderr
    isas = ", ".join(library.usable())
    assert (tmp_path / "report").read_text().splitlines() == [f"{name}: {isas}" for name in CASES]


def test_rounding_reads_and_writes_nowhere_else(watched: Path, runtime: str) -> None:
    """The quantizer's inner loops, by their own tests: every tensor of theirs is an allocation."""
    tests = REPO / "tests" / "unit" / "bitsmoe_kernels" / "_cpu" / "test_rounding.py"
    done = run_watched(["pytest", "-q", "-p", "no:cacheprovider", "--noconftest", str(tests)], watched, runtime)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, watched: Path, runtime: str, tmp_path: Path) -> None:
    _, isa, case, report = FAULTS[name]
    if isa and isa not in library.usable():
        pytest.skip(f"this processor has no {library.TITLES[isa]}")
    number = 1 + list(FAULTS).index(name)
    done = run_watched(["cpu_cases", str(tmp_path / "report"), case], watched, runtime, number, isa)
    assert done.returncode != 0
    assert any(words in done.stderr for words in report.split("|")), done.stderr
