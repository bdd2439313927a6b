"""Forecasts of `bitsmoe quantize --plan` beside the divergences that were measured.

    python -m benchmarks.forecasts --model DIR [--calib FILE] [--samples N] [--out DIR]
    python -m benchmarks.forecasts --model DIR --targets KL ... [--calib FILE] [--text FILE] [--samples N] [--out DIR]

The first plans again what quality-MODEL.json has of untuned runs with default objective and windows, and compares.
Writes forecasts-MODEL.md.

The second quantizes with `--target-kl`, and measures the divergence on other text. Without --calib and --text the model
writes both itself, from different seeds. Writes targets-MODEL.md.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

import bitsmoe
from benchmarks.quality import HELD_OUT_SEED, OURS, write_held_out_text
from benchmarks.record import ROOT, commit
from offline_quant.config import SELF
from offline_quant.evaluation.evaluate import Reference
from offline_quant.report.schema import ModelReport

RESULTS = ROOT / "benchmarks" / "results"
COMPARED = [{}, {"basis": "natural"}]
"""Options of the rows that are compared."""
CALIBRATION_SEED = HELD_OUT_SEED + 1
"""Of the calibration text that the model writes with --targets, once for all of them."""


def table(model: Path, calib: str, samples: int | None) -> str:
    """The comparison as a page.

    Args:
        model: checkpoint directory; its name is that of the results.
        calib: calibration text of the measurements.
        samples: their windows; None: the default.
    """
    measured = json.loads((RESULTS / f"quality-{model.name}.json").read_text(encoding="utf-8"))
    rows = [r for r in measured["rows"] if r["method"] == OURS and not r["seed"] and r["options"] in COMPARED]
    lines = ["| bpw | basis | forecast KL | measured KL | ratio |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row["bits"], str(row["options"]))):
        few = {"calib_samples": samples} if samples else {}
        with tempfile.TemporaryDirectory() as scratch:
            options = {**few, **row["options"], "bits": row["bits"], "calib": calib, "plan": True}
            report: ModelReport = bitsmoe.quantize(model, Path(scratch) / "plan", **options).report
        assert report.forecast is not None
        kl, found = row["kl"], report.forecast.kl
        basis = row["options"].get("basis", "auto")
        lines.append(f"| {row['bpw']:.3f} | {basis} | {found:.5f} | {kl:.5f} | {found / kl:.2f} |")
    head = f"# Forecasts: {model.name}\n\n"
    tail = f"\n\nMeasured in quality-{model.name}.md; planned by commit {commit()} on {platform.machine()}.\n"
    return head + "\n".join(lines) + tail


def target_table(model: Path, calib: str, samples: int | None, text: Path, targets: list[float]) -> str:
    """What `--target-kl` picks, and what is measured then, as a page.

    Args:
        model: checkpoint directory.
        calib: calibration text.
        samples: its windows; None: the default.
        text: what is measured on.
        targets: divergences, nats per token.
    """
    lines = ["| target KL | picked bits | bpw | forecast KL | of the plan of these bits | measured KL | over target |"]
    lines.append("|---" * 7 + "|")
    reference, tokens = Reference(model, text), 0
    for target in targets:
        options: dict[str, Any] = {"calib": calib, **({"calib_samples": samples} if samples else {})}
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "model"
            report: ModelReport = bitsmoe.quantize(model, out, target_kl=target, **options).report
            found = reference.evaluate(out)
            bits = report.options["bits"]
            planned = bitsmoe.quantize(model, Path(scratch) / "plan", bits=bits, plan=True, **options).report.forecast
        expected, tokens = report.forecast, found.tokens
        assert expected is not None
        assert planned is not None
        assert found.kl is not None
        lines.append(
            f"| {target:g} | {bits:g} | {report.bpw:.3f} | {expected.kl:.5f} | {planned.kl:.5f} | {found.kl:.5f} ± "
            f"{found.kl_stderr:.5f} | {found.kl / target:.2f} |"
        )
    tail = (
        f"\n\nMeasured on {tokens:,} tokens of {text.name}, calibrated on {report.calibration_tokens:,} tokens of "
        f"{Path(calib).name}; commit {commit()}, {torch.get_num_threads()} thread(s) on {platform.machine()}.\n"
    )
    return f"# Targets: {model.name}\n\n" + "\n".join(lines) + tail


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calib")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--targets", type=float, nargs="+", help="quantize for these divergences")
    parser.add_argument("--text", type=Path, help="what is measured on with --targets")
    args = parser.parse_args()
    if args.targets:
        with tempfile.TemporaryDirectory() as scratch:
            text, calib = args.text or Path(scratch) / "held_out.txt", args.calib or str(Path(scratch) / "calib.txt")
            if args.text is None:
                write_held_out_text(args.model, text)
            if args.calib is None:
                write_held_out_text(args.model, Path(calib), CALIBRATION_SEED)
            page = target_table(args.model, calib, args.samples, text, args.targets)
    else:
        page = table(args.model, args.calib or SELF, args.samples)
    name = "targets" if args.targets else "forecasts"
    (args.out / f"{name}-{args.model.name}.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
