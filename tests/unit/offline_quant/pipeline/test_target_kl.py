"""`--target-kl`: the picked bits are the fewest whose forecast meets the target, by brute force and by plans."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import bitsmoe
from bitsmoe_kernels.errors import BitsmoeError
from builders import REPO, write_first_layers
from layers import measured_layer
from offline_quant.checkpoint.directory import PAGE_FILE, REPORT_FILE
from offline_quant.config import QuantizeConfig
from offline_quant.evaluation.forecast import Forecast
from offline_quant.layer.error_curve import PLANNED, ErrorCurve, error_curve
from offline_quant.layer.outputs import planned_output_error
from offline_quant.layer.planner import plan_layer
from offline_quant.layer.view import LayerView
from offline_quant.model.expert_inputs import ExpertInputs
from offline_quant.pipeline import layer_loop, preflight, target_kl
from offline_quant.pipeline.resume import RunState
from offline_quant.pipeline.target_kl import STEPS, Forecasts, least_step

TEXT = (REPO / "LICENSE").read_text(encoding="utf-8")
SAMPLES, LENGTH = 8, 256
FEW = {"calib_samples": SAMPLES, "calib_length": LENGTH, "refine": 0, "basis": "natural"}


@given(
    falls=st.lists(st.floats(0, 0.4), min_size=1, max_size=80),
    first=st.floats(-2, 9),
    least=st.integers(1, 60),
    start=st.integers(0, 200),
)
def test_the_search_finds_what_trying_all_steps_finds(falls: list[float], first: float, least: int, start: int) -> None:
    """However unevenly the excess falls, and with each step tried once."""
    values, log = {}, first
    for step, fall in enumerate(falls, least):
        values[step] = math.exp(log)
        log -= fall
    tried = []

    def excess(step: int) -> float:
        tried.append(step)
        return values[step]

    most = least + len(falls) - 1
    expected = next((step for step in values if values[step] <= 1), most + 1)
    assert least_step(excess, least, most, start) == expected
    assert len(tried) == len(set(tried))


def test_an_even_fall_takes_few_steps() -> None:
    tried = []

    def excess(step: int) -> float:
        tried.append(step)
        return math.exp(-1.25 / STEPS * (step - 231.5))

    assert least_step(excess, 50, 406, 125) == 232
    assert len(tried) <= 6


@pytest.mark.parametrize("target", [0.3, 0.03, 0.004, 0.0004])
def test_the_fewest_bits_of_the_whole_grid_are_picked(target: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With layers whose errors fall unevenly, and a forecast of which all steps can be tried."""
    curves = {
        1: ErrorCurve((1.0, 1.5, 2.0, 8.1), (0.5, 0.2, 0.19, 1e-4)),
        3: ErrorCurve((1.25, 3.0, 8.2), (0.3, 0.02, 1e-5)),
    }

    def faked(_m: Any, _w: Any, _s: Any, errors: dict[int, float], bits: float, *_: Any) -> Forecast:
        assert list(errors) == [1, 3]
        kl = 0.1 * sum(errors.values()) / bits
        return Forecast(kl=kl, low=kl / 2, high=kl * 2, tokens=1)

    monkeypatch.setattr(target_kl, "forecast", faked)
    run = SimpleNamespace(
        num_layers=4, streamed=None, judged=None, config=SimpleNamespace(seed=0),
        calibration=SimpleNamespace(read_all=lambda _: []), clock=SimpleNamespace(lap=lambda _: None),
    )  # fmt: skip
    all_steps = range(math.ceil(1.25 * STEPS), math.ceil(8.2 * STEPS) + 1)
    every = {
        step: faked(None, None, None, {i: c.at(step / STEPS) for i, c in curves.items()}, step / STEPS).kl
        for step in all_steps
    }
    meeting = [step for step in all_steps if every[step] <= target]
    forecasts = Forecasts(run, curves)  # type: ignore[arg-type]
    if meeting and meeting[0] > all_steps[0]:
        picked = forecasts.pick(target)
        assert picked.bits == meeting[0] / STEPS
        assert picked.forecast.kl == every[meeting[0]] <= target < every[meeting[0] - 1]
    else:
        with pytest.raises(BitsmoeError, match="too large") as raised:
            forecasts.pick(target)
        named = float(str(raised.value).split("at most --target-kl ")[1].split(",")[0])
        assert forecasts.pick(named).bits > all_steps[0] / STEPS  # the remedy works


