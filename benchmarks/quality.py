"""Quality against size on one model: bitsmoe beside GPTQ, AutoRound, GGUF, HQQ and rounding, from their own libraries.

    python -m benchmarks.quality [--model DIR] [--calib FILE] [--text FILE] [--rows main seeds ...] [--out DIR]

All methods calibrate on the same windows of the same text and are compared with the original model on the same tokens,
as `bitsmoe eval` does it. Groups of rows:

    main        bitsmoe from 1.75 to 4 bits; every baseline at 2 and 3 bits, GGUF's types of 1.75 to 3.44
    seeds       bitsmoe, its forms and GPTQ on other calibration windows of the same text
    forms       every decomposition forced, beside what `auto` takes
    objectives  AlphaQ, BT-MoE, frequency and uniform beside bitsmoe
    ablation    parts of the method left out
    dense       linear layers outside the experts at 8 and 4 bits too

Without --calib and --text the model writes both itself, from different seeds. Every row is kept as soon as it is done:
the same command goes on where it was stopped. Writes quality-MODEL.json, .md and .png to --out.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bitsmoe
from benchmarks.baselines.driver import run_baseline, write_windows
from benchmarks.baselines.gguf import bits_of
from benchmarks.record import ROOT, commit, gpu_name, gpu_peak, write_json
from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.calibration.sources.self_written import write_sampled_text
from offline_quant.calibration.windows import load_tokenizer, window_length
from offline_quant.checkpoint.directory import REPORT_FILE
from offline_quant.evaluation.evaluate import MAX_WINDOW, Reference
from offline_quant.model.source import SourceModel
from offline_quant.model.streaming import StreamedModel
from offline_quant.report.rank_correlation import spearman

HELD_OUT_WINDOWS, HELD_OUT_SEED = 64, 1
OURS = "bitsmoe"
SECOND_FIGURES = ("tokens", "kl", "kl_stderr", "perplexity", "perplexity_reference")
"""What a row keeps of a second text."""
FIGURES_FILE = "figures.json"
"""What a run of ours leaves beside its checkpoint."""
BITS = (1.75, 2.0, 2.125, 2.5, 2.75, 3.125, 4.0)
FORM_BITS = (2.125, 2.5, 3.125)
SEEDS = range(5)
STRONG = {"observer": "memoryless_mse", "calibrate_all_experts": False}
"""Settings that helped GPTQ most, none of them its library's default."""
GGUF = "GGUF IQ types, importance matrix"
GGUF_TYPES = ("IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S")


@dataclass(frozen=True)
class Row:
    """One run of one method.

    Attributes:
        label: as the table names it.
        method: `bitsmoe` or a baseline.
        bits: budget of bitsmoe, code width of a baseline.
        seed: of the calibration windows.
        options: of the quantizer or the baseline.
        curve: what the plot joins its point to; None: rows of the same label.
    """

    label: str
    method: str
    bits: float
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    curve: str | None = None

    @property
    def key(self) -> str:
        """The same for the same run."""
        return json.dumps([self.method, self.bits, self.seed, self.options], sort_keys=True)


Groups = Mapping[str, Sequence[Row]]
"""Rows by the name of their group."""


def _ours(label: str, bits: tuple[float, ...], seeds: Iterable[int] = (0,), **options: Any) -> list[Row]:
    return [Row(label, OURS, b, seed, options) for b in bits for seed in seeds]


