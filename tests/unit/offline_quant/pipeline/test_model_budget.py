"""One budget for the whole model: what a layer's errors are said to cost, against a model that has them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from builders import TINY_MOE
from offline_quant.checkpoint.dequantize import dequantize_checkpoint
from offline_quant.config import QuantizeConfig
from offline_quant.pipeline.quantize import quantize_model
from offline_quant.pipeline.resume import RunState


def divergence(original, other, windows):
    with torch.no_grad():
        p, q = (model(windows).logits.double().log_softmax(-1) for model in (original, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.slow
def test_a_layer_costs_what_its_trial_does_to_the_model(tmp_path, monkeypatch):
    """The trial of the first layer is what a run with a budget for each layer makes of it: same inputs, same bits."""
    windows = []
    kept = RunState.keep_windows
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
    found = shared.sensitivity[first.layer] * sum(first.predicted_error_by_projection.values())
    assert found == pytest.approx(divergence(original, other, windows[0]), rel=0.02)
    bits = shared.bits_per_weight
    assert max(bits.values()) - min(bits.values()) > 0.3
    assert sum(bits.values()) / len(bits) <= 2.5
    assert 2.49 < reports["model"].bpw <= 2.5
