"""Fuzz the readers of checkpoints with damaged ones.

    python -m tools.fuzz --mutations 10000 --seed 0      exit status 1 and build/fuzz/finding-SEED-CASE.tar on a finding
    python -m tools.fuzz --seed 0 --case 1234            one case again, in this process

Each case is made from its seed and number alone: a small sound checkpoint, damaged in one to three ways. It is read by
everything that reads checkpoints (`targets.py`) in a process of its own with little memory to spare and a time limit. A
finding is any end but acceptance or our own error: another exception, a crash, a hang, hunger for memory, memory that
is not the tensor's part of the file, or a failure of what is done with an accepted checkpoint.
"""

import argparse
import io
import json
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import rich.box
from rich.console import Console
from rich.table import Table

from offline_quant.runtime import progress
from tools.fuzz import mutations
from tools.fuzz.bases import all_bases
from tools.fuzz.worker import Result, fuzz, make_case, run_case

OUT = Path("build/fuzz")


def save_finding(result: Result, seed: int, out: Path) -> Path:
    """Write the damaged checkpoint and what it caused into a tar file."""
    _, files, _ = make_case(all_bases(), seed, result.case)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"finding-{seed}-{result.case}.tar"
    note = {"seed": seed, "case": result.case, "base": result.base, "done": result.done, "finding": result.finding}
    with tempfile.TemporaryDirectory() as name, tarfile.open(path, "w") as tar:
        mutations.write(files, Path(name))
        tar.add(name, "checkpoint")
        text = json.dumps(note, indent=1).encode()
        info = tarfile.TarInfo("finding.json")
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text))
    return path


def summary(results: list[Result]) -> Table:
    """How the cases ended, by mutation; a case with several counts under each."""
    table = Table(box=rich.box.SIMPLE, title=f"{len(results)} damaged checkpoints", title_justify="left")
    for column in ("mutation", "cases", "refused", "accepted", "findings"):
        table.add_column(column, justify="left" if column == "mutation" else "right")
    ends = {name: Counter(r.end for r in results if name in dict(r.done)) for name in mutations.MUTATIONS}
    for name, end in [*ends.items(), ("all", Counter(r.end for r in results))]:
        table.add_row(name, *(str(n) for n in (end.total(), end["refused"], end["accepted"], end["finding"])))
    return table


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mutations", type=int, default=10_000, metavar="N", help="cases to run (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default: 0)")
    parser.add_argument("--case", type=int, metavar="N", help="only this one, in this process, for a debugger")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder for findings (default: {OUT})")
    args = parser.parse_args()
    console = Console(markup=False, highlight=False, emoji=False)
    if args.case is not None:
        results = [run_case(all_bases(), args.seed, args.case)]
        for part in (results[0].base, *results[0].done, *results[0].outcome.items()):
            console.print(repr(part), soft_wrap=True)
    else:
        with progress.bar("Reading damaged checkpoints", args.mutations) as tick:
            results = fuzz(args.mutations, args.seed, tick)
        console.print(summary(results))
    findings = [r for r in results if r.finding is not None]
    for result in findings:
        path = save_finding(result, args.seed, args.out)
        console.print(
            f"case {result.case} ({result.base}): {result.done}\n  {result.finding}\n  {path}", soft_wrap=True
        )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