def layer(seed: int = 0) -> LayerView:
    """Eight experts whose channels differ in size."""
    generator = torch.Generator().manual_seed(seed)
    E, H, I, T = 8, 96, 64, 400  # noqa: E741
    sizes = torch.linspace(0, 3, H).exp()
    x = torch.randn(T, H, generator=generator) * sizes[torch.randperm(H, generator=generator)]
    gate_up = torch.randn(E, 2 * I, H, generator=generator) / H**0.5
    down = torch.randn(E, H, I, generator=generator) / I**0.5
    ids = torch.rand(T, E, generator=generator).topk(2).indices
    inputs = ExpertInputs(x / 8, ids, torch.full((T, 2), 0.5))
    return measured_layer(gate_up, down, inputs, QuantizeConfig(bits=2.0, refine=0))


def planned_error(bits: float) -> float:
    """Of the layer planned at these bits alone."""
    view = layer().with_bits(bits)
    error = planned_output_error(view, plan_layer(view))
    assert error is not None
    return error


def test_a_curve_has_the_errors_of_plans() -> None:
    """Exactly those at the bits that are planned, nearly those between and beyond them."""
    view = layer()
    curve = error_curve(view)
    assert list(curve.bits) == sorted(set(curve.bits))
    assert all(a >= b for a, b in zip(curve.errors, curve.errors[1:], strict=False))
    planned = [b for b in PLANNED if b in curve.bits]
    assert len(planned) >= 4
    for bits in planned:
        assert curve.at(bits) == pytest.approx(planned_error(bits), rel=1e-12)
    for bits in (2.2, 2.75, 3.4, 5.0):
        assert curve.at(bits) == pytest.approx(planned_error(bits), rel=0.1)
    # More than the most bits cannot be spent.
    assert curve.at(curve.bits[-1]) == pytest.approx(planned_error(curve.bits[-1] + 1), rel=0.1)


def test_between_known_bits_a_curve_falls_evenly_on_a_logarithmic_scale() -> None:
    curve = ErrorCurve((1.0, 2.0), (0.4, 0.1))
    assert curve.at(1.5) == pytest.approx(0.2)
    assert curve.at(9.0) == pytest.approx(0.1)
    assert ErrorCurve((1.0, 2.0), (0.0, 0.0)).at(1.5) < 1e-20  # dead experts


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's first two layers, with half of their experts."""
    folder = tmp_path_factory.mktemp("target")
    (folder / "calib.txt").write_text(TEXT)
    return write_first_layers(folder / "model", 2, 8)


def options(source: Path, **changed: Any) -> dict[str, Any]:
    return {"calib": str(source.parent / "calib.txt"), **FEW, **changed}


TARGET = 0.01


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    """What an undisturbed run writes."""
    bitsmoe.quantize(source, source.parent / "whole", **options(source, target_kl=TARGET))
    return source.parent / "whole"


