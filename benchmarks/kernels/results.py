"""The file of results: kept after every row, continued by the next run, shown as a table and a picture."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import record

SAME = ("gpu", "torch", "triton")
"""A row of an earlier run holds where these and its own `source` are as they are now."""
KEY = ("model", "method", "dtype", "bits", "tokens", "routing", "source")


def machine() -> dict[str, Any]:
    """What the figures are measured on."""
    import triton

    found: dict[str, Any] = {
        "gpu": platform.machine(), "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
        "commit": record.commit() or "unknown",
    }  # fmt: skip
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        asked = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
        said = record.said_by("nvidia-smi", "--id=0", f"--query-gpu={','.join(asked)}", "--format=csv,noheader")
        values = [v.strip() for v in said.split(",")] if said else ["unknown"] * len(asked)
        found |= {
            "gpu": p.name, "capability": f"{p.major}.{p.minor}", "sms": p.multi_processor_count,
            "memory_bytes": p.total_memory, "l2_bytes": p.L2_cache_size, **dict(zip(asked, values, strict=True)),
        }  # fmt: skip
    return found


def slug(gpu: str) -> str:
    """A GPU's name for file names: `NVIDIA H200` becomes `h200`."""
    return gpu.lower().replace("nvidia", "").strip().replace(" ", "-")


class Results:
    """Rows of one GPU in a JSON file.

    Args:
        path: of the file; made with the first row.
        header: `machine` and whether this is a rehearsal.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], current: Mapping[str, str]):
        self.path = path
        self.data: dict[str, Any] = {**header, "rows": [], "not_measured": []}
        if path.is_file():
            old = json.loads(path.read_text(encoding="utf-8"))
            if all(old["machine"].get(k) == header["machine"].get(k) for k in SAME):
                self.data["rows"] = [r for r in old["rows"] if current.get(r["method"]) == r["source"]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows."""
        return self.data["rows"]

    def done(self) -> set[tuple[Any, ...]]:
        """Keys of all rows."""
        return {tuple(r[k] for k in KEY) for r in self.rows}

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row; one of the same key goes."""
        key = [row[k] for k in KEY]
        row = {**row, "commit": self.data["machine"]["commit"]}
        self.data["rows"] = [r for r in self.rows if [r[k] for k in KEY] != key] + [row]
        self.save()

    def miss(self, method: str, models: Sequence[str], reason: str) -> None:
        """Keep why a method has no rows."""
        self.data["not_measured"].append({"method": method, "models": list(models), "reason": reason})
        self.save()

    def save(self) -> None:
        """Write the file."""
        record.write_json(self.path, self.data)


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"  # noqa: RUF001 - a dash


def _by_model(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    out: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in rows:
        out.setdefault((r["model"], r["routing"], r["dtype"]), []).append(r)
    return out


def as_markdown(data: Mapping[str, Any]) -> str:
    """Tables of times, what they say about the bars, and what was not measured."""
    m = data["machine"]
    lines = ["# Time of one MoE layer, microseconds", ""]
    if data["rehearsal"]:
        lines += ["**Rehearsal under Triton's interpreter on a CPU: nothing was timed.**", ""]
    lines += [f"{m['gpu']}, torch {m['torch']}, Triton {m['triton']}, commit {m['commit']}.", ""]
    lines += [
        "In brackets the share of the GPU's measured copy bandwidth: bytes the call cannot avoid moving over its time.",
        "Every method computes the whole layer from tokens and routing to its output; a basis is part of it.", "",
    ]  # fmt: skip
    for (model, routing, dtype), rows in _by_model(data["rows"]).items():
        methods = list(dict.fromkeys(r["method"] for r in rows))
        lines += [f"## {model}, {routing} routing, {dtype}", ""]
        bpw = {r["method"]: r["bits_per_weight"] for r in rows}
        lines += ["| tokens | " + " | ".join(f"{n} ({bpw[n]:.2f} bits)" for n in methods) + " |"]
        lines += ["|" + " --- |" * (len(methods) + 1)]
        at = {(r["tokens"], r["method"]): r for r in rows}
        for tokens in sorted({r["tokens"] for r in rows}):
            cells = []
            for name in methods:
                r = at.get((tokens, name))
                share = "" if r is None or r["share"] is None else f" ({100 * r['share']:.0f}%)"
                cells.append("–" if r is None else _number(r["microseconds"]) + share)  # noqa: RUF001
            lines.append(f"| {tokens} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += _splits(data["rows"]) + _bars(data["rows"]) + _noise(data["rows"])
    if data["not_measured"]:
        lines += ["## Not measured", ""]
        lines += [f"- {n['method']} ({', '.join(n['models'])}): {n['reason']}" for n in data["not_measured"]] + [""]
    return "\n".join(lines)


def _splits(rows: Sequence[dict[str, Any]]) -> list[str]:
    having = [r for r in rows if r["split"] and r["routing"] == "realistic"]
    if not having:
        return []
    names = list(dict.fromkeys(k for r in having for k in r["split"]))
    lines = ["## Where bitsmoe's time goes, microseconds of each kernel, realistic routing", ""]
    lines += ["| model | form | tokens | " + " | ".join(names) + " |", "|" + " --- |" * (len(names) + 3)]
    for r in having:
        cells = " | ".join(_number(r["split"].get(n)) for n in names)
        lines.append(f"| {r['model']} | {r['method']} | {r['tokens']} | {cells} |")
    return [*lines, ""]


def _bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Ratios to the 4-bit and 2-bit kernels of others on the model the bars are set for."""
    from benchmarks.kernels.shapes import SHAPES

    timed = {
        (r["method"], r["routing"], r["tokens"]): r
        for r in rows
        if r["model"] == SHAPES[0].model and r["microseconds"] is not None
    }
    ours = "bitsmoe, whitened basis"
    lines = []
    for other, bar in (("4-bit g128, GPTQ-Marlin", 1.5), ("2-bit g128, Humming", 1.0)):
        for routing in ("realistic", "uniform"):
            ratios = {
                t: timed[other, routing, t]["microseconds"] / timed[ours, routing, t]["microseconds"]
                for t in (8, 16, 32, 64, 128, 256)
                if (other, routing, t) in timed and (ours, routing, t) in timed
            }
            if ratios:
                shown = ", ".join(f"{t}: {v:.2f}" for t, v in ratios.items())
                lines.append(f"- times faster than {other}, {routing}, bar {bar} at 8 to 256 tokens: {shown}")
    for routing in ("realistic", "uniform"):
        if (row := timed.get((ours, routing, 64))) is not None:
            lines.append(f"- share of copy bandwidth at 64 tokens, {routing}, bar 70%: {100 * row['share']:.0f}%")
    return [f"## Bars, {SHAPES[0].model}, basis included", "", *lines, ""] if lines else []


