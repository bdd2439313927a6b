"""The report page: everything a run decided is on it, it says so in red when the model is broken, and it survives."""

import base64
import io
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from offline_quant.report.figures import activation_shares, bit_map
from offline_quant.report.page import MOST_MAPS, write_page
from offline_quant.report.rank_correlation import spearman
from offline_quant.report.schema import LayerPicture, ModelReport

WIDTHS = np.array([0, 1, 2, 3, 4, 5, 6, 8], dtype=np.uint8)
DASH = "\N{EN DASH}"
ODD = "<b>\"odd\" & 'worse'</b> $x_1$ 100%"
FAULT, ADVICE = "perplexity is 9e+04, <original> 12", "give more bits & more text"
HEADINGS = [
    "Layers", "Predicted against measured error", "Where the bits went", "Spectra", "Activation shares",
    "Weights by width", "Time and memory", "Options",
]  # fmt: skip


def picture(rng: np.random.Generator, experts: int, components: dict[str, int]) -> LayerPicture:
    """Steep spectra, unequal experts, and bits that follow both."""
    bits, spectrum = {}, {}
    share = rng.dirichlet(np.full(experts, 2.0))
    for name, C in components.items():
        energy = np.exp(np.linspace(-9, 0, C) + 0.3 * rng.standard_normal(C))
        spectrum[name] = (energy / energy.sum()).astype(np.float32)
        blocks = np.add.reduceat(energy, np.arange(0, C, 16))
        wanted = (
            np.log2(blocks[None] * (share * experts)[:, None]) / 2
            + 5
            + 0.4 * rng.standard_normal((experts, len(blocks)))
        )
        bits[name] = WIDTHS[np.searchsorted(WIDTHS, wanted.clip(0, 8))]
    return LayerPicture(bits, spectrum, share.astype(np.float32))


def make(
    layers: int = 4,
    experts: int = 16,
    components: dict[str, int] | None = None,
    plan_only: bool = False,
    degenerate: bool = False,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, LayerPicture]]:
    """A report and its pictures; fields as in offline_quant.report.schema."""
    rng = np.random.default_rng(seed)
    components = components or {"gate_up": 256, "down": 128}
    pictures = {f"model.layers.{i}.mlp.experts": picture(rng, experts, components) for i in range(layers)}
    rows = []
    for i, (prefix, drawn) in enumerate(pictures.items()):
        predicted = {name: float(0.005 * 40 ** (i / layers) * rng.uniform(0.7, 1.4)) for name in components}
        measured = None if plan_only else {name: p * float(rng.uniform(0.8, 1.1)) for name, p in predicted.items()}
        widths = {name: {str(w): int((b == w).sum()) * 16 * 64 for w in np.unique(b)} for name, b in drawn.bits.items()}
        rows.append(
            {
                "layer": prefix,
                "basis": "whitened" if i % 2 else "natural",
                "basis_rank": {"gate_up": 48 + i} if i % 2 else {},
                "bpw": 2.125 - i / 1000,
                "predicted_error": sum(predicted.values()),
                "predicted_error_by_projection": predicted,
                "measured_error": None if measured is None else sum(measured.values()),
                "measured_error_by_projection": measured,
                "output_error": None if plan_only else 0.031 + i / 1000,
                "solver_gap": 0.00025,
                "tokens_per_expert": {"min": 71 + i, "max": 1234},
                "extreme_experts": [],
                "unseen_experts": [],
                "mean_bits_by_expert": {n: b.mean(1).round(4).tolist() for n, b in drawn.bits.items()},
                "weights_by_width": widths,
                "compensator_ranks": None,
            }
        )
    sanity = None if plan_only else {
        "tokens": 8128,
        "perplexity_original": 12.34,
        "perplexity_quantized": None if degenerate else 12.97,
        "likeliest_token_share_original": 0.041,
        "likeliest_token_share_quantized": 0.97 if degenerate else 0.043,
        "degenerate": degenerate,
        "faults": [FAULT, "token 7 everywhere"] if degenerate else [],
        "advice": ADVICE if degenerate else None,
    }  # fmt: skip
    report = {
        "bpw": 2.1234,
        "expert_weights": 12_582_912,
        "expert_bytes": 3_339_000,
        "calibration_tokens": 262_144,
        "options": {"bits": 2.125, "objective": "bitsmoe", "budget": None, "widths": [0, 1, 2], "feedback": True,
                    "calib": "calib.txt", "seed": 0},
        "sanity": sanity,
        "model_budget": None,
        "model_tuning": None,
        "dense_layers": None,
        "layers": rows,
    }  # fmt: skip
    return report, pictures