GROUPS: dict[str, list[Row]] = {
    "main": [
        *_ours("bitsmoe", BITS),
        *_ours("bitsmoe --fit layer", (2.125,), fit="layer"),
        *_ours("bitsmoe --tune", (1.75, 2.125, 3.125), tune=True),
        *_ours("bitsmoe --token-weights model", (2.125,), token_weights="model"),
        *_ours("bitsmoe --tune --tune-codes", (2.125,), tune=True, tune_codes=True),
        *_ours(
            "bitsmoe --tune --tune-codes --token-weights model",
            (2.125,),
            tune=True,
            tune_codes=True,
            token_weights="model",
        ),
        *(Row("GPTQ g128, static order", "gptq", b) for b in (2, 3)),
        *(Row("GPTQ g128, its strongest settings", "gptq", b, options=STRONG) for b in (2,)),
        *(Row("AutoRound g128, 200 iterations", "autoround", b) for b in (2, 3)),
        *(
            Row(
                f"GGUF {t}, importance matrix",
                "gguf",
                bits_of(t),
                0,
                {"type": t},
                GGUF if t[0] == "I" else None,
            )
            for t in GGUF_TYPES
        ),
        *(Row("HQQ g64", "hqq", b) for b in (2, 3)),
        *(Row("round-to-nearest g128", "rtn", b) for b in (2, 3)),
    ],
    "seeds": [
        *_ours("bitsmoe", FORM_BITS, SEEDS),
        *(r for form in ("natural", "whitened") for r in _ours(f"--basis {form}", FORM_BITS, SEEDS, basis=form)),
        *(Row("GPTQ g128, static order", "gptq", 2, seed) for seed in SEEDS),
    ],
    "forms": [
        *_ours("bitsmoe", FORM_BITS),
        *(r for form in ("natural", "whitened", "paper") for r in _ours(f"--basis {form}", FORM_BITS, basis=form)),
    ],
    "objectives": [
        *_ours("bitsmoe", (2.5, 3.5)),
        *_ours("--objective alphaq", (2.5, 3.5), objective="alphaq"),
        *_ours("--objective bt-moe", (2.5, 3.5), objective="bt-moe"),
        *_ours("--objective frequency", (2.5,), objective="frequency"),
        *_ours("--objective uniform", (2.5,), objective="uniform"),
    ],
    "ablation": [
        *_ours("bitsmoe", (2.125,)),
        *_ours("one budget for the model", (2.125,), budget="model"),
        *_ours("without the surrogate: uniform widths", (2.125,), objective="uniform"),
        *_ours("without feedback", (2.125,), feedback=False),
        *_ours("on half the calibration windows", (2.125,), calib_samples=64),
        *_ours(
            "without feedback, refinement, first pass, on 16 windows",
            (2.125,),
            feedback=False,
            refine=0,
            without=["trial"],
            calib_samples=16,
        ),  # the fastest
        *_ours("without refinement", (2.125,), refine=0),
        *_ours("without whitening: plain SVD bases", (2.125,), basis="paper"),
        *_ours("without weights of outputs and tokens", (2.125,), without=["output-weights"]),
        *_ours("without correction of down", (2.125,), without=["correction"]),
        *_ours("without the first pass", (2.125,), without=["trial"]),
        *_ours("with basis rows that no expert uses", (2.125,), without=["trim"]),
        *_ours("--tune", (2.125,), tune=True),
    ],
    "dense": [
        *_ours("bitsmoe", (2.125,)),
        *(r for bits in (8, 4) for r in _ours(f"--dense-bits {bits}", (2.125,), dense_bits=bits)),
    ],
}


def write_held_out_text(model: Path, path: Path, seed: int = HELD_OUT_SEED) -> None:
    """Text the model wrote; calibration by `self` uses another seed."""
    source = SourceModel(model)
    length = window_length(source.config, MAX_WINDOW)
    write_sampled_text(StreamedModel(source), load_tokenizer(model), path, HELD_OUT_WINDOWS, length, seed)


def measure(
    model: Path, calib: str, references: Sequence[Reference], row: Row, device: str = "cpu", samples: int | None = None
) -> dict[str, Any]:
    """Quantize and evaluate: figures of one row.

    Args:
        model: checkpoint directory.
        calib: calibration text.
        references: the original model on the test text, and on a second one, if there is one.
        row: what is run.
        device: what quantizes.
        samples: windows of calibration text; None: the quantizer's default.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "model"
        if row.method == OURS:
            few = {"calib_samples": samples} if samples else {}
            options = {**few, **row.options, "bits": row.bits, "calib": calib, "seed": row.seed, "device": device}
            figures = _quantize_apart(model, out, options)
        else:
            windows = Path(scratch) / "windows.safetensors"
            write_windows(model, calib, windows, samples, seed=row.seed)
            figures = run_baseline(row.method, model, windows, int(row.bits), out, device, **row.options)
        found, *others = (reference.evaluate(out).as_dict() for reference in references)
    second = {"second": {name: others[0][name] for name in SECOND_FIGURES}} if others else {}
    return {
        "label": row.label, "method": row.method, "bits": row.bits, "seed": row.seed, "options": row.options,
        "run": figures, **found, **second, "bpw": figures["bpw"],
    }  # fmt: skip


def _quantize_apart(model: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Quantize in a process of its own, so that its peak of memory is its own."""
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "benchmarks.quality", "--quantize", json.dumps(options)]
    command += ["--model", str(model), "--out", str(out)]
    # What the solver prints is no part of the table.
    result = subprocess.run(command, cwd=ROOT, env=env, stdout=sys.stderr, check=False)
    if result.returncode:
        raise BitsmoeError(f"bitsmoe quantize {options} ended with status {result.returncode}")
    return json.loads((out / FIGURES_FILE).read_text(encoding="utf-8"))


