"""Quality against size on one model: bitsmoe at several budgets beside round-to-nearest.

    python -m benchmarks.quality [--model DIR] [--calib FILE] [--text FILE] [--bits 2 2.5 3] [--rtn 2 3 4] [--out DIR]

Without --calib and --text the model writes both itself, from different seeds. All methods are compared with the
original model on the same tokens, as `bitsmoe eval` does it. Prints a table; writes quality.json and quality.md
to --out.
"""

import argparse
import json
import platform
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines.driver import run_baseline
from offline_quant.calibration import load_tokenizer, window_length, write_sampled_text
from offline_quant.config import QuantizeConfig
from offline_quant.evaluate import MAX_WINDOW, evaluate
from offline_quant.model_adapter import SourceModel
from offline_quant.pipeline import quantize_model
from offline_quant.streaming import StreamedModel

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT_WINDOWS, HELD_OUT_SEED = 64, 1


def write_held_out_text(model: Path, path: Path) -> None:
    """Text the model wrote with a seed that calibration does not use."""
    source = SourceModel(model)
    length = window_length(source.config, MAX_WINDOW)
    write_sampled_text(StreamedModel(source), load_tokenizer(model), path, HELD_OUT_WINDOWS, length, HELD_OUT_SEED)


def measure(model: Path, calib: str, text: Path, bits: list[float], rtn: list[int]) -> list[dict[str, Any]]:
    """One row for each method and budget."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for budget in bits:
            start, out = time.monotonic(), Path(scratch) / f"bitsmoe-{budget}"
            outcome = quantize_model(str(model), out, QuantizeConfig(bits=budget, calib=calib))
            seconds = time.monotonic() - start
            bpw = outcome.report["bpw"]
            rows.append(_row("bitsmoe", bpw, seconds, evaluate(out, text, model).as_dict()))
        for width in rtn:
            start, out = time.monotonic(), Path(scratch) / f"rtn-{width}"
            bpw = run_baseline("rtn", model, None, width, out)["bpw"]
            seconds = time.monotonic() - start
            rows.append(_row("round-to-nearest g128", bpw, seconds, evaluate(out, text, model).as_dict()))
    return rows


def _row(method: str, bpw: float, seconds: float, figures: dict[str, Any]) -> dict[str, Any]:
    base = figures["perplexity_reference"]
    return {**figures, "method": method, "bpw": bpw, "excess": figures["perplexity"] - base, "seconds": seconds}


def as_markdown(result: dict[str, Any]) -> str:
    """The table, with what it ran on."""
    lines = [
        "| method | bits per weight, all-in | KL, nats per token | excess perplexity | top-1 agreement | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        lines.append(
            f"| {r['method']} | {r['bpw']:.3f} | {r['kl']:.4f} | {r['excess']:.3f} | {r['top1_agreement']:.3f} "
            f"| {r['seconds']:.0f} |"
        )
    first, on = result["rows"][0], result["environment"]
    lines += [
        "",
        f"{result['model']}, perplexity {first['perplexity_reference']:.2f} unquantized; {first['tokens']:,} tokens of "
        f"{result['text']}; calibrated on {result['calibration']}; float32 on {on['threads']} threads of {on['cpu']}, "
        f"torch {on['torch']}, commit {on['commit']}.",
    ]
    return "\n".join(lines) + "\n"


def environment() -> dict[str, Any]:
    """What the figures were measured on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    model = next(
        (line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "commit": commit,
    }


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny_moe")
    parser.add_argument("--calib", default="self")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--bits", type=float, nargs="*", default=[1.75, 2.125, 2.5, 3.125])
    parser.add_argument("--rtn", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if not args.bits and not args.rtn:
        parser.error("nothing to measure: give --bits or --rtn")
    with tempfile.TemporaryDirectory() as scratch:
        text = args.text
        if text is None:
            text = Path(scratch) / "held_out.txt"
            write_held_out_text(args.model, text)
        result = {
            "model": args.model.name,
            "calibration": "text sampled from the model" if args.calib == "self" else Path(args.calib).name,
            "text": args.text.name if args.text else "text sampled from the model with another seed",
            "environment": environment(),
            "rows": measure(args.model, args.calib, text, args.bits, args.rtn),
        }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table = as_markdown(result)
    (args.out / "quality.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
