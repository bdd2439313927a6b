"""Quantize the demo model with two checkouts over a matrix of options, and compare the bytes of everything written.

    python -m tools.same_bytes REVISION             # a commit against the working tree
    python -m tools.same_bytes BEFORE AFTER         # commits or directories

For a change that claims to change no result. Compared are all files of the output directory and what the command
prints; of times and memory, which differ from run to run, only that they are there. What a commit gives is kept in
build/same_bytes, so that only the working tree is run again. Exits with 1 and names the files where anything differs.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "examples"
CACHE = ROOT / "build" / "same_bytes"
TEXT = ROOT / "LICENSE"
SMALL = ("--calib-samples", "6", "--calib-length", "256")
PRETENDED = """
import runpy, sys
from bitsmoe_kernels import _triton
_triton.why_not = lambda: "nothing runs on a pretended device"
from pretended_cuda import pretended_cuda
with pretended_cuda():
    runpy.run_module("offline_quant.cli", run_name="__main__", alter_sys=True)
"""
"""Runs the command on a pretended CUDA device; a checkout has it among its tests."""
MASKS = {
    "report.html": (
        re.compile(r"(?s)(?<=<h2>Time and memory</h2>).*?(?=<h2>)"),
        re.compile(r"[\d.]+ (?:s|[kMGT]?B)|\d+%"),
    ),
    "stdout": (re.compile(r"(?s).*"), re.compile(r"\d+\.\d+ s\b")),
}
"""By file: the part of it, and there the values, that times and memory decide."""

console = Console(highlight=False)
Hashes = dict[str, str]


@dataclass(frozen=True)
class Case:
    """One cell of the matrix.

    Attributes:
        options: of `bitsmoe quantize`.
        model: below examples/.
        pretended: on a pretended CUDA device.
        killed: the run is killed after its first finished layer, then resumed.
        commands: further commands on the result; OUT in them is its directory.
    """

    options: tuple[str, ...]
    model: str = "tiny_moe"
    pretended: bool = False
    killed: bool = False
    commands: tuple[tuple[str, ...], ...] = ()


READERS = (
    ("inspect", "OUT", "--json"),
    ("inspect", "OUT"),
    ("eval", "OUT", "--text", str(TEXT), "--reference", str(MODELS / "tiny_moe"), "--json"),
    ("dequantize", "OUT", "--out", "OUT/plain"),
)
CASES = {
    "bitsmoe": Case(("--bits", "2.5"), commands=READERS),
    "wide model": Case(("--bits", "2.25"), model="wide_moe"),
    "natural": Case(("--bits", "2", "--basis", "natural")),
    "whitened, 16-bit basis": Case(("--bits", "3.5", "--basis", "whitened", "--basis-bits", "16")),
    "paper": Case(("--bits", "4.5", "--basis", "paper"), commands=READERS[:2]),
    "alphaq": Case(("--bits", "2.5", "--objective", "alphaq", "--gamma", "1.5")),
    "bt-moe": Case(("--bits", "3", "--objective", "bt-moe", "--ranks", "0,8,16"), commands=READERS[:2]),
    "frequency": Case(("--bits", "2.5", "--objective", "frequency")),
    "uniform, no feedback": Case(("--bits", "2.5", "--objective", "uniform", "--no-feedback", "--refine", "0")),
    "one budget": Case(("--bits", "2.25", "--budget", "model")),
    "fit layer": Case(("--bits", "2.25", "--fit", "layer")),
    "tune": Case(("--bits", "2.25", "--tune")),
    "dense 4, blocks of 32": Case(("--bits", "2.25", "--dense-bits", "4", "--block-size", "32"), commands=READERS[:1]),
    "dense 8, seed 7": Case(("--bits", "2.25", "--dense-bits", "8", "--seed", "7", "--refine", "1")),
    "calib self": Case(("--bits", "2.25", "--calib", "self")),
    "plan": Case(("--bits", "2.25", "--plan")),
    "two workers": Case(("--bits", "2.5", "--workers", "2")),
    "two workers, one budget": Case(("--bits", "2.5", "--workers", "2", "--objective", "alphaq")),
    "killed and resumed": Case(("--bits", "2.5"), killed=True),
    "killed and resumed, tune": Case(("--bits", "2.25", "--tune", "--dense-bits", "8"), killed=True),
    "pretended CUDA": Case(("--bits", "2.5", "--device", "cuda"), pretended=True),
    "pretended CUDA, paper": Case(("--bits", "4.5", "--device", "cuda", "--basis", "paper"), pretended=True),
    "pretended CUDA, bt-moe": Case(("--bits", "3", "--device", "cuda", "--objective", "bt-moe"), pretended=True),
}


def main(
    before: Annotated[str, typer.Argument(help="Commit or directory.")],
    after: Annotated[str, typer.Argument(help="Commit or directory. Default: the working tree.")] = str(ROOT),
    only: Annotated[str, typer.Option(help="Only cases whose name holds this text.")] = "",
) -> None:
    """Compare what two checkouts write."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # on the way out worktrees are removed
    cases = {name: case for name, case in CASES.items() if only in name}
    differing = 0
    table = Table("case", "files", "before, s", "after, s", "result")
    with checkout(before) as old, checkout(after) as new:
        for name, case in cases.items():
            (expected, first), (found, second) = (measured(tree, revision, name, case) for tree, revision in (old, new))
            faults = differences(expected, found)
            differing += bool(faults)
            table.add_row(name, str(len(found)), f"{first:.0f}", f"{second:.0f}", "; ".join(faults) or "equal")
            console.print(f"{name}: {'; '.join(faults) or 'equal'}")
    console.print(table)
    console.print(f"{len(cases) - differing} of {len(cases)} cases equal: {before} against {after}")
    raise typer.Exit(min(differing, 1))