def contents(directory: Path) -> dict[str, bytes]:
    """All files but the page, which holds times."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != PAGE_FILE}


def record(directory: Path) -> dict[str, Any]:
    run: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]["run"]
    return run


@pytest.mark.slow
def test_plans_of_the_grid_agree(source: Path, whole: Path, tmp_path: Path) -> None:
    """`--plan --bits` forecasts at most the target at the picked bits or a step more, and more than it below."""
    picked = record(whole)["bits"]

    def planned(bits: float) -> float:
        given = options(source, bits=bits, plan=True)
        found = bitsmoe.quantize(source, tmp_path / str(bits), **given).report.forecast
        assert found is not None
        return found.kl

    step = 1 / STEPS
    assert picked == round(picked * STEPS) / STEPS
    assert all(planned(bits) > TARGET for bits in (picked - 2 * step, picked - 0.1, picked - 0.3))
    assert planned(picked + step) <= TARGET
    written = json.loads((whole / REPORT_FILE).read_text())
    assert written["forecast"]["kl"] <= TARGET
    assert written["forecast"]["kl"] == pytest.approx(planned(picked), rel=0.03)


@pytest.mark.slow
def test_the_checkpoint_is_that_of_the_picked_bits(source: Path, whole: Path, tmp_path: Path) -> None:
    """Options and reports alone say how the bits were picked."""
    run = record(whole)
    assert run["target_kl"] == TARGET
    assert list(run)[:3] == ["bits", "target_kl", "objective"]
    plain = bitsmoe.quantize(source, tmp_path / "plain", **options(source, bits=run["bits"])).report
    assert record(tmp_path / "plain") == {k: v for k, v in run.items() if k != "target_kl"}
    tensors = [load_file(d / "model.safetensors") for d in (whole, tmp_path / "plain")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(t, tensors[1][name]) for name, t in tensors[0].items())
    written = json.loads((whole / REPORT_FILE).read_text())
    assert written["bpw"] == plain.bpw <= run["bits"]
    assert plain.forecast is None
    assert written["options"] == run
    card, page = ((whole / name).read_text() for name in ("README.md", PAGE_FILE))
    assert f"| target_kl | `{TARGET}` |" in card
    assert f"| bits | `{run['bits']}` |" in card
    assert "KL divergence from the original, forecast" in card
    assert f"Picked for --target-kl {TARGET}: --bits {run['bits']}. Expected: KL" in page


@pytest.mark.slow
def test_the_measured_divergence_is_that_of_whole_models(source: Path, whole: Path) -> None:
    """Of the first windows of the calibration text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    written = json.loads((whole / REPORT_FILE).read_text())["forecast"]
    ids = AutoTokenizer.from_pretrained(source)(TEXT, return_tensors="pt").input_ids[0]
    assert written["tokens"] == SAMPLES * LENGTH
    models = [AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32).eval() for d in (source, whole)]
    # The windows are drawn from the text: all that there are have about the same divergence.
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    with torch.no_grad():
        p, q = (model(windows).logits.double().log_softmax(-1) for model in models)
    found = (p.exp() * (p - q)).sum(-1).mean(1)
    assert 0.8 * float(found.min()) < written["measured"] < 1.2 * float(found.max())


class Died(BaseException):
    """Stands for a signal."""


def fail(*_: object, **__: object) -> Any:
    raise Died


