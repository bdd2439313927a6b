"""Forecasts of `bitsmoe quantize --plan` beside the divergences that were measured.

    python -m benchmarks.forecasts --model DIR [--calib FILE] [--samples N] [--out DIR]

Plans again what quality-MODEL.json has of untuned runs with default objective and windows, and compares. Writes
forecasts-MODEL.md.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path

import bitsmoe
from benchmarks.quality import OURS
from benchmarks.record import ROOT, commit
from offline_quant.report.schema import ModelReport

RESULTS = ROOT / "benchmarks" / "results"
COMPARED = [{}, {"basis": "natural"}]
"""Options of the rows that are compared."""


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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calib", default="self")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    page = table(args.model, args.calib, args.samples)
    (args.out / f"forecasts-{args.model.name}.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
