"""One budget for the whole model: what a layer's errors are said to cost, against a model that has them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from builders import TINY_MOE
from families import make_model
from offline_quant.checkpoint.dequantize import dequantize_checkpoint
from offline_quant.config import QuantizeConfig
from offline_quant.model.source import SourceModel
from offline_quant.model.streaming import StreamedModel
from offline_quant.pipeline import model_budget, trials
from offline_quant.pipeline.quantize import quantize_model
from offline_quant.pipeline.resume import RunState
from offline_quant.runtime.distributed import Workers


def divergence(original, other, windows):
    with torch.no_grad():
        p, q = (model(windows).logits.double().log_softmax(-1) for model in (original, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.slow
def test_a_layer_costs_what_its_trial_does_to_the_model(tmp_path, monkeypatch):
    """The trial of the first layer is what a run with a budget for each layer makes of it: same inputs, same bits."""
    windows, losses = [], []
    kept, try_layer = RunState.keep_windows, model_budget.try_layer

    def watched(*given):
        tried = try_layer(*given)
        losses.append(tried[1])
        return tried

    monkeypatch.setattr(model_budget, "try_layer", watched)
    monkeypatch.setattr(RunState, "keep_windows", lambda self, w: windows.append(w.tokens) or kept(self, w))
    given = {"bits": 2.5, "calib": "self", "calib_samples": 8, "calib_length": 256, "without": ["trim"]}
    reports = {
        budget: quantize_model(str(TINY_MOE), tmp_path / budget, QuantizeConfig(budget=budget, **given)).report
        for budget in ("layer", "model")
    }
    dequantize_checkpoint(tmp_path / "layer", tmp_path / "plain", torch.float32)
    original, other, quantized = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (TINY_MOE, TINY_MOE, tmp_path / "plain")
    )
    other.model.layers[0].mlp.experts.load_state_dict(quantized.model.layers[0].mlp.experts.state_dict())
    first, shared = reports["layer"].layers[0], reports["model"].model_budget
    found = shared.sensitivity[first.layer] * losses[0]
    assert found == pytest.approx(divergence(original, other, windows[0]), rel=0.02)
    bits = shared.bits_per_weight
    assert max(bits.values()) - min(bits.values()) > 0.3
    assert sum(bits.values()) / len(bits) <= 2.5
    assert 2.49 < reports["model"].bpw <= 2.5


def test_errors_of_layers_do_not_meet(tmp_path, monkeypatch):
    """Noise in every layer with experts, behind a dense one, against transformers' model with one of them at a time.

    The first 32 tokens of every second window are tried.
    """
    monkeypatch.setattr(trials, "TOKENS", 64)
    monkeypatch.setattr(trials, "WINDOW_TOKENS", 32)
    source = make_model("Qwen2MoeForCausalLM", tmp_path / "model")
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    windows = torch.randint(0, original.config.vocab_size, (4, 48), generator=generator)
    model = StreamedModel(SourceModel(source))
    tried = trials.Trials(model, windows, Workers())
    assert list(model.shape.layers) == [1, 2]
    errors = {i: torch.randn(4 * 48, original.config.hidden_size, generator=generator) for i in (1, 2)}
    for index, error in errors.items():
        tried.disturb(index, torch.cat([error[span.start : span.stop] for span in tried.spans]))
    for index, found in tried.divergences().items():
        own = errors[index].view(4, 48, -1)[::2, :32]
        hook = original.model.layers[index].mlp.experts.register_forward_hook(
            lambda _module, _arguments, out: out + own.reshape(out.shape)  # noqa: B023
        )
        with torch.no_grad():
            q = original(windows[::2, :32]).logits.double().log_softmax(-1)
            hook.remove()
            p = original(windows[::2, :32]).logits.double().log_softmax(-1)
        assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