def differences(before: Hashes, after: Hashes) -> list[str]:
    """Files that are not the same, each with what is wrong."""
    faults = [f"{name} is missing" for name in sorted(before.keys() - after.keys())]
    faults += [f"{name} is new" for name in sorted(after.keys() - before.keys())]
    return faults + [f"{name} differs" for name in sorted(before.keys() & after.keys()) if before[name] != after[name]]


@contextmanager
def checkout(name: str) -> Iterator[tuple[Path, str | None]]:
    """A checkout's directory, and its commit where its results may be kept.

    Raises:
        typer.BadParameter: neither a directory nor a commit.
    """
    if Path(name).is_dir():
        yield Path(name).resolve(), None
        return
    git = ("git", "-C", str(ROOT))
    parsed = subprocess.run(
        [*git, "rev-parse", "--verify", f"{name}^{{commit}}"], capture_output=True, text=True, check=False
    )
    if parsed.returncode:
        raise typer.BadParameter(f"{name}: is neither a directory nor a commit")
    revision = parsed.stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        subprocess.run([*git, "worktree", "add", "--detach", "--quiet", str(tree), revision], check=True)
        try:
            compile_kernels(tree)
            yield tree, revision
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)


def compile_kernels(tree: Path) -> None:
    """Compile a checkout's CPU kernels, where it has any: without them torch rounds, to other bytes."""
    if (tree / "kernels" / "bitsmoe_kernels" / "_cpu" / "build.py").is_file():
        environment = os.environ | {"PYTHONPATH": str(tree / "kernels")}
        subprocess.run([sys.executable, "-m", "bitsmoe_kernels._cpu.build"], cwd=tree, env=environment, check=True)


def measured(tree: Path, revision: str | None, name: str, case: Case) -> tuple[Hashes, float]:
    """Hashes of what one case writes, and the seconds it took; from an earlier run where the same commit gave them."""
    # "compiled": what was kept before checkouts had kernels does not count.
    key = hashlib.sha256(repr((revision, case, "compiled", TEXT.read_bytes())).encode()).hexdigest()[:16]
    kept = CACHE / f"{key}.json"
    if revision is not None and kept.exists():
        data = json.loads(kept.read_text())
        return data["hashes"], data["seconds"]
    start = time.monotonic()
    hashes = run_case(tree, case)
    seconds = time.monotonic() - start
    if revision is not None:
        CACHE.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"case": name, "revision": revision, "hashes": hashes, "seconds": seconds}))
    return hashes, seconds


def run_case(tree: Path, case: Case) -> Hashes:
    """Hashes of what one case writes."""
    calib = () if "--calib" in case.options else ("--calib", str(TEXT))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        command = ["quantize", str(MODELS / case.model), "--out", "out", *case.options, *calib, *SMALL]
        printed = []
        if case.killed:
            killed(tree, folder, command)
            command.append("--resume")
        printed.append(run(tree, folder, command, case.pretended))
        for further in case.commands:
            printed.append(run(tree, folder, [word.replace("OUT", "out", 1) for word in further]))
        hashes = {f"stdout {i}": digest("stdout", text.encode()) for i, text in enumerate(printed)}
        for path in sorted(out.rglob("*")):
            if path.is_file():
                hashes[str(path.relative_to(out))] = digest(path.name, path.read_bytes())
        left = sorted(p.name for p in Path(folder).iterdir() if p != out)
    if left:
        hashes["left behind"] = " ".join(left)
    return hashes


def digest(name: str, data: bytes) -> str:
    """SHA-256 of a file, times and memory masked."""
    if name in MASKS:
        part, values = MASKS[name]
        mask: Callable[[re.Match[str]], str] = lambda found: values.sub("#", found[0])  # noqa: E731
        # Lines break elsewhere where a number is longer.
        data = part.sub(mask, " ".join(data.decode().split()), count=1).encode()
    return hashlib.sha256(data).hexdigest()


def start(tree: Path, folder: str, command: list[str], pretended: bool = False) -> "subprocess.Popen[str]":
    """Begin a `bitsmoe` command of a checkout, in a process group of its own."""
    paths = (tree, tree / "kernels", tree / "tests", tree / "tests" / "support")
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }  # fmt: skip
    program = ["-c", PRETENDED] if pretended else ["-m", "offline_quant.cli"]
    return subprocess.Popen(
        [sys.executable, *program, *command], cwd=folder, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def run(tree: Path, folder: str, command: list[str], pretended: bool = False) -> str:
    """What a command prints.

    Raises:
        SystemExit: it fails; shows what it said.
    """
    process = start(tree, folder, command, pretended)
    printed, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"{tree}: bitsmoe {' '.join(command)} ended with {process.returncode}:\n{said[-3000:]}")
    return printed


def killed(tree: Path, folder: str, command: list[str]) -> None:
    """Run a command until its first layer is finished, then kill it.

    Raises:
        SystemExit: it ended before.
    """
    process = start(tree, folder, command)
    while not list(Path(folder).glob(".out.partial/layer-*[0-9]")):
        if process.poll() is not None:
            raise SystemExit(f"{tree}: {' '.join(command)} ended before it could be killed")
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


if __name__ == "__main__":
    typer.run(main)
