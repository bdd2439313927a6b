"""`report.html`: decisions and results of a run, for people. One file with its pictures inside."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmoe_kernels.format.schema import PROJECTION_NAMES
from offline_quant.evaluation.sanity import SanityVerdict
from offline_quant.report.rank_correlation import spearman
from offline_quant.report.schema import LayerPicture, LayerReport, ModelReport

MOST_MAPS = 8
"""Most layers whose bits are drawn. Of more layers, as many are drawn, evenly spaced."""
NOTHING = "\N{EN DASH}"


def write_page(
    path: Path,
    report: ModelReport,
    pictures: Mapping[str, LayerPicture],
    seconds: Mapping[str, float],
    peak_bytes: Mapping[str, int],
) -> None:
    """Write the report of a run as one self-contained HTML file: no scripts, nothing fetched.

    Args:
        path: file to write.
        report: of the run.
        pictures: of every layer, by its tensor prefix.
        seconds: wall time by stage.
        peak_bytes: largest memory by the end of each stage.
    """
    sections = [
        _summary(report),
        _sanity(report.sanity),
        _expectation(report),
        _layers(report),
        _errors(report),
        _bit_maps(pictures),
        _spectra(pictures),
        _shares(pictures),
        _widths(report.layers),
        _stages(seconds, peak_bytes),
        _options(report.options),
    ]
    path.write_text(_HEAD + "\n".join(filter(None, sections)) + "\n</main>\n</body>\n</html>\n", encoding="utf-8")


# ---- sections in the order of the page; empty text where there is nothing to show. They import figures late ----


def _summary(report: ModelReport) -> str:
    options = report.options
    size, before = report.expert_bytes, 2 * report.expert_weights
    facts = [
        f"<strong>{report.bpw:.4f} bits per weight</strong> all-in (codes, scales, metadata, basis)",
        f"experts of {_bytes(size)}, {before / max(size, 1):.1f}x smaller than at 16 bits",
        f"objective <strong>{_text(options.get('objective', NOTHING))}</strong>",
        f"calibrated on {report.calibration_tokens:,} tokens of {_text(options.get('calib', NOTHING))}",
    ]
    if report.dense_layers is not None:
        facts.append(_text(report.dense_layers))
    if report.model_tuning is not None:
        facts.append(_text(report.model_tuning))
    if report.model_budget is not None:
        gap = _percent(report.model_budget.solver_gap)
        facts.append(f"one budget for the model, proven within {gap} of the optimum")
    return f"<h1>Quantization report</h1>\n<p>{'; '.join(facts)}.</p>"


def _sanity(sanity: SanityVerdict | None) -> str:
    if sanity is None:
        return '<p class="note">Plan only: nothing was quantized, so nothing was measured.</p>'
    perplexity = sanity.perplexity_quantized
    figures = (
        f"perplexity {'infinite' if perplexity is None else f'{perplexity:.4g}'}, the original's "
        f"{sanity.perplexity_original:.4g}; likeliest token at "
        f"{_percent(sanity.likeliest_token_share_quantized)} of positions, the original's at "
        f"{_percent(sanity.likeliest_token_share_original)} ({sanity.tokens:,} tokens of calibration text)"
    )
    if not sanity.degenerate:
        return f'<p class="good"><strong>Sanity gate passed</strong>: {figures}.</p>'
    faults = "".join(f"<li>{_text(fault)}</li>" for fault in sanity.faults)
    advice = f"<p><strong>What to do:</strong> {_text(sanity.advice)}.</p>" if sanity.advice else ""
    return (
        f'<div class="bad"><strong>This model is broken. Do not use it.</strong>\n<ul>{faults}</ul>\n'
        f"{advice}\n<p>Measured: {figures}.</p></div>"
    )


def _expectation(report: ModelReport) -> str:
    lines = report.expectation()
    return f"<p>{_text('. '.join(lines))}.</p>" if lines else ""


def _layers(report: ModelReport) -> str:
    layers = report.layers
    # Losses of other objectives are in units of their own.
    predicts = any(row.predicted_error_by_projection is not None for row in layers)
    head = ["layer", "basis", "bpw", "predicted error" if predicts else "objective's loss", "measured error"]
    head += ["output error", "solver gap", "tokens per expert", "unseen experts"]
    sensitivity = report.model_budget.sensitivity if report.model_budget else {}
    ranked = any(row.compensator_ranks is not None for row in layers)
    head += ["sensitivity"] * bool(sensitivity) + ["compensator ranks"] * ranked
    rows = []
    for row in layers:
        cells = [
            _number_of(row.layer),
            _basis(row),
            f"{row.bpw:.4f}",
            *map(_number, (row.predicted_error, row.measured_error, row.output_error)),
            _percent(row.solver_gap),
            _span(row.tokens_per_expert.min, row.tokens_per_expert.max),
            _few(row.unseen_experts),
        ]
        if sensitivity:
            cells.append(_number(sensitivity.get(row.layer)))
        if ranked:
            ranks = row.compensator_ranks or [0]
            cells.append(f"{_span(min(ranks), max(ranks))}, mean {sum(ranks) / len(ranks):.1f}")
        rows.append(cells)
    note = (
        "Errors are relative to the energy of each projection's output (sums over the projections) and of the routed "
        "experts' output; the gap is how far the chosen bits can be from the best ones."
    )
    return f'<h2>Layers</h2>\n{_table(head, rows)}\n<p class="note">{note}</p>'


def _basis(layer: LayerReport) -> str:
    """A layer's form, with the ranks of its shared bases."""
    ranks = layer.basis_ranks()
    return f"{layer.basis}, rank {ranks}" if ranks else layer.basis


