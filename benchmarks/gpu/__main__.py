"""Command line of the campaign."""

import argparse
import os
import sys
import time
from pathlib import Path

import benchmarks.gpu
from benchmarks.gpu import parts, steps
from benchmarks.record import COMMIT_VARIABLE, ROOT
from bitsmoe_kernels.errors import BitsmoeError

BUILD = ROOT / "build"
PARTS = BUILD / "gpu-parts"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=benchmarks.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    get = commands.add_parser("fetch", help="download what the machine lacks")
    get.add_argument("names", nargs="*", metavar="PART", help=f"of {', '.join(parts.PARTS)} (default: all)")
    get.add_argument("--out", type=Path, default=PARTS)
    get.add_argument("--python", default="3.12", help="version of the machine's Python")
    get.add_argument("--present", type=Path, default=parts.PRESENT, help="list of packages that the machine has")
    run = commands.add_parser(
        "run", help="run steps", epilog="\n".join(f"{k}: {v.shows}" for k, v in steps.STEPS.items())
    )
    run.formatter_class = argparse.RawDescriptionHelpFormatter
    run.add_argument("--steps", nargs="+", choices=steps.STEPS, default=list(steps.STEPS), metavar="STEP")
    run.add_argument(
        "--parts", type=Path, help=f"what `fetch` made (default: {PARTS.relative_to(ROOT)}; to rehearse: none)"
    )
    run.add_argument("--out", type=Path, help="results (default: build/gpu-results; to rehearse: gpu-rehearsal)")
    run.add_argument("--scratch", type=Path, help="trained models, parts (default: build/gpu-scratch, likewise)")
    run.add_argument("--corpus", type=Path, help="folder with train.txt.xz, valid.txt and calib.txt")
    run.add_argument("--seconds", type=float, help="everything ends after so many")
    run.add_argument("--commit", help="of the sources, where they are a copy without history")
    run.add_argument("--rehearse", action="store_true", help="every step tiny, on a CPU")
    end = commands.add_parser("complete", help="give a trained model its tokenizer, and hand it over in pieces")
    end.add_argument("model", type=Path)
    end.add_argument("--tokenizer", type=Path, required=True)
    end.add_argument("--out", type=Path)
    return parser


def _fetch(args: argparse.Namespace) -> None:
    names = args.names or list(parts.PARTS)
    if strange := sorted(set(names) - set(parts.PARTS)):
        raise BitsmoeError(f"no part {', '.join(strange)}; there are {', '.join(parts.PARTS)}")
    for name, size in parts.fetch(names, args.out, args.python, args.present).items():
        print(f"{name:>10}  {size / 1e6:6.1f} MB  {args.out / name}")


def _run(args: argparse.Namespace) -> bool:
    deadline = time.time() + args.seconds if args.seconds else None
    if args.commit:
        os.environ[COMMIT_VARIABLE] = args.commit
    # What a rehearsal leaves must not be taken for results, nor its models for trained ones.
    usual = (BUILD / "gpu-rehearsal",) * 2 if args.rehearse else (BUILD / "gpu-results", BUILD / "gpu-scratch")
    out, scratch = (
        (given or default).resolve() for given, default in zip((args.out, args.scratch), usual, strict=True)
    )
    setting = steps.Setting(
        out, scratch, scratch / "site", args.corpus and args.corpus.resolve(), args.rehearse, deadline
    )
    given = args.parts or (None if args.rehearse else PARTS)
    there = parts.install(given, setting.site) if given else []
    found = steps.faults(args.steps, there, setting)
    if not args.rehearse:
        import torch

        if not torch.cuda.is_available():
            found.append(f"torch {torch.__version__} sees no CUDA device; --rehearse runs every step on a CPU")
    if found:
        raise BitsmoeError("\n".join(found))
    return steps.run(args.steps, setting)


def main() -> None:
    """Command line."""
    args = _parser().parse_args()
    try:
        if args.command == "fetch":
            _fetch(args)
        elif args.command == "complete":
            steps.complete(args.model, args.tokenizer, args.out)
        elif not _run(args):
            sys.exit(1)
    except BitsmoeError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
