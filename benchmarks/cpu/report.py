"""Tables and the picture of what was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitsmoe_kernels._cpu.library import INSTRUCTION_SETS

LAYER_FILE, SERVING_FILE = "cpu-layer.json", "cpu-serving.json"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(r) + " |" for r in rows)]


def machine_line(machine: Mapping[str, Any]) -> str:
    """Where figures come from, in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['processor']}, {machine['threads']} threads; {versions}; commit {machine['commit']}."


def _once(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the medians do not hold for: rivals that had one turn only."""
    names = [r["rival"] for r in rows if r["rounds"] == 1]
    return f", but one only of {', '.join(names)}" if names else ""


def layer_tables(data: Mapping[str, Any]) -> str:
    """Microseconds of a layer and token, one table for each layer and number of tokens, as Markdown."""
    lines = [machine_line(data["machine"]), ""]
    groups = dict.fromkeys((r["model"], r["tokens"]) for r in data["rows"])
    for model, tokens in groups:
        rows = [r for r in data["rows"] if (r["model"], r["tokens"]) == (model, tokens)]
        what = "one token at a time" if tokens == 1 else f"{tokens} tokens at once"
        lines += [f"### {model}, {what}", ""]
        lines += _table(
            ["", "bits per weight", "µs a layer and token", "least", "MB a token", "of read bandwidth", "times Q2_K",
             "times 16 bits"],
            [
                [
                    r["rival"], f"{r['bits_per_weight']:.3f}", _number(r["microseconds"], 1), _number(r["least"], 1),
                    _number(r["bytes_per_token"] / 1e6, 2), f"{100 * r['bandwidth_share']:.0f}%",
                    _number(r["times_q2_k"], 2), _number(r["times_16_bits"], 2),
                ]
                for r in rows
            ],
        )  # fmt: skip
        read = rows[0]["read_bytes_per_second"] / 1e9
        lines += [
            "",
            f"Medians of {max(r['rounds'] for r in rows)} rounds{_once(rows)}. Read bandwidth: {read:.1f} GB/s.",
            "",
        ]
    if data["not_measured"]:
        lines += [f"Not measured: {name}: {reason}." for name, reason in data["not_measured"].items()] + [""]
    return "\n".join(lines)


GROUPS = (
    ("bitsmoe natural", "C0", "o"), ("bitsmoe 8-bit basis", "C1", "s"), ("llama.cpp", "C2", "^"), ("vLLM", "C3", "D"),
)  # fmt: skip
"""Beginnings of rivals' names, with how they are drawn."""


def draw_layer(data: Mapping[str, Any], path: Path) -> None:
    """Time of a layer against bits per weight: a row for each layer, a column for each number of tokens.

    Of our kernels those with the best instruction set. Without the torch reference, which is far slower than the rest.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    isas = tuple(f", {isa}" for isa in INSTRUCTION_SETS)
    shown = [r for r in data["rows"] if not r["rival"].endswith(isas)]
    models, tokens = (list(dict.fromkeys(r[key] for r in shown)) for key in ("model", "tokens"))
    figure, axes = plt.subplots(
        len(models), len(tokens), figsize=(3.6 * len(tokens), 3.4 * len(models)), squeeze=False, layout="constrained"
    )
    for line, model in enumerate(models):
        for column, count in enumerate(tokens):
            axis = axes[line, column]
            for group, color, marker in GROUPS:
                mine = [
                    (r["bits_per_weight"], r["microseconds"], r["rival"].removeprefix(group).strip(" ,"))
                    for r in shown if (r["model"], r["tokens"]) == (model, count) and r["rival"].startswith(group)
                ]  # fmt: skip
                if not mine:
                    continue
                bits, times, names = zip(*sorted(mine), strict=True)
                ours = group.startswith("bitsmoe")
                axis.plot(
                    bits,
                    times,
                    linestyle="-" if ours else "none",
                    marker=marker,
                    color=color,
                    markersize=5,
                    label=group,
                )
                for at, name in zip(zip(bits, times, strict=True), names if not ours else (), strict=False):
                    axis.annotate(name, at, textcoords="offset points", xytext=(4, 3), fontsize=6)
            axis.set(xscale="log", yscale="log", title=f"{model}, {count} token{'s' if count > 1 else ''}")
            axis.set_xticks([2, 3, 4, 8, 16], ["2", "3", "4", "8", "16"])
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(True, alpha=0.25)
        axes[line, 0].set_ylabel("microseconds a layer and token")
    for axis in axes[-1]:
        axis.set_xlabel("bits per weight, all included")
    axes[0, 0].legend(frameon=False, fontsize=7)
    machine = data["machine"]
    figure.suptitle(f"{machine['processor']}, {machine['threads']} threads", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _held_over_stored(row: Mapping[str, Any], plain: Mapping[str, Any]) -> float | None:
    """Memory that the experts take in a server, over their bytes in the file.

    All but the experts takes what it takes in the server of the 16-bit model, `plain`, where experts are their bytes.
    """
    if "resident_bytes" not in plain or row.get("expert_bytes") is None or row["dense_bits"] != 16:
        return None
    others: int = plain["resident_bytes"] - plain["expert_bytes"]
    held: float = (row["resident_bytes"] - others) / row["expert_bytes"]
    return held


def serving_table(data: Mapping[str, Any]) -> str:
    """Tokens per second, one table for each model, as Markdown."""
    lines = [machine_line(data["machine"]), ""]
    for model in dict.fromkeys(r["model"] for r in data["rows"]):
        rows = [r for r in data["rows"] if r["model"] == model]
        plain_row: dict[str, Any] = next((r for r in rows if r["method"].endswith("16-bit")), {})
        plain = plain_row.get("tokens_per_second", {})
        batches = list(dict.fromkeys(b for r in rows for b in r.get("tokens_per_second", {})))
        lines += [f"### {model}, {data['layers'][model]} layers, {data['vocabulary']} words", ""]
        body = []
        for r in rows:
            rates = r.get("tokens_per_second", {})
            cells = [r["method"], _number(r.get("bits_per_weight"), 3)]
            for b in batches:
                times = rates[b]["median"] / plain[b]["median"] if b in rates and b in plain else None
                cells += [_number(rates[b]["median"] if b in rates else None, 1), _number(times, 2)]
            cells += [_number(r["resident_bytes"] / 1e9 if "resident_bytes" in r else None, 2)]
            cells += [_number(_held_over_stored(r, plain_row), 3)]
            body.append(cells)
        head = [cell for b in batches for cell in (f"tokens/s, {b} at a time", "times 16 bits")]
        head += ["server's memory, GB", "experts in it, over the file's"]
        lines += [*_table(["", "bits per weight", *head], body), ""]
    lines += [
        f"Failed: {r['model']}, {r['method']}: {r['failed'].splitlines()[-1]}" for r in data["rows"] if "failed" in r
    ]
    return "\n".join(lines)
