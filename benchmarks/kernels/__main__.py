"""Time one MoE layer by our kernels and by others, tune our tiles, or read what our kernels became.

    python -m benchmarks.kernels [--marlin FILE.so] [--seconds N]     time everything on the GPU; run again to go on
    python -m benchmarks.kernels --tune                               choose tiles for this GPU
    python -m benchmarks.kernels --machine-code [--json]              needs no GPU
    python -m benchmarks.kernels --estimate [--json]                  needs no GPU: a model of time, for several
    python -m benchmarks.kernels --rehearse                           every step, tiny, on a CPU, nothing timed

Times go to OUT/kernels-GPU.json after every step, .md and .png at the end; rows that are there already, from the same
GPU, versions and sources, are not measured again. Each method is checked against float64 on the layer's own sizes first
and runs in a process of its own. What cannot be measured is listed with the reason.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, child_environment

RESULTS = ROOT / "benchmarks" / "results"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--machine-code", action="store_true", help="compile ahead of time and count instructions")
    what.add_argument("--estimate", action="store_true", help="estimate the time of a layer on several GPUs")
    what.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    what.add_argument("--compile", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--tune", action="store_true", help="time tiles and print the table's entry")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny shapes under Triton's interpreter; nothing is timed"
    )
    parser.add_argument("--json", action="store_true", help="with --machine-code or --estimate: JSON only")
    parser.add_argument("--out", type=Path, help=f"folder of the results (default: {RESULTS.relative_to(ROOT)})")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these layers")
    parser.add_argument("--gpus", nargs="+", metavar="NAME", help="with --estimate: only these")
    parser.add_argument("--methods", nargs="+", metavar="TEXT", help="only methods whose name holds one of these")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="N", help="only these token counts")
    parser.add_argument("--routing", nargs="+", choices=("realistic", "uniform"), help="only this routing")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of activations")
    parser.add_argument("--bits", type=float, default=2.0, help="average code width of bitsmoe (default: 2)")
    parser.add_argument("--marlin", type=Path, metavar="FILE", help="extension with vLLM's MoE operators (_moe_C)")
    parser.add_argument("--seconds", type=float, help="begin no row after so many seconds")
    parser.add_argument("--method-seconds", type=float, default=900, help="a method's process ends after so many")
    return parser


def _machine_code(args: argparse.Namespace) -> None:
    from benchmarks.kernels.code_report import all_rows, as_markdown

    rows = all_rows()
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, text in (("machine-code.json", json.dumps(rows, indent=1)), ("machine-code.md", as_markdown(rows))):
            (args.out / name).write_text(text + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1) if args.json else as_markdown(rows))


def _estimate(args: argparse.Namespace) -> None:
    from benchmarks.kernels import estimate
    from benchmarks.kernels.shapes import SHAPES

    if strange := sorted(set(args.models or ()) - {s.model for s in SHAPES}):
        raise SystemExit(f"no model {', '.join(strange)}; there are {', '.join(s.model for s in SHAPES)}")
    shapes = [s for s in SHAPES if s.model in (args.models or (SHAPES[0].model,))]
    known = {gpu.name: gpu for gpu in estimate.GPUS}
    if strange := sorted(set(args.gpus or ()) - set(known)):
        raise SystemExit(f"no GPU {', '.join(strange)}; there are {', '.join(known)}")
    gpus = [known[name] for name in args.gpus or known]
    rows = list(estimate.estimates(shapes, args.tokens or estimate.TOKENS, args.bits, gpus))
    text = estimate.as_markdown(rows, args.bits)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "kernels-estimate.md").write_text(text + "\n", encoding="utf-8")
    print(json.dumps(estimate.as_json(rows), indent=1) if args.json else text)


def _plan(args: argparse.Namespace) -> Any:
    from benchmarks.kernels.methods import METHODS
    from benchmarks.kernels.routing import ROUTINGS
    from benchmarks.kernels.shapes import REHEARSAL, SHAPES
    from benchmarks.kernels.work import Plan, default_tokens

    known = [s.model for s in (REHEARSAL if args.rehearse else SHAPES)]
    if strange := sorted(set(args.models or ()) - set(known)):
        raise SystemExit(f"no model {', '.join(strange)}; there are {', '.join(known)}")
    chosen = tuple(m for m in METHODS if not args.methods or any(part in m for part in args.methods))
    if not chosen:
        raise SystemExit(f"no method holds {' or '.join(args.methods)}; there are: {'; '.join(METHODS)}")
    if args.marlin is not None and not args.marlin.is_file():
        raise SystemExit(f"--marlin {args.marlin}: no such file")
    return Plan(
        models=tuple(m for m in known if not args.models or m in args.models),
        methods=chosen,
        tokens=tuple(args.tokens or default_tokens(args.rehearse)),
        routings=tuple(r for r in ROUTINGS if not args.routing or r in args.routing),
        dtype=args.dtype,
        bits=args.bits,
        marlin=str(args.marlin.resolve()) if args.marlin else None,
        rehearsal=args.rehearse,
        deadline=time.time() + args.seconds if args.seconds else None,
    )


def _time(args: argparse.Namespace, out: Path) -> bool:
    from benchmarks.kernels import work
    from benchmarks.kernels.methods import METHODS, source_of
    from benchmarks.kernels.results import Results, as_markdown, draw, machine, slug

    plan = _plan(args)
    here = machine()
    base = out / ("kernels-rehearsal" if args.rehearse else f"kernels-{slug(here['gpu'])}")
    header = {"rehearsal": args.rehearse, "machine": here}
    results = Results(base.with_suffix(".json"), header, {m: source_of(m) for m in METHODS})
    well = work.run(plan, results, args.method_seconds)
    results.save()
    text = as_markdown(results.data) + _estimates_beside(args, results.data)
    base.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    draw(results.data, base.with_suffix(".png"))
    print(text)
    return well


def _estimates_beside(args: argparse.Namespace, data: dict[str, Any]) -> str:
    """What the model of time says of what was measured, by the machine code of this Triton."""
    if args.rehearse:
        return ""
    from benchmarks.kernels.estimate import beside
    from benchmarks.kernels.shapes import SHAPES

    return "\n" + beside(data["rows"], data["machine"]["gpu"], args.bits, SHAPES)


def _tune(args: argparse.Namespace, out: Path) -> bool:
    from benchmarks.kernels.results import machine, slug
    from benchmarks.kernels.tune import SLOTS, tune
    from benchmarks.kernels.work import MOST_PROCESSES, shape_named

    plan = _plan(args)
    model = plan.models[0]
    if not args.rehearse:
        parts = min(MOST_PROCESSES, os.cpu_count() or 1)
        for process in list(_compilers(model, args.dtype, args.bits, parts)):
            process.wait()
    name = "rehearsal" if args.rehearse else slug(machine()["gpu"])
    slots = SLOTS[:2] if args.rehearse else SLOTS
    print(tune(shape_named(model), plan.setting, out / f"tune-{name}.json", slots))
    return True


def _compilers(model: str, dtype: str, bits: float, parts: int) -> Iterator["subprocess.Popen[bytes]"]:
    for part in range(parts):
        job = {"model": model, "dtype": dtype, "bits": bits, "part": part, "parts": parts}
        command = [sys.executable, "-m", "benchmarks.kernels", "--compile", json.dumps(job)]
        yield subprocess.Popen(command, cwd=ROOT, env=child_environment())


def _compile(job: dict[str, Any]) -> None:
    from benchmarks.kernels.methods import Setting
    from benchmarks.kernels.tune import compile_all
    from benchmarks.kernels.work import DTYPES, shape_named

    setting = Setting("cuda", DTYPES[job["dtype"]], job["bits"], None, False)
    compile_all(shape_named(job["model"]), setting, job["part"], job["parts"])


def main() -> None:
    """Command line."""
    args = _parser().parse_args()
    if args.json and not (args.machine_code or args.estimate):
        raise SystemExit("--json goes with --machine-code or --estimate")
    if args.machine_code or args.estimate:
        (_estimate if args.estimate else _machine_code)(args)
        return
    # Read when triton is imported, here and in the processes started below.
    if args.work is None:
        os.environ["TRITON_INTERPRET"] = "1" if args.rehearse else "0"
    if args.work is not None:
        from benchmarks.kernels.work import serve

        serve(args.work)
        return
    if args.compile is not None:
        _compile(args.compile)
        return
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit(
            "there is no CUDA device to time kernels on; --rehearse runs every step on a CPU without timing, "
            "--machine-code reads what the kernels were compiled to"
        )
    with tempfile.TemporaryDirectory() as scratch:
        # A rehearsal's figures say nothing: they are kept only where a folder is named.
        out = args.out or (Path(scratch) if args.rehearse else RESULTS)
        out.mkdir(parents=True, exist_ok=True)
        if not (_tune if args.tune else _time)(args, out):
            sys.exit(1)


if __name__ == "__main__":
    main()
