"""The forecast of a plan: noise in the experts' output, and the divergence that it makes, against whole models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitsmoe
from builders import TINY_MOE
from families import IDS, make_model, whole_model
from offline_quant.calibration.sources.self_written import write_sampled_text
from offline_quant.calibration.windows import load_tokenizer
from offline_quant.evaluation.forecast import Forecast, divergence, forecast, noisy_states
from offline_quant.model.source import SourceModel
from offline_quant.model.streaming import StreamedModel


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().sum() / b.square().sum())


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "Gemma4ForCausalLM"])
def test_divergence_is_that_of_whole_logits(architecture: str, tmp_path: Path) -> None:
    """For a few rows of the head at a time, with a head that caps its products too."""
    model = StreamedModel(SourceModel(make_model(architecture, tmp_path / "model")))
    wanted = noisy_states(model, IDS, {}, 0)
    found = wanted + 0.3 * torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)) * wanted.std()
    p, q = (model.logits(s, model.head).double().log_softmax(-1) for s in (wanted, found))
    assert divergence(model, wanted, found) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert divergence(model, wanted, wanted) == pytest.approx(0, abs=1e-6)


def test_divergence_of_two_models_is_that_of_their_own_heads(tmp_path: Path) -> None:
    """As where the head of the result is quantized too."""
    first = make_model("Qwen3MoeForCausalLM", tmp_path / "model")
    second = shutil.copytree(first, tmp_path / "other")
    tensors = load_file(second / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(1).contiguous()
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    save_file(tensors, second / "model.safetensors", metadata={"format": "pt"})
    models = [StreamedModel(SourceModel(directory)) for directory in (first, second)]
    wanted = noisy_states(models[0], IDS, {}, 0)
    found = noisy_states(models[1], IDS, {1: 0.1}, 0)
    p, q = (m.logits(s, m.head).double().log_softmax(-1) for m, s in zip(models, (wanted, found), strict=True))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert divergence(models[0], wanted, found, models[1]) == pytest.approx(expected, rel=1e-4)
    assert divergence(models[0], wanted, found) != pytest.approx(expected, rel=0.01)


def test_noise_has_the_planned_size(tmp_path: Path) -> None:
    """In each token's output of one layer's experts, and in no other layer; none of it leaves all as it is."""
    directory = make_model("Qwen3MoeForCausalLM", tmp_path / "model")
    model, whole = StreamedModel(SourceModel(directory)), whole_model(directory)
    with torch.no_grad():
        exact = whole.model(IDS, output_hidden_states=True).hidden_states
    normed = [model.normed(noisy_states(model, IDS, errors, 0)) for errors in ({}, {0: 0.0, 2: 0.0})]
    assert all(torch.allclose(states, exact[-1], atol=1e-4) for states in normed)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    usual = model.through

    def watched(module, batches, change):  # type: ignore[no-untyped-def]
        def kept(output: torch.Tensor) -> torch.Tensor:
            changed = change(output)
            seen.append((output, changed))
            return changed

        return usual(module, batches, kept)

    model.through = watched  # type: ignore[method-assign]
    noisy_states(model, IDS, {1: 0.04}, 0)
    sizes = [relative(changed, output) for output, changed in seen]
    assert sizes[0] == sizes[2] == 0
    each = (seen[1][1] - seen[1][0]).square().sum(-1) / seen[1][0].square().sum(-1)
    assert each.mean() == pytest.approx(0.04, rel=0.1)
    assert 0.5 * 0.04 < each.min() <= each.max() < 2 * 0.04


def test_larger_errors_give_larger_forecasts() -> None:
    model = StreamedModel(SourceModel(TINY_MOE))
    states = noisy_states(model, IDS, {}, 0)
    found = [forecast(model, IDS, [states], dict.fromkeys(range(4), e), 2.0, 0) for e in (0.001, 0.01, 0.1)]
    assert found[0].kl < found[1].kl / 5 < found[2].kl / 25
    assert all(f.low < f.kl < f.high and f.tokens == IDS.numel() for f in found)
    assert found[1] == forecast(model, IDS, [states], dict.fromkeys(range(4), 0.01), 2.0, 0)


@pytest.mark.slow
def test_a_plan_says_what_to_expect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the demo model within the range it names, on other text; other objectives predict no errors."""
    text, unseen, tokenizer = tmp_path / "calib.txt", tmp_path / "unseen.txt", load_tokenizer(TINY_MOE)
    for seed, (path, windows) in enumerate(((text, 64), (unseen, 16))):
        write_sampled_text(StreamedModel(SourceModel(TINY_MOE)), tokenizer, path, windows, 256, seed)
    options = {"bits": 2.125, "calib": str(text), "calib_samples": 64, "calib_length": 256}
    report = bitsmoe.quantize(TINY_MOE, tmp_path / "plan", plan=True, **options).report
    assert report.forecast is not None
    written = json.loads((tmp_path / "plan" / "bitsmoe_report.json").read_text())
    assert Forecast(**written["forecast"]) == report.forecast
    done = bitsmoe.quantize(TINY_MOE, tmp_path / "done", **options).report
    assert done.forecast is None
    measured = bitsmoe.evaluate(tmp_path / "done", unseen, TINY_MOE).kl
    assert measured is not None
    assert report.forecast.low < measured < report.forecast.high
    other = bitsmoe.quantize(TINY_MOE, tmp_path / "other", plan=True, objective="uniform", **options).report
    assert other.forecast is None
