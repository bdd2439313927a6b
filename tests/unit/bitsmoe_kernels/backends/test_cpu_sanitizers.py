"""The cases of the CPU kernels where AddressSanitizer and UndefinedBehaviorSanitizer watch every access.

The sanitizers stop a process at the first fault. So the cases run in processes of their own, with a library that is
compiled for it. Margins between the pieces of a layer and between the buffers of a call are watched like the ends of an
allocation. Tile loads of AMX are not watched: no compiler instruments them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitsmoe_kernels._cpu import build, library
from builders import REPO
from cpu_sources import RED_ZONES, SANITIZERS, Change, compile_changed
from moe_cases import CASES

pytestmark = pytest.mark.slow

FAULTS: dict[str, tuple[tuple[Change, ...], str, str, str]] = {
    "a step beyond the codes": (
        (("avx2.cpp", "step < steps; step++, w += step_stride", "step <= steps; step++, w += step_stride"),),
        "avx2", "2 bits, kwidth 2", "use-after-poison",
    ),
    "inputs beyond 16-bit weights": (
        (("avx512_dots.h", "k + 2 <= K; k += 2", "k <= K + 2; k += 2"),),
        "avx512", "all experts kept", "heap-buffer-overflow|use-after-poison",
    ),
    "an id one beyond the map": (
        (("engine.h", "id >= 0 && id < known", "id >= 0 && id <= known"),),
        "", "ids of no expert in a map", "heap-buffer-overflow",
    ),
    "a buffer one number short": (
        (("engine.h", "a.inner = s.take<float>(n * ranks)", "a.inner = s.take<float>(n * ranks - (ranks > 0))"),),
        "", "compensators of a long down", "use-after-poison",
    ),
    "a shift beyond 31": (
        (("engine.h", "(float)(1 << run.shift)", "(float)(1 << (run.shift == 6 ? 35 : run.shift))"),),
        "", "7 bits, kwidth 4", "runtime error: shift exponent",
    ),
}  # fmt: skip
"""Faults to plant: changes of the sources, an instruction set or none, the case that meets it, and the report."""


@pytest.fixture(scope="module")
def runtime() -> str:
    """The library of AddressSanitizer, to be loaded before everything else."""
    command = [*build.compiler(), "-print-file-name=libasan.so"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"{command[0]} has no libasan.so")
    return path


def run_cases(
    compiled: Path, runtime: str, report: Path, *cases: str, isa: str = ""
) -> subprocess.CompletedProcess[str]:
    """The cases in a process of their own."""
    environment = os.environ | {
        "ASAN_OPTIONS": "detect_leaks=0",
        "BITSMOE_CPU_ISA": isa,
        "BITSMOE_CPU_LIBRARY": str(compiled),
        "LD_PRELOAD": runtime,
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": os.pathsep.join(map(str, (REPO, REPO / "kernels", REPO / "tests" / "support"))),
    }
    command = [sys.executable, "-m", "cpu_cases", str(report), *cases]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_no_case_reads_or_writes_elsewhere(runtime: str, tmp_path: Path) -> None:
    watched = compile_changed(tmp_path / "watched", RED_ZONES, SANITIZERS)
    done = run_cases(watched, runtime, tmp_path / "report")
    assert done.returncode == 0, done.stderr
    isas = ", ".join(library.usable())
    assert (tmp_path / "report").read_text().splitlines() == [f"{name}: {isas}" for name in CASES]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with all faults; a case meets one of them first."""
    changes = [change for changes, *_ in FAULTS.values() for change in changes]
    return compile_changed(tmp_path_factory.mktemp("faulty") / "sources", [*RED_ZONES, *changes], SANITIZERS)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, faulty: Path, runtime: str, tmp_path: Path) -> None:
    _, isa, case, report = FAULTS[name]
    if isa and isa not in library.usable():
        pytest.skip(f"this processor has no {library.TITLES[isa]}")
    done = run_cases(faulty, runtime, tmp_path / "report", case, isa=isa)
    assert done.returncode != 0
    assert any(words in done.stderr for words in report.split("|")), done.stderr
