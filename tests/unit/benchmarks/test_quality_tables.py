"""Tables and picture of the quality benchmark."""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality, quality_summary
from benchmarks.quality import GROUPS, Row, as_markdown, draw
from builders import REPO


def measured(row: Row, **found: Any) -> dict[str, Any]:
    """A row as a run leaves it."""
    run = {"seconds": 3.0, "cpu_seconds": 4.0, "peak_bytes": 5e8, "threads": 1, "layers": []}
    figures = {"bpw": row.bits, "kl": 0.01, "excess": 0.5, "top1_agreement": 0.9, "perplexity_reference": 40.0}
    return {
        "key": row.key, "label": row.label, "method": row.method, "bits": row.bits, "seed": row.seed,
        "options": row.options, "run": run, "tokens": 1000, "commit": "abc", **figures, **found,
    }  # fmt: skip


def result(*rows: dict[str, Any]) -> dict[str, Any]:
    on = {"cpu": "a processor", "torch": "2"}
    named = {"model": "some_moe", "text": "text", "calibration": "calib"}
    return json.loads(json.dumps({**named, "environment": on, "rows": rows}))


def cells(text: str, group: str) -> list[list[str]]:
    table = text.split(f"## {group}\n\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_threads_of_every_row_are_named():
    one, two = (measured(row) for row in GROUPS["forms"][:2])
    assert "on 1 thread(s)" in as_markdown(result(one, two))
    two["run"]["threads"] = 2
    assert "on 1 or 2 thread(s)" in as_markdown(result(one, two))


def test_figures_stand_with_their_standard_errors_where_there_are_any():
    ours, other = GROUPS["forms"][0], next(r for r in GROUPS["forms"] if r.label == "--basis natural")
    errors = {"kl_stderr": 0.00012, "excess_stderr": 0.031, "top1_agreement_stderr": 0.0007}
    found = cells(as_markdown(result(measured(ours), measured(other, kl=0.0123, **errors))), "forms")
    assert found[2][:5] == ["bitsmoe", "2.125", "0.01000", "0.500", "0.9000"]
    assert found[3][:5] == ["--basis natural", "2.125", "0.01230 ± 0.00012", "0.500 ± 0.031", "0.9000 ± 0.0007"]


def test_forms_are_compared_draw_by_draw():
    rows = [r for r in GROUPS["seeds"] if r.bits == 2.5 and r.label in ("bitsmoe", "--basis natural")]
    excess = {"bitsmoe": [0.3, 0.4, 0.5, 0.6, 0.7], "--basis natural": [0.2, 0.1, 0.4, 0.4, 0.5]}
    rows = [r for r in rows if r != rows[-1]]  # the last draw of the other form is not there yet
    found = cells(as_markdown(result(*(measured(r, excess=excess[r.label][r.seed]) for r in rows))), "seeds")
    assert found[2][5:] == [f"{0.5:.3f}", f"{statistics.stdev(excess['bitsmoe']):.3f}", ""]
    above = [-0.1, -0.3, -0.1, -0.2]
    error = math.sqrt(sum((x + 0.175) ** 2 for x in above) / 3 / 4)
    assert found[3][2] == "4"
    assert found[3][-1] == f"-0.175 ± {error:.3f}"


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ("--bits 2.125 --match bitsmoe$", ["bitsmoe"]),
        ("--bits 2.125 2 --match tune$ strongest", ["bitsmoe --tune", "GPTQ g128, its strongest settings"]),
        ("--methods rtn hqq --bits 2", ["HQQ g64", "round-to-nearest g128"]),
    ],
)
def test_rows_are_chosen_by_method_bits_and_label(options: str, labels: list[str]):
    parser = argparse.ArgumentParser()
    quality.add_row_options(parser, GROUPS)
    args = parser.parse_args(["--rows", "main", *options.split()])
    assert [row.label for row in quality.wanted_rows(args, GROUPS)] == labels


@pytest.mark.slow
def test_types_of_one_kind_are_one_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [r for r in GROUPS["main"] if r.method == "gguf" or (r.method == "bitsmoe" and not r.options)]
    drawn = {}

    def saved(figure: Any, path: Path, **_: Any) -> None:
        drawn[path] = {line.get_label(): len(line.get_xdata()) for line in figure.axes[0].get_lines()}

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", saved)
    draw(result(*(measured(r) for r in rows)), tmp_path / "a.png")
    lattices = sum(kind.startswith("IQ") for kind in quality.GGUF_TYPES)
    expected = {"bitsmoe": len(quality.BITS), quality.GGUF: lattices, "GGUF Q2_K, importance matrix": 1}
    assert drawn == {tmp_path / "a.png": expected}


@pytest.mark.parametrize(("page", "short"), [("docs/results.md", False), ("README.md", True)])
def test_pages_have_the_tables_of_the_committed_results(page: str, short: bool):
    """`python -m benchmarks.quality_summary [--short]` prints them."""
    assert quality_summary.table(short=short) in (REPO / page).read_text(encoding="utf-8")
