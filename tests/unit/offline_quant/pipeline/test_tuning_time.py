"""What is said of the time of tuning, against what tuning then passes through layers and head."""

from pathlib import Path
from typing import Any

import pytest

import bitsmoe
from families import make_model
from offline_quant.pipeline import tuning_time
from offline_quant.pipeline.resume import RunState
from offline_quant.rounding import model_tuning, tuning

pytestmark = pytest.mark.slow

OPTIONS = {"bits": 4.5, "calib_samples": 6, "calib_length": 64, "refine": 0}
LAYER, HEAD = 0.25, 2.0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-MoE of three layers, the first dense."""
    folder = tmp_path_factory.mktemp("time")
    (folder / "calib.txt").write_text("She opened the door, and there stood her brother with the lamp. " * 60)
    return make_model("Qwen2MoeForCausalLM", folder / "model")


class Counted:
    """Tokens that pass through one layer and through the head while a run is tuned, and what was foretold."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.tuned = self.tuned_experts = self.stepped = self.forwards = self.head = 0
        self.foretold: list[float] = []
        backward, both = tuning._TunedLayer.backward, model_tuning._Tuner.backward
        forward, divergence = model_tuning._Tuner.forward, model_tuning._divergence
        seconds = tuning_time.tuning_seconds

        def tune(layer: Any, inputs: Any, target: Any) -> None:
            self.tuned += len(target)
            self.tuned_experts += layer.weights.layer.num_experts / inputs.topk_ids.shape[1]
            backward(layer, inputs, target)

        def step(tuner: Any, windows: Any, *more: Any) -> Any:
            self.stepped += windows.numel()
            return both(tuner, windows, *more)

        def enter(tuner: Any, windows: Any, *more: Any) -> Any:
            self.forwards += windows.numel()
            return forward(tuner, windows, *more)

        def judge(model: Any, head: Any, hidden: Any, wanted: Any) -> Any:
            self.head += hidden[..., 0].numel()
            return divergence(model, head, hidden, wanted)

        def foretell(*given: Any) -> float:
            self.foretold.append(seconds(*given))
            return self.foretold[-1]

        monkeypatch.setattr(tuning._TunedLayer, "backward", tune)
        monkeypatch.setattr(model_tuning._Tuner, "backward", step)
        monkeypatch.setattr(model_tuning._Tuner, "forward", enter)
        monkeypatch.setattr(model_tuning, "_divergence", judge)
        monkeypatch.setattr(tuning_time, "tuning_seconds", foretell)
        monkeypatch.setattr(tuning_time, "_token_seconds", lambda _: (LAYER, HEAD))


@pytest.mark.parametrize("options", [{"tune": True}, {"tune_model": True}, {"tune": True, "tune_codes": True}], ids=str)
def test_what_is_foretold_counts_every_token_and_step(
    options: dict[str, bool], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    counted = Counted(monkeypatch)
    bitsmoe.quantize(source, tmp_path / "q", calib=str(source.parent / "calib.txt"), **OPTIONS, **options)
    seen = counted.forwards - counted.stepped  # what judges the result, forwards alone
    assert seen + counted.stepped + counted.tuned > 0
    wanted = LAYER * (tuning.FORWARDS * counted.tuned + tuning.STEP_FORWARDS * counted.tuned_experts)
    wanted += LAYER * 3 * (model_tuning.FORWARDS * counted.stepped + seen)
    wanted += HEAD * (model_tuning.HEADS * counted.stepped + 2 * seen)
    assert counted.head == counted.forwards
    assert counted.foretold == [pytest.approx(wanted)]
    assert "Tuning: about " in capsys.readouterr().err


def test_a_resumed_run_foretells_what_is_left(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    foretold: list[float] = []
    seconds = tuning_time.tuning_seconds
    monkeypatch.setattr(tuning_time, "_token_seconds", lambda _: (LAYER, HEAD))
    monkeypatch.setattr(tuning_time, "tuning_seconds", lambda *given: foretold.append(seconds(*given)) or foretold[-1])

    def quantize(stop: str | None) -> None:
        with monkeypatch.context() as patch:
            if stop:
                patch.setattr(RunState, stop, die)
            bitsmoe.quantize(source, tmp_path / "q", calib=str(source.parent / "calib.txt"), resume=True, tune=True,
                             tune_model=True, **OPTIONS)  # fmt: skip

    def die(state: RunState, *given: Any) -> None:
        if given and given[0] != 2:  # layers are kept but for the last of three
            return keep(state, *given)
        raise KeyboardInterrupt

    keep = RunState.close_layer
    for stop in ("close_layer", "publish"):
        with pytest.raises(KeyboardInterrupt):
            quantize(stop)
    assert "Tuning: about " in capsys.readouterr().err
    quantize(None)
    assert "Tuning: about " not in capsys.readouterr().err
    # One of two layers, of 8 experts of which a token goes to 2.
    assert foretold[0] - foretold[1] == pytest.approx(LAYER * tuning.passes(6 * 64, 8 / 2))


def test_times_are_measured_and_a_run_without_tuning_says_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, usual = [], tuning_time._token_seconds
    monkeypatch.setattr(tuning_time, "_token_seconds", lambda run: found.append(usual(run)) or found[-1])
    given = {"calib": str(source.parent / "calib.txt"), **OPTIONS, "plan": True}
    bitsmoe.quantize(source, tmp_path / "plain", **given)
    assert found == []
    assert "Tuning:" not in capsys.readouterr().err
    bitsmoe.quantize(source, tmp_path / "tuned", tune_model=True, **given)
    assert all(0 < seconds < 1 for seconds in found[0])