@pytest.mark.slow
def test_a_run_that_dies_goes_on_with_the_bits_it_picked(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual: Callable[..., None] = RunState.close_layer

    def die(self: RunState, index: int, *more: Any) -> None:
        if index == 1:
            raise Died
        usual(self, index, *more)

    given = options(source, target_kl=TARGET)
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "close_layer", die)
        with pytest.raises(Died):
            bitsmoe.quantize(source, tmp_path / "q", **given)
    for changed, said in (
        ({"target_kl": 0.02}, "target_kl was 0.01, now 0.02"),
        ({"target_kl": None, "bits": record(whole)["bits"]}, "target_kl was 0.01, now None"),
    ):
        with pytest.raises(BitsmoeError, match=said):
            bitsmoe.quantize(source, tmp_path / "q", resume=True, **(given | changed))
    with monkeypatch.context() as patch:
        patch.setattr(target_kl, "examine_layers", fail)  # they are picked already
        bitsmoe.quantize(source, tmp_path / "q", resume=True, **given)
    assert contents(tmp_path / "q") == contents(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


@pytest.mark.slow
@pytest.mark.nightly
def test_two_workers_pick_the_same(source: Path, whole: Path, tmp_path: Path) -> None:
    words = [
        sys.executable, "-m", "offline_quant.cli", "quantize", source, "--out", tmp_path / "q", "--target-kl", TARGET,
        "--calib", source.parent / "calib.txt", "--calib-samples", str(SAMPLES),
        "--calib-length", str(LENGTH), "--refine", "0", "--basis", "natural", "--workers", "2",
    ]  # fmt: skip
    done = subprocess.run([*map(str, words)], cwd=REPO, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Picked for --target-kl {TARGET}: --bits {record(whole)['bits']}\nExpected: KL" in done.stdout
    assert contents(tmp_path / "q") == contents(whole)


@pytest.mark.slow
def test_a_plan_picks_the_same_and_tuning_does_better(source: Path, whole: Path, tmp_path: Path) -> None:
    report = bitsmoe.quantize(source, tmp_path / "plan", plan=True, **options(source, target_kl=TARGET)).report
    assert report.options == record(whole)
    assert report.forecast is not None
    assert report.forecast.measured is None
    assert "measured" not in json.loads((tmp_path / "plan" / REPORT_FILE).read_text())["forecast"]
    assert report.expectation()[1] == str(report.forecast)
    tuned = bitsmoe.quantize(source, tmp_path / "tuned", **options(source, target_kl=TARGET, tune=True)).report
    assert tuned.expectation()[-1] == "The forecast is for runs without --fit layer and tuning, which do better"
    assert tuned.forecast is not None
    measured = [
        f["measured"] for f in (tuned.forecast.model_dump(), json.loads((whole / REPORT_FILE).read_text())["forecast"])
    ]
    assert measured[0] < measured[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "said", "option"),
    [(1e-12, "out of reach", "at least --target-kl "), (500.0, "too large to pick bits by", "at most --target-kl ")],
)
def test_a_target_that_no_bits_meet_or_all(source: Path, tmp_path: Path, target: float, said: str, option: str) -> None:
    with pytest.raises(BitsmoeError, match=f"--target-kl {target:g}: {said}") as raised:
        bitsmoe.quantize(source, tmp_path / "q", **options(source, target_kl=target))
    message = str(raised.value)
    named = float(message.split(option)[1].split(",")[0])
    assert message.count("\n") == 0
    assert list(tmp_path.iterdir()) == []
    report = bitsmoe.quantize(source, tmp_path / "q", plan=True, **options(source, target_kl=named)).report
    assert report.forecast is not None
    assert report.forecast.kl <= named


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"bits": 2.25}, "--bits 2.25 and --target-kl 0.01: give one of them"),
        ({"target_kl": None}, "--bits: missing; give bits per weight, or the acceptable divergence as --target-kl"),
        ({"target_kl": 0.0}, "--target-kl 0.0: Input should be greater than 0"),
        ({"target_kl": math.nan}, "--target-kl nan: Input should be "),
        ({"objective": "uniform"}, "--target-kl 0.01: --objective uniform predicts no errors"),
        ({"objective": "alphaq", "basis": "auto"}, "--target-kl 0.01: --objective alphaq predicts no errors"),
        ({"budget": "model"}, "--target-kl 0.01: with --budget model no forecast was compared"),
    ],
    ids=str,
)
def test_what_contradicts_a_target_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(target_kl, "examine_layers", fail)  # before the expensive step
    with pytest.raises(BitsmoeError) as raised:
        bitsmoe.quantize(source, tmp_path / "q", **options(source, target_kl=TARGET) | changed)
    assert str(raised.value).startswith(said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_memory_is_that_of_the_most_bits_until_they_are_picked(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the disk for the result is asked for once its size is known, before anything is quantized."""
    seen, asked = [], []
    usual, space = preflight.estimate_run, preflight.check_space
    monkeypatch.setattr(preflight, "estimate_run", lambda sizes, *m: seen.append(sizes.bits) or usual(sizes, *m))
    monkeypatch.setattr(preflight, "check_space", lambda out, needed: asked.append(needed) or space(out, needed))
    monkeypatch.setattr(preflight, "held_bytes", lambda _: 0)
    result = bitsmoe.quantize(source, tmp_path / "q", **options(source, target_kl=TARGET))
    assert seen == [8.5, result.report.options["bits"]]
    assert asked == [result.memory.disk, result.memory.most_disk]
    assert result.memory.result > result.report.expert_bytes
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=asked[0]))
        patch.setattr(layer_loop, "_finish_layer", fail)
        with pytest.raises(BitsmoeError, match="free some space"):
            bitsmoe.quantize(source, tmp_path / "full", **options(source, target_kl=TARGET))
