"""One virtual environment for each baseline, made the first time it is needed."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

from bitsmoe_kernels.errors import BitsmoeError

REQUIREMENTS = Path(__file__).parent / "requirements"
ROOT_VARIABLE = "BITSMOE_BASELINES"
"""Environment variable that names another place for the environments than .baselines in the checkout.

A folder there with the plain name of a baseline holds packages for this interpreter (`pip install --target`), for
machines without a package index.
"""
_PIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.+!_-]*")
_READY = ".ready"


def environments_root() -> Path:
    """Where environments are kept."""
    named = os.environ.get(ROOT_VARIABLE)
    return Path(named) if named else Path(__file__).resolve().parents[2] / ".baselines"


def requirements_file(name: str) -> Path:
    """Pinned requirements of a baseline; a file that does not exist says that it needs no environment of its own."""
    return REQUIREMENTS / f"{name}.txt"


def pins(path: Path) -> list[str]:
    """The requirements of a file, all pinned, torch the first.

    Raises:
        BitsmoeError: lists the lines that are not NAME==VERSION.
    """
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if line]
    if loose := [line for line in found if not _PIN.fullmatch(line)]:
        raise BitsmoeError(f"{path}: every requirement must read NAME==VERSION, these do not: {loose}")
    if not found or not found[0].startswith("torch=="):
        raise BitsmoeError(f"{path}: must begin with torch==VERSION, begins with {found[:1]}")
    return found


def packages(name: str) -> Path | None:
    """Folder of packages that this interpreter needs besides its own for a baseline; None: there is none."""
    folder = environments_root() / name
    return folder if folder.is_dir() else None


def interpreter(name: str) -> Path:
    """The Python a baseline runs in; makes its environment where there is none yet.

    Raises:
        BitsmoeError: it cannot be made.
    """
    file = requirements_file(name)
    if not file.exists() or packages(name):
        return Path(sys.executable)
    required = pins(file)
    # Other pins, or another Python, get another environment.
    key = "\n".join([*required, sys.version]).encode()
    directory = environments_root() / f"{name}-{hashlib.sha256(key).hexdigest()[:12]}"
    python = directory / "bin" / "python"
    if (directory / _READY).exists() and python.exists():
        return python
    print(f"{name}: making its environment {directory} (minutes, once)", file=sys.stderr)
    # torch first and alone: which build comes is the choice of pip's configuration, and nothing later changes it.
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(directory)],
        [*pip, required[0]],
        [*pip, "--no-deps", "--requirement", str(file)],
    ):
        _run(name, directory, command)
    (directory / _READY).touch()
    return python


def _run(name: str, directory: Path, command: list[str]) -> None:
    # HQQ's set-up compiles for CUDA unless told not to; no other package reads the variable.
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "DISABLE_CUDA": "1"})
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        reason = " ".join([line for line in lines if "error" in line.lower()][-3:] or lines[-1:])
        raise BitsmoeError(
            f"baseline {name}: its environment {directory} cannot be made: {reason}\n"
            f"It takes pip and a package index, once. Run the same command where there is one, or set {ROOT_VARIABLE} "
            f"to a folder that holds {directory.name}, made by the same Python, or {name}, packages for this one"
        )
