"""Routed experts on a CPU: time of a layer by our kernels and by others, tokens per second of `vllm serve`.

    python -m benchmarks.cpu layer [--out DIR] [--json]      one layer, all rivals in turns
    python -m benchmarks.cpu layer --only natural Q2_K "16 bits" --models Qwen3-30B-A3B --tokens 1 --seconds 10
    python -m benchmarks.cpu layer --rehearse                every step, tiny
    python -m benchmarks.cpu serve [--out DIR] [--json]      whole models, one server after another
    python -m benchmarks.cpu serve --rehearse
    python -m benchmarks.cpu tables [--results DIR]          the tables of docs from the results' files

llama.cpp's library is compiled into an environment of its own the first time.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, write_json

RESULTS = ROOT / "benchmarks" / "results"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    layer = commands.add_parser("layer", help="one layer, by all rivals in turns")
    layer.add_argument("--models", nargs="+", metavar="NAME", help="only these layers")
    layer.add_argument("--tokens", nargs="+", type=int, metavar="N", help="only these numbers of tokens of a call")
    layer.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="rivals whose name holds one of these")
    layer.add_argument("--isa", nargs="+", default=[], metavar="NAME", help="our kernels with these as well: avx2 ...")
    layer.add_argument("--rounds", type=int, default=15, help="at most, for each layer and number of tokens")
    layer.add_argument("--seconds", type=float, default=30, help="no round begins after so many (default: 30)")
    layer.add_argument("--working-set", type=int, metavar="BYTES", help="that the copies of a layer hold at least")
    layer.add_argument("--rehearse", action="store_true", help="every step on a tiny layer; figures say nothing")
    layer.add_argument("--out", type=Path, metavar="DIR", help="folder for cpu-layer.json, .md and .png")
    serve = commands.add_parser("serve", help="tokens per second of `vllm serve`")
    serve.add_argument("--models", nargs="+", metavar="NAME", help="only these")
    serve.add_argument("--layers", type=int, help="of every model; default: as many as fit into 20 GB at 16 bits")
    serve.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="methods whose name holds one of these")
    serve.add_argument("--batches", nargs="+", type=int, default=[1, 4], help="requests at a time (default: 1 4)")
    serve.add_argument("--prompt", type=int, default=16, help="tokens of a prompt (default: 16)")
    serve.add_argument("--output", type=int, default=64, help="tokens of an answer (default: 64)")
    serve.add_argument("--repeats", type=int, default=3, help="of each batch (default: 3)")
    serve.add_argument("--eager", action="store_true", help="without compilation")
    serve.add_argument("--rehearse", action="store_true", help="every step with a tiny model; figures say nothing")
    serve.add_argument("--out", type=Path, metavar="DIR", help="folder for cpu-serving.json and .md")
    for command in (layer, serve):
        command.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every rival")
        command.add_argument("--json", action="store_true", help="only JSON on standard output")
    tables = commands.add_parser("tables", help="tables from the results' files")
    tables.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    return parser


def _layer(args: argparse.Namespace) -> None:
    from benchmarks.cpu import layer, report
    from bitsmoe_kernels._cpu import library

    known = [layer.REHEARSAL.model] if args.rehearse else [m for m in layer.OURS if m != layer.REHEARSAL.model]
    models = _models(args, known)
    if strange := sorted(set(args.isa) - set(library.usable())):
        raise SystemExit(f"{', '.join(strange)} cannot run here; there are {', '.join(library.usable())}")
    plan = layer.Plan(
        models=models,
        tokens=tuple(args.tokens or layer.TOKENS), threads=args.threads, isas=tuple(args.isa), only=tuple(args.only),
        rounds=2 if args.rehearse else args.rounds, seconds=args.seconds,
        working_set=1 << 20 if args.rehearse else args.working_set,
    )  # fmt: skip
    result = _last(args, report.LAYER_FILE, layer.measured(plan))
    if not result:
        raise SystemExit(f"no rival's name holds {' or '.join(args.only)}")
    if args.out:
        report.draw_layer(result, (args.out / report.LAYER_FILE).with_suffix(".png"))
    _show(args, report.LAYER_FILE, result, report.layer_tables(result))


def _models(args: argparse.Namespace, known: Sequence[str]) -> tuple[str, ...]:
    """The models that were asked for; all that are known where none was."""
    if strange := sorted(set(args.models or ()) - set(known)):
        raise SystemExit(f"no model {', '.join(strange)}; there are {', '.join(known)}")
    return tuple(m for m in known if not args.models or m in args.models)


def _last(args: argparse.Namespace, file: str, results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The last of the results, each of which holds the former; all are written while the next one is measured."""
    result: dict[str, Any] = {}
    for result in results:
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            write_json(args.out / file, result)
    return result


def _show(args: argparse.Namespace, file: str, result: dict[str, Any], text: str) -> None:
    if args.out:
        (args.out / file).with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(json.dumps(result) if args.json else text)


def _serve(args: argparse.Namespace) -> None:
    sys.path.append(str(ROOT / "examples"))  # for the module that starts servers
    from benchmarks.cpu import report, serving

    rehearsal = "rehearsal"
    known = [rehearsal] if args.rehearse else [m for m in serving.LAYERS if m != rehearsal]
    models = _models(args, known)
    methods = tuple(m for m in serving.METHODS if not args.only or any(part in m.title for part in args.only))
    if not methods:
        raise SystemExit(
            f"no method holds {' or '.join(args.only)}; there are: {'; '.join(m.title for m in serving.METHODS)}"
        )
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    plan = serving.Plan(
        models=models, methods=methods,
        layers=args.layers, batches=tuple(args.batches), prompt=args.prompt, output=4 if args.rehearse else args.output,
        repeats=1 if args.rehearse else args.repeats, threads=args.threads,
        options=("--enforce-eager",) if args.eager or args.rehearse else (),
    )  # fmt: skip
    result = _last(args, report.SERVING_FILE, serving.measured(plan))
    _show(args, report.SERVING_FILE, result, report.serving_table(result))
    if any("failed" in row for row in result["rows"]):
        sys.exit(1)


def _tables(args: argparse.Namespace) -> None:
    from benchmarks.cpu import report

    for name, table in ((report.LAYER_FILE, report.layer_tables), (report.SERVING_FILE, report.serving_table)):
        if (args.results / name).is_file():
            print(table(json.loads((args.results / name).read_text(encoding="utf-8"))))


def main() -> None:
    """Command line."""
    args = _parser().parse_args()
    {"layer": _layer, "serve": _serve, "tables": _tables}[args.command](args)


if __name__ == "__main__":
    main()
