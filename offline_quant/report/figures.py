"""Pictures of the report page as PNG bytes. Import this module late: matplotlib is slow to import."""

import io
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Concatenate, ParamSpec

import numpy as np
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from offline_quant.report.schema import LayerPicture

P = ParamSpec("P")

WIDTH_INCHES = 4.8
"""Narrow, so that letters stay readable on a phone."""
LEFT, RIGHT = 0.68, 0.14
DOTS_PER_INCH = 180
COLOUR = {"gate_up": "#2a6f97", "gate": "#2f9e77", "up": "#8e5bb5", "down": "#e07a1f"}
MARKER = {"gate_up": "o", "gate": "^", "up": "v", "down": "s"}
INK, FAINT, ALARM = "#24292f", "#d8dee4", "#c62828"
WIDEST = 8
FEW_LINES = 8
"""Most lines that get a legend; more get a colour bar."""
DRAWN_POINTS = 1_000
"""Most points of one line: about the pixels of a picture's width."""

_RULES = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": "#8c959f",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eaeef2",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
}


def _picture(draw: Callable[Concatenate[Figure, P], None]) -> Callable[P, bytes]:
    """Turn a function that draws on a figure into one that returns a PNG. It ignores the user's matplotlib settings."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> bytes:
        with style.context(["default", _RULES]):
            figure = Figure(dpi=DOTS_PER_INCH, facecolor="white")
            canvas = FigureCanvasAgg(figure)
            draw(figure, *args, **kwargs)
            out = io.BytesIO()
            canvas.print_png(out)
        return out.getvalue()

    return drawn


@_picture
def error_scatter(figure: Figure, points: Mapping[str, NDArray[np.float64]], title: str) -> None:
    """Draw predicted against measured errors.

    Args:
        figure: to draw on.
        points: [n, 2], predicted and measured, by projection. Log axes need at least one point above zero.
        title: of the picture.
    """
    (axes,) = _panels(figure, [4.4])
    shown = {name: p[(p > 0).all(1) & np.isfinite(p).all(1)] for name, p in points.items()}
    everything = np.concatenate([p.ravel() for p in shown.values()])
    axes.set(xscale="log", yscale="log", xlabel="predicted error", ylabel="measured error")
    axes.set_title(title)
    limits = everything.min() / 1.6, everything.max() * 1.6
    axes.plot(limits, limits, color="#8c959f", linewidth=1, linestyle=(0, (4, 3)), label="predicted = measured")
    axes.set(xlim=limits, ylim=limits)
    for name, p in shown.items():
        axes.scatter(
            p[:, 0], p[:, 1], s=30, color=COLOUR[name], marker=MARKER[name], alpha=0.8, edgecolors="white",
            linewidths=0.6, label=name,
        )  # fmt: skip
    narrow = everything.max() / everything.min() < 30
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.legend(loc="upper left")


@_picture
def bit_map(figure: Figure, picture: LayerPicture, title: str) -> None:
    """Draw the bit-width of every block of one layer: a row for each expert, a panel for each projection."""
    names = [name for name in COLOUR if name in picture.bits]
    experts = len(picture.share)
    panel = float(np.clip(0.05 * experts, 0.7, 2.0))
    colours = colormaps["viridis_r"](np.linspace(0.06, 1.0, WIDEST))
    cmap = ListedColormap(["#eceff1", *map(tuple, colours)])
    norm = BoundaryNorm(np.arange(-0.5, WIDEST + 1), cmap.N)
    panels = _panels(figure, [panel] * len(names), below=0.5)
    for axes, name in zip(panels, names, strict=True):
        axes.imshow(picture.bits[name], aspect="auto", cmap=cmap, norm=norm, interpolation="nearest", origin="upper")
        axes.set_title(f"{_plain(title)}, {name}")
        axes.set_ylabel("expert")
        axes.grid(False)
        axes.set_xticks(_ticks(picture.bits[name].shape[1], 9))
        axes.set_yticks(_ticks(experts, 6))
    panels[-1].set_xlabel("block of components")
    bar = figure.colorbar(ScalarMappable(norm, cmap), cax=_strip(figure), orientation="horizontal")
    bar.set_ticks(range(WIDEST + 1), labels=["0 bits", *map(str, range(1, WIDEST + 1))])
    bar.ax.tick_params(length=0)
    bar.ax.grid(False)


@_picture
def spectra(figure: Figure, pictures: Mapping[str, LayerPicture]) -> None:
    """Draw the share of error energy by component: a line for each layer, a panel for each projection.

    Args:
        figure: to draw on.
        pictures: by label of the layer.
    """
    names = [name for name in COLOUR if any(name in p.spectrum for p in pictures.values())]
    depth = colormaps["viridis"](np.linspace(0.0, 0.88, len(pictures)))
    few = len(pictures) <= FEW_LINES
    panels = _panels(figure, [1.6] * len(names), below=0.0 if few else 0.5)
    for axes, name in zip(panels, names, strict=True):
        for (label, picture), colour in zip(pictures.items(), depth, strict=True):
            if name not in picture.spectrum:
                continue
            energy = picture.spectrum[name].astype(float)
            at = np.unique(np.linspace(0, len(energy) - 1, min(len(energy), DRAWN_POINTS)).round().astype(int))
            # A log axis has no place for zero.
            energy = np.where(energy > 0, energy, np.nan)[at]
            marker = "." if len(at) < 3 else None
            axes.plot(
                at,
                energy,
                color=colour,
                linewidth=1.2 if few else 0.7,
                marker=marker,
                label=f"layer {_plain(label)}",
            )
        _log_shares(axes)
        axes.set_title(name)
        axes.set_ylabel("share")
        axes.margins(x=0.01)
        axes.set_xticks(_ticks(max(len(p.spectrum.get(name, ())) for p in pictures.values()), 9))
    panels[-1].set_xlabel("component, the least important first")
    labels = list(pictures)
    if few:
        panels[0].legend(loc="lower right", ncols=2 if len(labels) > 4 else 1, handlelength=1.4)
    else:
        cmap = ListedColormap([tuple(c) for c in depth])
        colours = ScalarMappable(Normalize(0, len(labels) - 1), cmap)
        bar = figure.colorbar(colours, cax=_strip(figure), orientation="horizontal")
        ticks = _ticks(len(labels), 8)
        bar.set_ticks(ticks.tolist(), labels=[f"layer {_plain(labels[0])}", *(_plain(labels[i]) for i in ticks[1:])])
        bar.ax.grid(False)


@_picture
def activation_shares(figure: Figure, pictures: Mapping[str, LayerPicture]) -> None:
    """Draw the share of routed tokens by expert, relative to an even split: bars for one layer, else a map.

    Args:
        figure: to draw on.
        pictures: by label of the layer.
    """
    labels = list(pictures)
    relative = np.full((len(labels), max(len(p.share) for p in pictures.values())), np.nan)
    for row, p in zip(relative, pictures.values(), strict=True):
        row[: len(p.share)] = p.share.astype(float) * len(p.share)
    if len(labels) == 1:
        (axes,) = _panels(figure, [1.7])
        axes.bar(np.arange(relative.shape[1]), relative[0], width=0.85, color=COLOUR["gate_up"])
        for expert in np.flatnonzero(relative[0] == 0):
            axes.axvspan(expert - 0.5, expert + 0.5, color=ALARM, alpha=0.5, linewidth=0)
        axes.axhline(1, color="#8c959f", linewidth=1, linestyle=(0, (4, 3)))
        axes.set(xlabel="expert", ylabel="tokens, even split = 1", title=f"layer {_plain(labels[0])}")
        axes.set_xticks(_ticks(relative.shape[1], 10))
        axes.margins(x=0.02)
        return
    (axes,) = _panels(figure, [float(np.clip(0.13 * len(labels), 0.7, 5))], below=0.5)
    cmap = colormaps["PuOr_r"].with_extremes(bad=ALARM)
    seen = np.where(relative > 0, relative, np.nan)
    # A scale for uneven models would show even ones too pale.
    most = int(np.clip(np.ceil(np.abs(np.log2(relative[relative > 0])).max(initial=1)), 1, 3))
    norm = LogNorm(2.0**-most, 2.0**most)
    axes.imshow(seen, aspect="auto", cmap=cmap, norm=norm, interpolation="nearest")
    if (absent := np.isnan(relative)).any():  # layers of fewer experts
        blank = np.ma.masked_where(~absent, absent)
        axes.imshow(blank, aspect="auto", cmap=ListedColormap(["white"]), interpolation="nearest")
    axes.grid(False)
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_xticks(_ticks(relative.shape[1], 10))
    ticks = _ticks(len(labels), 8)
    axes.set_yticks(ticks, [_plain(labels[i]) for i in ticks])
    bar = figure.colorbar(ScalarMappable(norm, cmap), cax=_strip(figure), orientation="horizontal", extend="both")
    names = {-3: "1/8", -2: "1/4", -1: "1/2", 0: "even", 1: "2x", 2: "4x", 3: "8x"}
    bar.set_ticks([2.0**p for p in range(-most, most + 1)], labels=[names[p] for p in range(-most, most + 1)])
    bar.ax.minorticks_off()
    bar.ax.grid(False)


@_picture
def width_bars(figure: Figure, weights: Mapping[str, Mapping[int, int]]) -> None:
    """Draw the share of all factor entries at each bit-width.

    Args:
        figure: to draw on.
        weights: entries by bit-width, by projection.
    """
    (axes,) = _panels(figure, [1.9])
    total = max(1, sum(sum(w.values()) for w in weights.values()))
    base = np.zeros(WIDEST + 1)
    for name, counts in weights.items():
        height = np.array([100 * counts.get(width, 0) / total for width in range(WIDEST + 1)])
        axes.bar(
            range(WIDEST + 1), height, bottom=base, width=0.8, color=COLOUR[name], label=name, edgecolor="white",
            linewidth=0.6,
        )  # fmt: skip
        base = base + height
    for width, whole in enumerate(base.tolist()):
        if whole > 0:
            axes.annotate(
                f"{whole:.0f}%" if whole >= 1 else "<1%", (width, whole), (0, 2), textcoords="offset points",
                ha="center", fontsize=8,
            )  # fmt: skip
    axes.set(xlabel="bits", ylabel="% of entries", xticks=range(WIDEST + 1))
    axes.set_ylim(0, max(1.0, 1.14 * base.max()))
    axes.grid(False, axis="x")
    axes.legend(ncols=len(weights), loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)


def _panels(figure: Figure, heights: list[float], below: float = 0.0) -> list[Axes]:
    """Make panels in one column, at places in inches: the layout engines of matplotlib are slow.

    Args:
        figure: to set up; receives its size.
        heights: of the panels, in inches.
        below: room for a colour bar under all of them, in inches.
    """
    title, ticks, label = 0.3, 0.26, 0.22
    total = sum(heights) + len(heights) * (title + ticks) + label + below
    figure.set_size_inches(WIDTH_INCHES, total)
    top, width, panels = total, WIDTH_INCHES - LEFT - RIGHT, []
    for height in heights:
        top -= title + height
        axes = figure.add_axes((LEFT / WIDTH_INCHES, top / total, width / WIDTH_INCHES, height / total))
        axes.yaxis.set_label_coords(-0.46 / width, 0.5)
        panels.append(axes)
        top -= ticks
    return panels


def _strip(figure: Figure) -> Axes:
    """Axes for a colour bar, in the room that `_panels` left."""
    height = figure.get_figheight()
    return figure.add_axes((LEFT / WIDTH_INCHES, 0.28 / height, 1 - (LEFT + RIGHT) / WIDTH_INCHES, 0.12 / height))


def _plain(text: str) -> str:
    """A short label, escaped so that matplotlib does not read a formula."""
    return (text if len(text) <= 8 else f"...{text[-6:]}").replace("$", r"\$")


def _ticks(count: int, most: int) -> NDArray[np.int64]:
    """Ticks from 0 to count - 1 in round steps, `most` or fewer."""
    step = next(s for power in range(12) for s in (10**power, 2 * 10**power, 5 * 10**power) if s * most >= count)
    return np.arange(0, count, step)


def _log_shares(axes: Axes) -> None:
    lines = [line.get_ydata(orig=True) for line in axes.lines]
    drawn = np.concatenate([np.asarray(y, dtype=float) for y in lines]) if lines else np.zeros(0)
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) == 0:
        axes.text(0.5, 0.5, "no error energy at all", transform=axes.transAxes, ha="center", va="center")
        axes.set_yticks([])
        return
    axes.set_yscale("log")
    # Shares below the resolution of float32, relative to the largest, are noise.
    axes.set_ylim(max(drawn.min() / 1.5, drawn.max() * 1e-8), drawn.max() * 1.5)
    axes.yaxis.set_minor_formatter(NullFormatter())
