"""All results on standard output: tables that fit 80 columns, and lines of text."""

from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from bitsmoe_kernels.models.families import Tested
from offline_quant.checkpoint.directory import PAGE_FILE
from offline_quant.model.probe import Probe
from offline_quant.report.schema import Inspection, LayerReport, ModelReport

TESTED: dict[Tested, str] = {
    "tokens": "vLLM on a CPU gives the tokens of the dequantized checkpoint",
    "bfloat16": "vLLM on a CPU is as exact as with the dequantized checkpoint, in bfloat16",
    "transformers": "against transformers' own logits; no test serves it, as vLLM cannot on a CPU",
    "derived": "by nobody; not known to serve",
}
# A line of text is one line however narrow the terminal, so that paths and figures can be searched for in it.
output = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_run(report: ModelReport, out: Path, plan_only: bool) -> None:
    """Results of `bitsmoe quantize`: a row for each layer, then what is unusual."""
    columns = ("layer", "basis", "rank", "bpw", "predicted error", "measured error", "output error")
    table = _table(*columns, "tokens per expert")
    for row in report.layers:
        table.add_row(
            _layer_number(row.layer), row.basis, row.basis_ranks() or "-", f"{row.bpw:.4f}",
            f"{row.predicted_error:.4f}", _error(row.measured_error), _error(row.output_error),
            f"{row.tokens_per_expert.min}-{row.tokens_per_expert.max}",
        )  # fmt: skip
    _show(f"{out} ({'plan only' if plan_only else 'quantized'})", table)
    output.print(f"Solver gap, proven: at most {max(row.solver_gap for row in report.layers):.1e}")
    _print_unusual_experts(report.layers)
    if (sanity := report.sanity) is not None:
        if sanity.degenerate:
            output.print(f"This model is broken: {'; '.join(sanity.faults)}. {sanity.advice}", style="bold red")
        else:
            output.print(
                f"Sane: perplexity {sanity.perplexity_original:.4g} -> {sanity.perplexity_quantized:.4g} on "
                f"{sanity.tokens} tokens of the calibration text"
            )
    for line in report.expectation():
        output.print(line)
    if report.model_tuning is not None:
        output.print(str(report.model_tuning))
    if report.dense_layers is not None:
        output.print(str(report.dense_layers))
    output.print(f"Report: {out / PAGE_FILE}")


def print_probe(found: Probe, model: str) -> None:
    """Results of `bitsmoe probe`."""
    size = found.expert_weights
    output.print(f"{model}: {found.architecture} ({found.models}), can be quantized")
    output.print(
        f"{found.moe_layers} of {found.num_layers} layers have routed experts: {found.num_experts} each, hidden_size "
        f"{found.hidden_size}, intermediate_size {found.intermediate_size}"
    )
    output.print(
        f"{size / 1e9:.3g} billion weights in experts: {2 * size / 1e9:.3g} GB at 16 bits, {size / 4e9:.3g} GB at 2"
    )
    output.print(f"Tested on small random models: {TESTED[found.tested]}")
    if found.unserved is not None:
        output.print(f"vLLM is not known to serve the result: {found.unserved}")
    if found.derived is not None:
        output.print(f"Derived from transformers and checked: {found.derived}")
    if not found.index:
        output.print(
            "No index of the weights to compare with: names and shapes are checked when the model is quantized"
        )


def _print_unusual_experts(layers: list[LayerReport]) -> None:
    for row in layers:
        if row.unseen_experts:
            output.print(
                f"{row.layer}: calibration never reached expert(s) {row.unseen_experts}; they were "
                "quantized from statistics pooled over all tokens",
                style="yellow",
            )
    for row in layers:
        if row.extreme_experts:
            output.print(f"{row.layer}: expert(s) {row.extreme_experts} put out far more than the others")


def print_times(report: ModelReport, seconds: float, stages: dict[str, float]) -> None:
    """Last line of `bitsmoe quantize`: size, and the time of each stage."""
    each = ", ".join(f"{name} {spent:.1f} s" for name, spent in stages.items())
    output.print(
        f"{report.bpw:.4f} bits per weight all-in ({report.expert_bytes / 1e6:.2f} MB of experts), "
        f"{seconds:.1f} s ({each})"
    )


def print_inspection(report: Inspection, directory: Path) -> None:
    """Results of `bitsmoe inspect`: a row for each projection, and a histogram of bit-widths."""
    table = _table("layer", "projection", "bpw", "code bits by expert", "codes", "scales", "basis", "rank", "other")
    for layer in report.layers:
        for name, projection in layer.projections.items():
            nbytes = projection.bytes
            scales = nbytes["component_scale"] + nbytes["feature_scale"]
            basis = nbytes.get("basis", 0) + nbytes.get("basis_scale", 0)
            total = sum(nbytes.values())
            other = total - nbytes["codes"] - scales - basis
            shares = [f"{n / total:.1%}" for n in (nbytes["codes"], scales, basis, other)]
            spread = projection.code_bits_by_expert
            rank = "-" if projection.basis_rank is None else str(projection.basis_rank)
            table.add_row(
                _layer_number(layer.layer), name, f"{projection.bpw:.4f}", f"{min(spread):.2f}-{max(spread):.2f}",
                *shares[:3], rank, shares[3],
            )  # fmt: skip
    _show(f"{directory}: {report.bpw:.4f} bits per weight all-in", table)
    entries = sum(report.weights_by_width.values())
    histogram = _table("bits", "share", "")
    for width, count in report.weights_by_width.items():
        histogram.add_row(width, f"{count / entries:.1%}", "█" * round(50 * count / entries))
    _show("Stored factor entries by bit-width", histogram)
    if report.dense_layers is not None:
        output.print(str(report.dense_layers))
    output.print(f"experts {report.expert_bytes / 1e6:.2f} MB, everything else {report.other_bytes / 1e6:.2f} MB")
    output.print(f"serving: {report.parallel_sizes}")


def print_evaluation(figures: dict[str, Any], title: str) -> None:
    """Results of `bitsmoe eval`: a row for each figure, beside its standard error."""
    table = _table("figure", "value", "standard error")
    for name, value in figures.items():
        if not name.endswith("_stderr"):
            error = figures.get(f"{name}_stderr")
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.5f}"
            table.add_row(name, shown, "" if error is None else f"{error:.5f}")
    _show(title, table)


def _show(title: str, table: Table) -> None:
    """Print a table below its title. The title is whole, even where it is wider than the table."""
    output.print(f"\n{title}", style="italic")
    output.print(table, soft_wrap=False)


def _table(*columns: str) -> Table:
    """A table that fits 80 columns: no frame, words to the left and figures to the right."""
    table = Table(box=rich.box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column, justify="left" if column in ("layer", "projection", "figure", "") else "right")
    return table


def _layer_number(prefix: str) -> str:
    """Number of the decoder layer. Tables have no room for whole tensor prefixes."""
    return next((part for part in prefix.split(".") if part.isdecimal()), prefix)


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