class Page(HTMLParser):
    """What a reader sees: texts by tag, tables, the gate's box, pictures. Every element must be closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[tuple[str, str | None]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.boxes: dict[str, str] = {}
        self.tables: list[list[list[str]]] = []
        self.pngs: list[bytes] = []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = " ".join(t for texts in self.texts.values() for t in texts)
        self.headings = self.texts["h2"]
        self.captions = self.texts["figcaption"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "img":
            kind, data = str(found["src"]).split(",")
            assert kind == "data:image/png;base64"
            assert found["alt"]
            self.pngs.append(base64.b64decode(data, validate=True))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag in ("h1", "h2", "figcaption", "p", "li"):
            self.texts.setdefault(tag, []).append("")
        if tag not in ("img", "meta"):
            self.open.append((tag, found.get("class")))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        within = [tag for tag, _ in self.open]
        if within and within[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data
        for tag in ("h1", "h2", "figcaption", "p", "li"):
            if tag in within:
                self.texts[tag][-1] += data
        for _, box in self.open:
            if box in ("good", "bad"):
                self.boxes[box] = self.boxes.get(box, "") + data


SECONDS = {"calibration": 30.0, "quantization": 90.0}
PEAKS = {"calibration": 1_250_000_000, "quantization": 1_900_000_000}


def render(tmp_path: Path, report: dict[str, Any], pictures: dict[str, LayerPicture]) -> Page:
    path = tmp_path / "report.html"
    write_page(path, ModelReport.model_validate(report), pictures, SECONDS, PEAKS)
    html = path.read_text(encoding="utf-8")
    assert str(tmp_path) not in html
    assert "//" not in html.replace("image/png;base64,", "").split("</style>")[0]
    page = Page(html)
    assert {tag for tag, _ in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "strong", "div", "ul", "li",
        "figure", "img", "figcaption", "table", "thead", "tbody", "tr", "th", "td",
    }  # fmt: skip
    for png in page.pngs:
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(np.unique(pixels(png)[::3, ::3] @ [1, 256, 65_536])) > 10, "an empty picture"
    assert len(page.captions) == len(page.pngs)
    assert all(caption.strip() for caption in page.captions)
    return page


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def correlation(pairs: list[tuple[float, float]]) -> float:
    """Spearman by counting: the rank of a value is how many are below it and half of those like it."""
    ranks = [
        [sum(w < v for w in side) + sum(w == v for w in side) / 2 for v in side] for side in zip(*pairs, strict=True)
    ]
    means = [sum(side) / len(side) for side in ranks]
    a, b = ([v - mean for v in side] for side, mean in zip(ranks, means, strict=True))
    return sum(x * y for x, y in zip(a, b, strict=True)) / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return render(tmp_path_factory.mktemp("page"), *make())


def test_sections_come_in_order(page: Page) -> None:
    assert [h.split(":")[0] for h in page.headings] == HEADINGS
    assert len(page.pngs) == 1 + 4 + 1 + 1 + 1


def test_summary_says_what_was_made(page: Page) -> None:
    summary = page.texts["p"][0]
    for said in (
        "2.1234 bits per weight",
        "3.34 MB",
        "7.5x smaller",
        "objective bitsmoe",
        "262,144 tokens of calib.txt",
    ):
        assert said in summary


def test_table_of_layers(page: Page) -> None:
    report, _ = make()
    head, *rows = page.tables[0]
    assert head == [
        "layer", "basis", "bpw", "predicted error", "measured error", "output error", "solver gap", "tokens per expert",
        "unseen experts",
    ]  # fmt: skip
    assert len(rows) == 4
    for i, (cells, row) in enumerate(zip(rows, report["layers"], strict=True)):
        assert cells[:3] == [str(i), f"whitened, rank {48 + i}" if i % 2 else "natural", f"{row['bpw']:.4f}"]
        errors = [row["predicted_error"], row["measured_error"], row["output_error"]]
        assert [float(cell) for cell in cells[3:6]] == pytest.approx(errors, rel=5e-3)
        assert cells[6:] == ["0.025%", f"{71 + i}{DASH}1,234", "none"]


def test_stages_and_options(page: Page) -> None:
    assert page.tables[1] == [
        ["stage", "time", "share", "peak memory"],
        ["calibration", "30.0 s", "25%", "1.25 GB"],
        ["quantization", "90.0 s", "75%", "1.90 GB"],
        ["all", "120.0 s", "", "1.90 GB"],
    ]
    assert dict(page.tables[2][1:]) == {
        "bits": "2.125", "objective": "bitsmoe", "budget": "by default", "widths": "0, 1, 2", "feedback": "yes",
        "calib": "calib.txt", "seed": "0",
    }  # fmt: skip


def test_correlation_in_the_title(page: Page) -> None:
    rows = make()[0]["layers"]
    pairs = [
        (row["predicted_error_by_projection"][name], row["measured_error_by_projection"][name])
        for row in rows
        for name in ("gate_up", "down")
    ]
    assert page.headings[1].endswith(f"8 points, Spearman {correlation(pairs):.3f}")


def test_a_sane_model_gets_a_green_line(page: Page) -> None:
    assert set(page.boxes) == {"good"}
    for said in ("Sanity gate passed", "perplexity 12.97", "original's 12.34", "4.3% of positions", "8,128 tokens"):
        assert said in page.boxes["good"]


@pytest.mark.slow
def test_a_broken_model_is_called_so_in_red(tmp_path: Path) -> None:
    page = render(tmp_path, *make(layers=1, experts=2, degenerate=True))
    assert set(page.boxes) == {"bad"}
    for said in ("broken", FAULT, "token 7 everywhere", ADVICE, "perplexity infinite", "97% of positions"):
        assert said in page.boxes["bad"]
    assert page.texts["li"] == [FAULT, "token 7 everywhere"]


@pytest.mark.slow
def test_a_plan_measured_nothing(tmp_path: Path) -> None:
    page = render(tmp_path, *make(layers=2, plan_only=True))
    assert page.boxes == {}
    assert "nothing was quantized" in page.texts["p"][1]
    assert [h for h in page.headings if "measured" in h] == []
    assert [row[4:6] for row in page.tables[0][1:]] == [[DASH] * 2] * 2
    assert len(page.pngs) == 2 + 3


@pytest.mark.slow
def test_a_forecast_stands_below_the_gate(tmp_path: Path) -> None:
    """With the target it was picked for, what was measured, and what tuning does; nothing where there is none."""
    report, pictures = make(layers=1, experts=2)
    assert "Expected" not in render(tmp_path, report, pictures).text
    report["forecast"] = {"kl": 0.0098, "low": 0.0065, "high": 0.0147, "tokens": 4096}
    expected = "Expected: KL to the original 0.0098 nats a token, 0.0065 to 0.015"
    assert f"{expected}." in render(tmp_path, report, pictures).texts["p"]
    report["forecast"]["measured"] = 0.0071
    report["options"] |= {"bits": 2.38, "target_kl": 0.01, "tune": True}
    assert (
        f"Picked for --target-kl 0.01: --bits 2.38. {expected}. Measured: 0.0071 on 4,096 tokens that it was "
        "calibrated on. The forecast is for runs without --fit layer and tuning, which do better."
    ) in render(tmp_path, report, pictures).texts["p"]


@pytest.mark.slow
def test_odd_text_stays_text(tmp_path: Path) -> None:
    report, pictures = make(layers=2, experts=4)
    report["options"]["calib"] = report["layers"][0]["basis"] = ODD
    report["sanity"] |= {"degenerate": True, "faults": [ODD], "advice": ODD}
    old = report["layers"][0]["layer"]
    report["layers"][0]["layer"] = ODD
    pictures = {ODD if prefix == old else prefix: picture for prefix, picture in pictures.items()}
    page = render(tmp_path, report, pictures)  # refuses elements of its making
    assert page.tables[0][1][:2] == [ODD, ODD]
    assert ODD in page.boxes["bad"]
    assert ["calib", ODD] in page.tables[-1]
    assert any(ODD in caption for caption in page.captions)


@pytest.mark.slow
def test_many_layers_and_experts(tmp_path: Path) -> None:
    report, pictures = make(layers=60, experts=256, components={"gate": 512, "up": 512, "down": 256})
    page = render(tmp_path, report, pictures)
    assert len(page.tables[0]) == 61
    assert "180 points" in page.headings[1]
    shown = [int(c.split()[1].rstrip(".")) for c in page.captions if c.startswith("Layer ")]
    assert len(shown) == MOST_MAPS
    assert (shown[0], shown[-1]) == (0, 59)
    assert {b - a for a, b in pairwise(shown)} <= {8, 9}
    assert any(f"{MOST_MAPS} of 60 layers" in text for text in page.texts["p"])
    assert len(page.pngs) == MOST_MAPS + 4


@pytest.mark.slow
def test_one_layer_of_one_expert_and_one_block(tmp_path: Path) -> None:
    page = render(tmp_path, *make(layers=1, experts=1, components={"gate_up": 16, "down": 1}))
    assert "2 points" in page.headings[1]
    assert len(page.pngs) == 5


@pytest.mark.slow
def test_nothing_but_zeros(tmp_path: Path) -> None:
    """Dead weights: no energy, no error, no bits, no tokens."""
    report, pictures = make(layers=2, experts=4)
    pictures = {
        prefix: LayerPicture(
            {n: np.zeros_like(b) for n, b in p.bits.items()},
            {n: np.zeros_like(s) for n, s in p.spectrum.items()},
            np.zeros_like(p.share),
        )
        for prefix, p in pictures.items()
    }
    for row in report["layers"]:
        row["predicted_error_by_projection"] = row["measured_error_by_projection"] = {"gate_up": 0.0, "down": 0.0}
        row["unseen_experts"] = [0, 1, 2, 3]
        row["weights_by_width"] = {"gate_up": {"0": 0}, "down": {}}
    page = render(tmp_path, report, pictures)
    assert page.headings[1].endswith("4 points, Spearman undefined")
    assert any("4 points of zero or infinite error cannot be drawn" in text for text in page.texts["p"])
    assert page.tables[0][1][-1] == "4 (0, 1, 2, 3)"


@pytest.mark.slow
def test_some_points_cannot_be_drawn(tmp_path: Path) -> None:
    report, pictures = make(layers=3, experts=4)
    report["layers"][0]["measured_error_by_projection"]["down"] = 0.0
    report["layers"][1]["measured_error_by_projection"]["down"] = float("inf")
    page = render(tmp_path, report, pictures)
    assert "5 points" in page.headings[1]
    assert "2 points of zero or infinite error cannot be drawn." in page.captions[0]


@pytest.mark.slow
def test_objective_that_predicts_no_errors(tmp_path: Path) -> None:
    """One width and one compensator per expert, one budget for the model."""
    report, pictures = make(layers=2, experts=4)
    for i, row in enumerate(report["layers"]):
        row["predicted_error_by_projection"] = None
        row["compensator_ranks"] = [0, 8, 16, 8] if i else None
        row["unseen_experts"] = list(range(10))
    prefixes = list(pictures)
    report["model_budget"] = {"solver_gap": 1e-4, "sensitivity": {prefixes[0]: 0.5}, "bits_per_weight": {}}
    flat = {p: replace(v, bits={n: b[:, :1].repeat(3, 1) for n, b in v.bits.items()}) for p, v in pictures.items()}
    page = render(tmp_path, report, flat)
    assert "predicts no error" in page.texts["p"][3]
    head, first, second = page.tables[0]
    assert head[3] == "objective's loss"
    assert head[-3:] == ["unseen experts", "sensitivity", "compensator ranks"]
    assert first[-3:] == ["10", "0.5", "0, mean 0.0"]
    assert second[-3:] == ["10", DASH, f"0{DASH}16, mean 8.0"]
    assert "0.01% of the optimum" in page.texts["p"][0]
    assert "one width" in page.captions[0]


@pytest.mark.parametrize("layers", [1, 3])
def test_unseen_experts_are_red(layers: int) -> None:
    _, pictures = make(layers=layers, experts=4)
    red = []
    for _ in range(2):
        image = pixels(activation_shares(pictures)).astype(int)
        red.append(int(((image[..., 0] - image[..., 1:].max(-1)) > 50).sum()))
        for drawn in pictures.values():
            drawn.share[1] = 0
    assert red[1] > red[0] + 5_000


def test_maps_are_the_right_way_round() -> None:
    """Expert 0 in the upper row, the last block at the right; 0 bits light, 8 dark."""
    bits = np.full((2, 2), 3, dtype=np.uint8)
    bits[0, 0], bits[1, 1] = 0, 8
    image = pixels(bit_map(LayerPicture({"down": bits}, {}, np.full(2, 0.5, dtype=np.float32)), "layer 0"))
    panel = image[: -image.shape[0] // 3]  # without the colour bar
    grey, dark = (236, 239, 241), (68, 1, 84)
    places = [np.argwhere((panel == colour).all(-1)).mean(0) for colour in (grey, dark)]
    assert (places[0] < places[1]).all()


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8207826816681233),
        ([1, 2, 3], [10, 100, 1000], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2], [5, 5], None),
        ([1], [1], None),
        ([], [], None),
    ],
)
def test_spearman_known(x: list[float], y: list[float], expected: float | None) -> None:
    assert spearman(x, y) == (None if expected is None else pytest.approx(expected, abs=1e-12))


@pytest.mark.parametrize("seed", range(5))
def test_spearman_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 6, 40).astype(float)
    y = (x + rng.integers(0, 6, 40)) ** 3
    assert spearman(x, y) == pytest.approx(correlation(list(zip(x.tolist(), y.tolist(), strict=True))), abs=1e-12)


@pytest.mark.slow
def test_the_users_plot_settings_neither_matter_nor_change(tmp_path: Path) -> None:
    report, pictures = make(layers=1, experts=2)
    plain = render(tmp_path, report, pictures)
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "black", "font.size": 30}):
        assert render(tmp_path, report, pictures).pngs == plain.pngs
        assert matplotlib.rcParams["text.usetex"] is True


@pytest.mark.slow
def test_matplotlib_waits_until_something_is_drawn() -> None:
    code = "import sys, offline_quant.report.page; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})
