"""Build the wheel and the source distribution, look into both, and try the wheel in an empty environment.

    python -m tools.try_wheel                    leaves both in dist/; exit status 1 where something is wrong

The build starts from a copy of the files that git knows, so that nothing left over from earlier builds enters it. The
environment holds the wheel with its extra `quantize` and the torch version of the extra `cpu`; pip's configuration
decides which build of torch comes. The commands run outside the repository, on the model of the source distribution.
It takes minutes, and in the folder for temporary files about 2 GB (a CUDA build of torch: several times that).
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PACKAGES = {
    "bitsmoe": "bitsmoe",
    "bitsmoe_vllm": "bitsmoe_vllm",
    "kernels/bitsmoe_kernels": "bitsmoe_kernels",
    "offline_quant": "offline_quant",
}
"""Folder in the repository -> folder in the wheel."""
LIBRARY = "bitsmoe_kernels/_cpu/libbitsmoe_cpu.so"
"""In the wheel, compiled from the sources beside it."""
TAG = f"py3-none-{sysconfig.get_platform().replace('-', '_')}"
"""Of the wheel: any Python, this machine."""
BITS = "2.5"
QUICK = ["--calib", "self", "--calib-samples", "4", "--calib-length", "256", "--refine", "0"]


class TrialError(Exception):
    """What is wrong with a wheel or a source distribution."""


def expect(condition: bool, fault: str) -> None:
    """Check something.

    Raises:
        TrialError: the condition does not hold.
    """
    if not condition:
        raise TrialError(fault)


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without this process's Python path; its output.

    Raises:
        TrialError: it failed.
    """
    print("$", *command, flush=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True)
    expect(done.returncode == 0, f"exit status {done.returncode} of {command[0]}:\n{done.stdout}")
    return done.stdout


def copy_of_checkout(target: Path) -> set[str]:
    """Copy what git does not ignore; the names."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=REPO)
    names = {name for name in listed.split("\0") if name and (REPO / name).is_file()}
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPO / name, target / name)
    return names


def only(folder: Path, pattern: str) -> Path:
    """The one file that matches.

    Raises:
        TrialError: there is another number of them.
    """
    paths = sorted(folder.glob(pattern))
    expect(len(paths) == 1, f"one {pattern} expected in {folder}, not {[p.name for p in paths]}")
    return paths[0]


def digests(wheel: Path) -> dict[str, str]:
    """SHA-256 of every file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def difference(got: set[str], wanted: set[str]) -> str:
    """What two sets of names do not have in common."""
    return f"missing: {sorted(wanted - got)}, unexpected: {sorted(got - wanted)}"


def check_wheels(from_sdist: Path, from_checkout: Path, names: set[str]) -> None:
    """Both wheels are equal and for this machine. They hold all files of the packages, the library and nothing else.

    Raises:
        TrialError: they do not.
    """
    expect(from_sdist.name.endswith(f"-{TAG}.whl"), f"{from_sdist.name} does not end in -{TAG}.whl")
    files = digests(from_sdist)
    expect(files == digests(from_checkout), "the wheels from checkout and source distribution differ")
    modules = {name for name in files if not name.partition("/")[0].endswith(".dist-info")}
    wanted = {
        target + name.removeprefix(folder)
        for folder, target in PACKAGES.items()
        for name in names
        if name.startswith(f"{folder}/")
    }
    wanted.add(LIBRARY)
    expect(modules == wanted, f"files of the wheel; {difference(modules, wanted)}")
    print(f"{from_sdist.name}: {len(wanted)} files of {len(PACKAGES)} packages")


def check_sdist(sdist: Path, names: set[str], target: Path) -> Path:
    """Unpack the source distribution, which holds all files but those for git and its host; its folder.

    Raises:
        TrialError: one is missing.
    """
    with tarfile.open(sdist) as archive:
        archive.extractall(target, filter="data")
    folder = target / sdist.name.removesuffix(".tar.gz")
    held = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    wanted = {name for name in names if not name.startswith(".")}
    expect(wanted <= held, f"files of the source distribution; missing: {sorted(wanted - held)}")
    print(f"{sdist.name}: {len(held)} files")
    return folder


def try_wheel(wheel: Path, version: str, torch: str, sources: Path, scratch: Path) -> None:
    """Install a wheel in an empty environment and run its commands.

    Args:
        torch: the requirement to install beside it.
        sources: the unpacked source distribution.
        scratch: an empty directory.

    Raises:
        TrialError: something failed.
    """
    run(sys.executable, "-m", "venv", "venv", cwd=scratch)
    python, bitsmoe = (scratch / "venv" / "bin" / name for name in ("python", "bitsmoe"))
    run(python, "-m", "pip", "install", "--quiet", "--no-input", f"{wheel}[quantize]", torch, cwd=scratch)
    run(python, "-m", "pip", "check", cwd=scratch)
    place = Path(run(python, "-c", "import bitsmoe; print(bitsmoe.__file__)", cwd=scratch).strip())
    expect(place.is_relative_to(scratch), f"bitsmoe was imported from {place}")
    said = run(bitsmoe, "--version", cwd=scratch).strip()
    expect(said == f"bitsmoe-vllm {version}", f"bitsmoe --version says {said!r}, not {version}")
    said = run(python, "-c", "from bitsmoe_kernels._cpu import library; print(library.why_not())", cwd=scratch).strip()
    expect(said == "None", f"the CPU kernels cannot be used: {said}")
    model = sources / "examples" / "tiny_moe"
    run(bitsmoe, "quantize", model, "--bits", BITS, *QUICK, "--out", "quantized", cwd=scratch)
    bpw = json.loads(run(bitsmoe, "inspect", "quantized", "--json", cwd=scratch))["bpw"]
    expect(0 < bpw <= float(BITS), f"{bpw} bits per weight, of {BITS}")
    print(f"quantized to {bpw:.4f} bits per weight")


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.try_wheel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=REPO / "dist", help="folder for both (default: dist)")
    out = parser.parse_args().out
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    torch = next(r for r in project["optional-dependencies"]["cpu"] if r.startswith("torch=="))
    with tempfile.TemporaryDirectory(prefix="try_wheel-") as name:
        root = Path(name).resolve()
        for folder in ("checkout", "built", "direct", "sdist", "elsewhere"):
            (root / folder).mkdir()
        try:
            names = copy_of_checkout(root / "checkout")
            # The wheel is built from the source distribution, a second one from the files themselves.
            run(sys.executable, "-m", "build", "--outdir", root / "built", root / "checkout", cwd=root)
            run(sys.executable, "-m", "build", "--wheel", "--outdir", root / "direct", root / "checkout", cwd=root)
            wheel, sdist = only(root / "built", "*.whl"), only(root / "built", "*.tar.gz")
            check_wheels(wheel, only(root / "direct", "*.whl"), names)
            sources = check_sdist(sdist, names, root / "sdist")
            try_wheel(wheel, project["version"], torch, sources, root / "elsewhere")
        except TrialError as e:
            print(f"Error: {e}")
            return 1
        out.mkdir(parents=True, exist_ok=True)
        for path in (wheel, sdist):
            shutil.copyfile(path, out / path.name)
            print(f"{out / path.name}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
