"""Command line of the real model's quality tables."""

import argparse
import json
import tempfile
from pathlib import Path

import benchmarks.real_model
from benchmarks import quality
from benchmarks.real_model import all_active, routed
from benchmarks.real_model.rows import GROUPS, SAMPLES
from benchmarks.record import ROOT, commit, write_json
from offline_quant.evaluation.evaluate import Reference

CUTS = {"all-active": all_active.MODEL, "routed": routed.MODEL}
"""Name on the command line -> name of the model's folder."""


def distance(folder: Path, text: Path, path: Path) -> str:
    """What the routed cut is beside the dense model, which the first cut computes; measured once.

    Args:
        folder: of the models.
        text: to evaluate on.
        path: JSON file for `evaluate`'s figures, the text and the commit.

    Returns:
        A sentence.
    """
    if not path.is_file():
        found = Reference(folder / all_active.MODEL, text).evaluate(folder / routed.MODEL).as_dict()
        write_json(path, {"text": text.name, "commit": commit(), **found})
    figures = json.loads(path.read_text(encoding="utf-8"))
    return (
        f"{routed.MODEL} before quantizing, {figures['text']}: KL {quality.figure_text(figures, 'kl', 3)} to the dense "
        f"model, perplexity {figures['perplexity']:.2f} for {figures['perplexity_reference']:.2f}"
    )


def main() -> None:
    """Make the models, run rows."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_model",
        description=benchmarks.real_model.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cut", choices=CUTS, default="all-active", help="which model the rows are of")
    parser.add_argument("--folder", type=Path, default=ROOT / ".real_model", help="for the models and the texts")
    quality.add_row_options(parser, GROUPS)
    args = parser.parse_args()
    all_active.make(args.folder)
    text = args.folder / all_active.TEST
    if args.cut == "routed":
        routed.make(args.folder)
        args.out.mkdir(parents=True, exist_ok=True)
        print(distance(args.folder, text, args.out / f"distance-{routed.MODEL}.json"), flush=True)
    given = {
        "model": args.folder / CUTS[args.cut], "calib": str(args.folder / all_active.CALIBRATION), "samples": SAMPLES,
        "text": text, "second": args.folder / all_active.ASIDE, "states": args.folder,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        quality.run(argparse.Namespace(**vars(args) | given), Path(scratch), GROUPS)


if __name__ == "__main__":
    main()