def _noise(rows: Sequence[dict[str, Any]]) -> list[str]:
    apart = [abs(math.log(r["again"] / r["microseconds"])) for r in rows if r["again"]]
    if not apart:
        return []
    apart.sort()
    median, worst = (100 * math.expm1(v) for v in (apart[len(apart) // 2], apart[-1]))
    return [
        f"The same calls captured and timed a second time differ by {median:.1f}% (median), {worst:.1f}% (most).",
        "",
    ]


def draw(data: Mapping[str, Any], path: Path) -> None:
    """Time and share of copy bandwidth against tokens, realistic routing, one column for each model.

    Nothing is drawn where nothing was timed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in data["rows"] if r["routing"] == "realistic" and r["microseconds"] is not None]
    models = list(dict.fromkeys(r["model"] for r in rows))
    if not models:
        return
    methods = list(dict.fromkeys(r["method"] for r in rows))
    figure, axes = plt.subplots(2, len(models), figsize=(4.2 * len(models), 7), squeeze=False, layout="constrained")
    for column, model in enumerate(models):
        for number, method in enumerate(methods):
            mine = sorted((r for r in rows if (r["model"], r["method"]) == (model, method)), key=lambda r: r["tokens"])
            for row, name in enumerate(("microseconds", "share")):
                axes[row, column].plot(
                    [r["tokens"] for r in mine], [r[name] for r in mine], marker="o", markersize=3, label=method,
                    color=f"C{number}", linewidth=1.8 if method.startswith("bitsmoe") else 1.1,
                )  # fmt: skip
        axes[0, column].set(title=model, yscale="log", ylabel="microseconds for a layer")
        axes[1, column].set(xlabel="tokens", ylabel="share of copy bandwidth", ylim=(0, 1.05))
        for row in range(2):
            axes[row, column].set_xscale("log", base=2)
            axes[row, column].grid(True, which="both", alpha=0.25)
    axes[0, 0].legend(frameon=False, fontsize=7)
    figure.suptitle(f"{data['machine']['gpu']}, realistic routing")
    figure.savefig(path, dpi=130)
    plt.close(figure)
