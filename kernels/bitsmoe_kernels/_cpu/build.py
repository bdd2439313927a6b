"""Compiles the CPU kernels into one shared library. `setup.py` calls this, and so do the tests of the sanitizers.

    python -m bitsmoe_kernels._cpu.build          compiles into the folder of this file

Needs g++ 12 or newer (`CXX`, else `g++`, else `c++`) and nothing else: no headers of Python or torch. The library names
no OpenMP runtime as its dependency. It takes the one that torch has loaded, so that a process has one: code of clang
asks for another one.
This file imports nothing of the package, for `setup.py` runs it before there is one.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
LIBRARY = "libbitsmoe_cpu.so"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-Wall",
)
# fp-contract off: every instruction set rounds alike.
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
MACHINES: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "native.cpp": (),
        "rounding.cpp": (),
        "avx2.cpp": AVX2,
        "rounding_avx2.cpp": AVX2,
        "avx512.cpp": AVX512,
        "rounding_avx512.cpp": AVX512,
        "amx.cpp": (*AVX512, "-mamx-tile", "-mamx-int8"),
    },
    "aarch64": {
        "native.cpp": (),
        "rounding.cpp": (),
        "neon.cpp": ("-march=armv8.2-a+dotprod",),
        "rounding_neon.cpp": ("-march=armv8.2-a",),
    },
}
"""Files and their flags by the machine's name. The library chooses among instruction sets when it runs."""


class CompileError(Exception):
    """Why the library could not be compiled."""


def compiler() -> list[str]:
    """The command of the C++ compiler.

    Raises:
        CompileError: there is none.
    """
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in ("g++", "c++"):
        if found := shutil.which(name):
            return [found]
    raise CompileError("there is no C++ compiler: install g++, or name one in CXX")


def compile_library(target: Path, more_flags: Sequence[str] = (), machine: str | None = None) -> None:
    """Compile all sources and link them.

    Args:
        target: the library, replaced if it is there.
        more_flags: of the compiler and the linker.
        machine: as `platform.machine` names it; None: this one.

    Raises:
        CompileError: no compiler, a machine without sources, or what the compiler said.
    """
    machine = machine or platform.machine()
    if sys.platform != "linux" or machine not in MACHINES:
        raise CompileError(
            f"there are no CPU kernels for {sys.platform} on {machine}, only for Linux on {list(MACHINES)}"
        )
    command = compiler()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        objects = {name: Path(folder) / f"{name}.o" for name in MACHINES[machine]}

        def one(name: str) -> None:
            flags = (*FLAGS, *MACHINES[machine][name], *more_flags)
            _run([*command, *flags, "-c", str(SOURCES / name), "-o", str(objects[name])])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(one, objects))
        linked = Path(folder) / target.name
        _run([*command, "-shared", *more_flags, *map(str, objects.values()), "-o", str(linked)])
        linked.replace(target)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as e:
        raise CompileError(f"{command[0]}: {e.strerror}") from None
    if done.returncode:
        raise CompileError(f"exit status {done.returncode} of {shlex.join(command)}:\n{done.stderr}")


if __name__ == "__main__":
    try:
        compile_library(SOURCES / LIBRARY)
    except CompileError as e:
        sys.exit(f"Error: {e}")