def _errors(report: ModelReport) -> str:
    from offline_quant.report.figures import error_scatter

    measured = [
        (row.predicted_error_by_projection or {}, row.measured_error_by_projection)
        for row in report.layers
        if row.measured_error_by_projection is not None
    ]
    if not measured:
        return ""
    points: dict[str, NDArray[np.float64]] = {}
    for name in PROJECTION_NAMES:
        pairs = [(predicted[name], error[name]) for predicted, error in measured if name in predicted and name in error]
        if pairs:
            points[name] = np.array(pairs, dtype=np.float64)
    title = "Predicted against measured error"
    if not points:
        return _section(title, "<p>This objective predicts no error of a projection.</p>")
    together = np.concatenate(list(points.values()))
    ranked = together[np.isfinite(together).all(1)]
    correlation = spearman(ranked[:, 0], ranked[:, 1])
    said = "undefined" if correlation is None else f"{correlation:.3f}"
    said = f"{_count(len(ranked), 'point')}, Spearman {said}"
    shown = int((ranked > 0).all(1).sum())
    caption = (
        "One point per layer and projection. Trust the plan where points rise along the dashed line: a correlation "
        "near 1 means that bits went where they count."
    )
    hidden = f"{_count(len(together) - shown, 'point')} of zero or infinite error cannot be drawn."
    if not shown:
        return _section(f"{title}: {said}", f"<p>{hidden}</p>")
    if shown < len(together):
        caption += " " + hidden
    return _section(f"{title}: {said}", _figure(error_scatter(points, said), caption))


def _bit_maps(pictures: Mapping[str, LayerPicture]) -> str:
    from offline_quant.report.figures import bit_map

    prefixes = list(pictures)
    if len(prefixes) > MOST_MAPS:
        prefixes = [prefixes[round(i)] for i in np.linspace(0, len(pictures) - 1, MOST_MAPS)]
    caption = "One row per expert; dark is many bits, light is few, grey is none. " + (
        "Every matrix has one width, so rows are of one colour: dark ones are the experts this objective favours."
        if _one_width_each(pictures)
        else "The most important blocks are at the right: bits should gather there, and in experts that matter more."
    )
    drawn = []
    for prefix in prefixes:
        label = f"layer {_number_of(prefix)}"
        drawn.append(_figure(bit_map(pictures[prefix], label), f"{label.capitalize()}. {caption}"))
        caption = "As above."
    few = f" {len(prefixes)} of {len(pictures)} layers, evenly spaced." if len(prefixes) < len(pictures) else ""
    return _section("Where the bits went", f"<p>Experts by blocks of components.{few}</p>" + _grid(drawn))


def _one_width_each(pictures: Mapping[str, LayerPicture]) -> bool:
    return all((bits == bits[:, :1]).all() for picture in pictures.values() for bits in picture.bits.values())


def _spectra(pictures: Mapping[str, LayerPicture]) -> str:
    from offline_quant.report.figures import spectra

    caption = (
        "What dropping a component would cost, as a share of all, mean over experts. The steeper a line, the more "
        "there is to gain from unequal bits; flat lines leave nothing."
    )
    return _section("Spectra", _figure(spectra(_by_number(pictures)), caption))


def _shares(pictures: Mapping[str, LayerPicture]) -> str:
    from offline_quant.report.figures import activation_shares

    caption = (
        "Tokens routed to each expert, relative to an even split. Red experts saw no calibration token and were "
        "quantized from pooled statistics: more or other calibration text helps if there are many."
    )
    return _section("Activation shares", _figure(activation_shares(_by_number(pictures)), caption))