def _quantize_here(model: Path, out: Path, options: dict[str, Any]) -> None:
    StreamedModel(SourceModel(model))  # what it imports is not counted, as for the baselines
    result = bitsmoe.quantize(model, out, **options)
    report, wanted = result.report, ("layer", "basis", "predicted", "measured", "output_error")
    figures = {
        "bpw": report.bpw, "seconds": _quantizing(result.seconds, report.aims_at_original),
        "cpu_seconds": _quantizing(result.cpu_seconds, report.aims_at_original), "stages": result.seconds,
        "peak_bytes": max(result.peak_bytes.values()), "threads": torch.get_num_threads(),
        "solver_gap": max(layer.solver_gap for layer in report.layers),
        "layers": [{k: v for k, v in layer.model_dump().items() if k.startswith(wanted)} for layer in report.layers],
        "model_budget": report.model_budget and report.model_budget.model_dump(), **gpu_peak(),
    }  # fmt: skip
    assert (out / REPORT_FILE).is_file()
    (out / FIGURES_FILE).write_text(json.dumps(figures), encoding="utf-8")


def _quantizing(stages: dict[str, float], aims_at_original: bool) -> float:
    """Without what baselines do not do: they are given tokens, judge nothing and draw no report.

    The original model's own hidden states count where a run aims at them.
    """
    left_out = ("calibration text", "sanity", "report page") + (() if aims_at_original else ("original model",))
    return sum(seconds for stage, seconds in stages.items() if stage not in left_out)


