"""The CPU kernels for 64-bit ARM on another machine: compiled by a cross compiler, run by an emulator.

Debian's packages `g++-aarch64-linux-gnu` and `qemu-user` have both.
"""

import platform
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitsmoe_kernels._cpu import build, library
from builders import REPO
from cpu_cases import DTYPES, blocks
from moe_cases import CASES, bytes_of, poisoned_call

COMPILER, EMULATOR, ROOT = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() == "aarch64", reason="test_cpu_moe.py tries them on this machine itself"),
    *[
        pytest.mark.skipif(not shutil.which(tool), reason=f"{tool} is missing: install {package}")
        for tool, package in ((COMPILER, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user"))
    ],
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cpu_driver.cpp` with the kernels, for ARM."""
    folder = tmp_path_factory.mktemp("neon")
    compiled = folder / build.LIBRARY
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CXX", COMPILER)
        build.compile_library(compiled, machine="aarch64")
    program = folder / "driver"
    source = REPO / "tests" / "support" / "cpu_driver.cpp"
    command = [
        COMPILER,
        "-O1",
        "-fopenmp",
        f"-I{build.SOURCES}",
        source,
        compiled,
        f"-Wl,-rpath,{folder}",
        "-o",
        program,
    ]
    subprocess.run(command, check=True)
    return program


def encoded(block: Tensor, x: Tensor, weights: Tensor, ids: Tensor, local: Tensor | None, want: Tensor) -> bytes:
    """One call and its result, as the driver reads them."""
    head = struct.pack(
        "<9q", block.nbytes, x.shape[1], len(x), ids.shape[1], library.DTYPES[x.dtype], ids.itemsize,
        -1 if local is None else len(local), library.TOKENS_AT_ONCE, x.itemsize,
    )  # fmt: skip
    tensors = [block, x, ids, weights.float(), *([] if local is None else [local]), want]
    return head + b"".join(bytes_of(t).numpy().tobytes() for t in tensors)


def run(driver: Path, file: Path, threads: int) -> subprocess.CompletedProcess[str]:
    command = [EMULATOR, "-L", ROOT, driver, file, str(library.INSTRUCTION_SETS["neon"]), str(threads)]
    return subprocess.run(command, capture_output=True, text=True)


def calls_of(name: str, dtype: torch.dtype) -> list[bytes]:
    """Those of each rank of a case, with what this processor's kernels say."""
    x, weights, ids = poisoned_call(name, dtype)
    if not len(x):
        return []
    return [
        encoded(block, x, weights, ids, local, library.forward(block, x, weights, ids, local))
        for block, local in blocks(name)
    ]


def test_every_case_gives_the_same_bits(driver: Path, tmp_path: Path) -> None:
    calls = [call for name in CASES for dtype in DTYPES for call in calls_of(name, dtype)]
    (tmp_path / "calls").write_bytes(b"".join(calls))
    for threads in (1, 2):
        done = run(driver, tmp_path / "calls", threads)
        assert done.stdout == f"{len(calls)}\n", done.stderr


def test_another_result_is_seen(driver: Path, tmp_path: Path) -> None:
    (call,) = calls_of("8-bit basis", torch.float32)
    wrong = bytearray(call)
    wrong[-1] ^= 1
    (tmp_path / "calls").write_bytes(call + bytes(wrong))
    done = run(driver, tmp_path / "calls", 1)
    assert done.returncode == 1
    assert "call 1: status 0" in done.stderr


def test_a_processor_without_dot_products_is_told_apart(driver: Path, tmp_path: Path) -> None:
    (tmp_path / "calls").write_bytes(b"")
    command: list[Any] = [EMULATOR, "-cpu", "cortex-a53", "-L", ROOT, driver, tmp_path / "calls", "4", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "has not got the instruction set" in done.stderr
