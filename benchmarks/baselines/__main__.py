"""Command line of the baselines."""

import argparse
import ast
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import benchmarks.baselines
import bitsmoe
from benchmarks.baselines.driver import BASELINES, check_request, run_baseline, write_windows
from bitsmoe_kernels.errors import BitsmoeError


def main() -> None:
    """Quantize with one baseline, print its figures as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.baselines",
        description=benchmarks.baselines.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=BASELINES)
    parser.add_argument("--model", type=Path, required=True, help="ordinary checkpoint directory")
    parser.add_argument("--calib", help="calibration text; windows are those of `bitsmoe quantize --calib`")
    parser.add_argument("--windows", type=Path, help="file of token windows made before, instead of --calib")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="directory for the dequantized checkpoint")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="hides a GPU from the library, or not")
    parser.add_argument("--text", type=Path, help="evaluate on this text against the original model")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the baseline")
    args = parser.parse_args()
    try:
        print(json.dumps(_run(args), indent=1))
    except BitsmoeError as e:
        sys.exit(f"error: {e}")


def _run(args: argparse.Namespace) -> dict[str, Any]:
    settings = dict(_setting(text) for text in args.set)
    with tempfile.TemporaryDirectory() as scratch:
        windows = args.windows
        if args.calib and windows is None:
            windows = Path(scratch) / "windows.safetensors"
            write_windows(args.model, args.calib, windows)
        check_request(args.name, windows, args.bits, settings)
        result = run_baseline(args.name, args.model, windows, args.bits, args.out, args.device, **settings)
    if args.text:
        result["evaluation"] = bitsmoe.evaluate(args.out, args.text, args.model).as_dict()
    return result


def _setting(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not found:
        raise BitsmoeError(f"--set {text}: must read NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    main()