def surrogate_points(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(predicted, measured) relative error of every layer and projection of bitsmoe's rows."""
    points = []
    for row in rows:
        if row["method"] != OURS or row["options"] or row["seed"]:
            continue
        for layer in row["run"]["layers"]:
            for name, predicted in layer["predicted_error_by_projection"].items():
                points.append((predicted, layer["measured_error_by_projection"][name]))
    return points


def as_markdown(result: dict[str, Any], groups: Groups = GROUPS) -> str:
    """Tables of all groups, with what they ran on."""
    rows = {row["key"]: row for row in result["rows"]}
    lines = []
    for name, group in groups.items():
        done = [rows[r.key] | {"label": r.label} for r in group if r.key in rows]
        if name != "seeds" and len({r["label"] for r in done}) < 2:
            continue  # nothing to compare yet
        body = _seed_table(done) if name == "seeds" else _table(done)
        if len(body) > 2:
            lines += [f"## {name}", "", *body, ""]
    points = surrogate_points(result["rows"])
    if len(points) > 2:
        predicted, measured = np.array(points).T
        lines += [
            f"Predicted against measured error: Spearman correlation {spearman(predicted, measured):.4f} over "
            f"{len(points)} points (layer, projection, budget).",
            "",
        ]
    first, on = result["rows"][0], result["environment"]
    gpu = f" and one {on['gpu']}" if "gpu" in on else ""
    commits = dict.fromkeys(row["commit"] for row in result["rows"])
    made_on = ", ".join(dict.fromkeys(row.get("cpu", "a processor not on record") for row in result["rows"]))
    threads = " or ".join(str(n) for n in sorted({row["run"]["threads"] for row in result["rows"]}))
    tried = next((row["second"] for row in result["rows"] if "second" in row), None)
    second = f", and {tried['tokens']:,} of {result['second_text']}, the second" if tried else ""
    lines.append(
        f"{result['model']}, perplexity {first['perplexity_reference']:.2f} unquantized; {first['tokens']:,} tokens of "
        f"{result['text']}{second}; calibrated on {result['calibration']}, windows of seed 0 where not said otherwise. "
        f"KL in nats per token; ±: standard errors over windows of text; bits per weight all-in; seconds of "
        f"quantization on the clock and on the processors, on {threads} thread(s) of {made_on}{gpu}, "
        f"without imports, sanity gate and report; torch {on['torch']}, commit {', '.join(commits)}."
        + (" Seconds of different commits are of different days and loads." if len(commits) > 1 else "")
    )
    return f"# Quality: {result['model']}\n\n" + "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    head = ["method", "bpw", "KL", "excess perplexity", "top-1 agreement", "seconds", "CPU s", "peak GB"]
    two_texts = any("second" in r for r in rows)
    lines = table_head([*head, "KL, second text"] if two_texts else head)
    for r in rows:
        run = r["run"]
        figures = [figure_text(r, "kl", 5), figure_text(r, "excess", 3), figure_text(r, "top1_agreement", 4)]
        lines.append(
            f"| {r['label']} | {r['bpw']:.3f} | {' | '.join(figures)} | {run['seconds']:.0f} "
            f"| {run['cpu_seconds']:.0f} | {run['peak_bytes'] / 1e9:.2f} |"
            + (f" {figure_text(r['second'], 'kl', 5) if 'second' in r else ''} |" if two_texts else "")
        )
    return lines


def table_head(columns: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]


def figure_text(row: dict[str, Any], name: str, digits: int) -> str:
    """A figure with its standard error, where one was measured."""
    error = row.get(f"{name}_stderr")
    return f"{row[name]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _seed_table(rows: list[dict[str, Any]]) -> list[str]:
    """Means and standard deviations over the seeds of a method at a budget, where there are several.

    The last column compares draw by draw with `bitsmoe` at the same budget; its standard error is that of draws.
    """
    head = ["method", "bpw", "seeds", "KL, mean", "standard deviation", "excess, mean", "standard deviation"]
    head.append("excess above bitsmoe's")
    lines = table_head(head)
    runs: dict[tuple[str, float], dict[int, dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault((row["label"], row["bits"]), {})[row["seed"]] = row
    for (label, bits), drawn in runs.items():
        if len(drawn) > 1:
            bpw, kl, excess = ([r[k] for r in drawn.values()] for k in ("bpw", "kl", "excess"))
            ours = runs.get((OURS, bits), {})
            above = [r["excess"] - ours[seed]["excess"] for seed, r in drawn.items() if seed in ours and label != OURS]
            compared = ""
            if len(above) > 1:
                compared = f"{statistics.mean(above):.3f} ± {statistics.stdev(above) / len(above) ** 0.5:.3f}"
            lines.append(
                f"| {label} | {statistics.mean(bpw):.3f} | {len(drawn)} | {statistics.mean(kl):.5f} "
                f"| {statistics.stdev(kl):.5f} | {statistics.mean(excess):.3f} | {statistics.stdev(excess):.3f} "
                f"| {compared} |"
            )
    return lines


def draw(result: dict[str, Any], path: Path, groups: Groups = GROUPS) -> None:
    """KL against all-in bits per weight, one line for each method of the main group."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import TABLEAU_COLORS
    from matplotlib.figure import Figure

    rows = {row["key"]: row for row in result["rows"]}
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = list(TABLEAU_COLORS)
    axes.set_prop_cycle(marker=["o"] * len(colors) + ["s"] * len(colors), color=2 * colors)
    for label in dict.fromkeys(r.curve or r.label for r in groups["main"]):
        points = sorted((rows[r.key]["bpw"], rows[r.key]["kl"]) for r in groups["main"]
                        if (r.curve or r.label) == label and r.key in rows)  # fmt: skip
        if points:
            ours = label == OURS
            axes.plot(*zip(*points, strict=True), label=label, linewidth=2.5 if ours else 1.2,
                      color="black" if ours else None, zorder=3 if ours else 2)  # fmt: skip
    axes.set(yscale="log", xlabel="all-in bits per weight of the experts", ylabel="KL to the original, nats per token",
             title=result["model"])  # fmt: skip
    axes.grid(True, which="both", alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def environment(device: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": model,
        **gpu_name(device),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "commit": commit(),
    }


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""


def _earlier_rows(path: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run of the same model and texts on the same kind of device."""
    if not path.is_file():
        return []
    data = json.loads(path.read_text(encoding="utf-8"))
    same = all(data[k] == header[k] for k in ("model", "calibration", "text"))
    same = same and data.get("second_text") in (None, header.get("second_text"))
    return data["rows"] if same and data["environment"].get("gpu") == header["environment"].get("gpu") else []


def wanted_rows(args: argparse.Namespace, groups: Groups) -> list[Row]:
    """The rows that the command line asks for, see `add_row_options`."""
    return [
        row
        for name in args.rows
        for row in groups[name]
        if (not args.methods or row.method in args.methods)
        and (not args.bits or row.bits in args.bits)
        and (not args.match or any(re.search(pattern, row.label) for pattern in args.match))
    ]


def run(args: argparse.Namespace, scratch: Path, groups: Groups = GROUPS) -> None:
    """All rows asked for.

    Args:
        args: of the command line; `samples`, see `measure`; `second`, another text to test on, or None; `states`, a
            folder that keeps the original's hidden states on the texts, or None.
        scratch: an empty folder.
        groups: rows there are.
    """
    text, calib = args.text, args.calib
    if text is None:
        text = scratch / "held_out.txt"
        write_held_out_text(args.model, text)
    if calib == "self":
        calib = str(scratch / "calibration.txt")
        write_held_out_text(args.model, Path(calib), seed=0)
    result: dict[str, Any] = {
        "model": args.model.name,
        "calibration": "text sampled from the model" if args.calib == "self" else Path(args.calib).name,
        "text": args.text.name if args.text else "text sampled from the model with another seed",
        "environment": environment(args.device),
        **({"second_text": args.second.name} if args.second else {}),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    base = args.out / f"quality-{args.model.name}"
    result["rows"] = _earlier_rows(base.with_suffix(".json"), result)
    done = {row["key"] for row in result["rows"]}
    wanted = {row.key: row for row in wanted_rows(args, groups) if row.key not in done}
    texts = [path for path in (text, args.second) if path] if wanted else []
    references = [
        Reference(args.model, path, args.device, args.states and args.states / f"{args.model.name}-{path.name}.states")
        for path in texts
    ]
    for number, row in enumerate(wanted.values(), 1):
        print(f"[{number}/{len(wanted)}] {row.label}, {row.bits} bits, seed {row.seed}", file=sys.stderr, flush=True)
        found = measure(args.model, calib, references, row, args.device, args.samples)
        on = {name: result["environment"][name] for name in ("commit", "cpu")}
        result["rows"].append({"key": row.key, **on, **found})
        write_json(base.with_suffix(".json"), result)
    base.with_suffix(".md").write_text(as_markdown(result, groups), encoding="utf-8")
    draw(result, base.with_suffix(".png"), groups)
    print(as_markdown(result, groups))


def add_row_options(parser: argparse.ArgumentParser, groups: Groups) -> None:
    """The options that choose rows and say where they are run and written."""
    parser.add_argument("--rows", nargs="+", choices=groups, default=list(groups))
    parser.add_argument("--methods", nargs="+", help="only rows of these: bitsmoe, gptq, autoround, gguf, hqq, rtn")
    parser.add_argument("--bits", nargs="+", type=float, help="only rows of these budgets or code widths")
    parser.add_argument("--match", nargs="+", help="only rows in whose label one of these regular expressions is found")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what quantizes and evaluates")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny_moe")
    parser.add_argument("--calib", default="self")
    parser.add_argument("--text", type=Path)
    add_row_options(parser, GROUPS)
    parser.add_argument("--samples", type=int, help="windows of calibration text; default: the quantizer's")
    parser.add_argument("--quantize", type=json.loads, help=argparse.SUPPRESS)
    parser.set_defaults(second=None, states=None)
    args = parser.parse_args()
    if args.quantize:
        _quantize_here(args.model, args.out, args.quantize)
        return
    with tempfile.TemporaryDirectory() as scratch:
        run(args, Path(scratch))


if __name__ == "__main__":
    main()