def _widths(layers: Sequence[LayerReport]) -> str:
    from offline_quant.report.figures import width_bars

    weights: dict[str, dict[int, int]] = {}
    for name in PROJECTION_NAMES:
        for row in layers:
            for width, count in row.weights_by_width.get(name, {}).items():
                mine = weights.setdefault(name, {})
                mine[int(width)] = mine.get(int(width), 0) + count
    total = sum(sum(counts.values()) for counts in weights.values())
    caption = (
        f"All {total:,} entries of the factors by the width of their codes. Unequal importance spreads them out; "
        "those at 0 bits are dropped for the sake of the others. Components of a shared basis that no expert gives "
        "bits are counted here and not stored: bitsmoe inspect, which counts what is stored, then shows fewer at 0."
    )
    return _section("Weights by width", _figure(width_bars(weights), caption))


def _stages(seconds: Mapping[str, float], peak_bytes: Mapping[str, int]) -> str:
    total = sum(seconds.values())
    rows = []
    for stage in dict.fromkeys((*seconds, *peak_bytes)):
        spent, peak = seconds.get(stage), peak_bytes.get(stage)
        time = (NOTHING, NOTHING) if spent is None else (f"{spent:.1f} s", f"{spent / max(total, 1e-9):.0%}")
        rows.append([stage, *time, NOTHING if peak is None else _bytes(peak)])
    if rows:
        rows.append(["all", f"{total:.1f} s", "", _bytes(max(peak_bytes.values())) if peak_bytes else NOTHING])
    note = '<p class="note">Memory is the largest the process had held by the end of the stage.</p>'
    return _section("Time and memory", _table(["stage", "time", "share", "peak memory"], rows) + "\n" + note)


def _options(options: Mapping[str, Any]) -> str:
    rows = [[key, _value(value)] for key, value in options.items()]
    return _section("Options", _table(["option", "value"], rows, "words"))


# ---- pieces of HTML; arguments are plain text, except those named html ----


def _section(title: str, html: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{html}"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], style: str = "wide") -> str:
    def line(tag: str, cells: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f'<div class="{style}"><table>\n<thead>{line("th", head)}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _figure(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    said = _text(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{said}">\n<figcaption>{said}</figcaption></figure>'


def _grid(html: Sequence[str]) -> str:
    return '<div class="grid">\n' + "\n".join(html) + "\n</div>"


def _text(value: object) -> str:
    return escape(str(value), quote=True)


# ---- numbers for people ----


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


def _percent(value: float) -> str:
    return "<0.001%" if 0 < value < 1e-5 else f"{100 * value:.3g}%"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.2f} GB"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,}{NOTHING}{high:,}"


def _few(experts: Sequence[int]) -> str:
    """The number of experts; which ones, too, for up to six."""
    if not experts:
        return "none"
    return str(len(experts)) + (f" ({', '.join(map(str, experts))})" if len(experts) <= 6 else "")


def _value(value: object) -> str:
    if value is None:
        return "by default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _number_of(prefix: str) -> str:
    """Number of the decoder layer. The page has no room for whole tensor prefixes."""
    return next((part for part in prefix.split(".") if part.isdecimal()), prefix)


def _by_number(pictures: Mapping[str, LayerPicture]) -> dict[str, LayerPicture]:
    by_number = {_number_of(prefix): picture for prefix, picture in pictures.items()}
    return by_number if len(by_number) == len(pictures) else dict(pictures)


_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Quantization report</title>
<style>
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #24292f; font: 16px/1.5 system-ui, -apple-system, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.2rem 0 0.6rem; padding-top: 0.9rem; border-top: 1px solid #d8dee4; }
p { margin: 0.5rem 0; max-width: 46rem; }
.good, .bad { padding: 0.7rem 1rem; border-left: 5px solid; border-radius: 4px; max-width: 46rem; }
.good { background: #e6f4ea; border-color: #1e8e3e; color: #0d4a1f; }
.bad { background: #c62828; border-color: #7f0000; color: #fff; }
.bad ul { margin: 0.4rem 0; padding-left: 1.3rem; }
.note, figcaption { color: #57606a; font-size: 0.88rem; }
.wide, .words { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.28rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eaeef2; }
th { border-bottom: 2px solid #8c959f; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
tbody tr:nth-child(even) { background: #f6f8fa; }
figure { margin: 0.6rem 0; max-width: 38rem; }
img { display: block; width: 100%; height: auto; }
.grid { display: flex; flex-wrap: wrap; gap: 0.5rem 2rem; }
.grid figure { flex: 1 1 26rem; min-width: 0; }
</style>
</head>
<body>
<main>
"""
