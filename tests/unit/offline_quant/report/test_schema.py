"""Reports keep their JSON: keys in order, floats digit by digit, infinity as it was."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from offline_quant.report.schema import LayerReport, LinearLayersReport, ModelBudget, ModelReport

ODD_FLOATS = [1e-05, 1e22, 0.1 + 0.2, 5e-324, 1e16, 2.0, 123456789.123456789]


def layer(error: float = 0.25) -> dict[str, Any]:
    return {
        "layer": "model.layers.3.mlp.experts", "basis": "whitened", "basis_rank": {"gate_up": 48, "down": 40},
        "bpw": error, "predicted_error": error, "predicted_error_by_projection": {"gate_up": error, "down": error},
        "measured_error": error, "measured_error_by_projection": {"down": error, "gate_up": 1e-09},
        "output_error": error,
        "planned_output_error": error, "solver_gap": 0.0, "tokens_per_expert": {"min": 0, "max": 9},
        "extreme_experts": [3],
        "unseen_experts": [], "mean_bits_by_expert": {"gate_up": [2.0, 1.3333]},
        "weights_by_width": {"gate_up": {"0": 160, "8": 40}}, "compensator_ranks": None,
    }  # fmt: skip


@pytest.mark.parametrize("error", [*ODD_FLOATS, float("inf")])
def test_the_json_of_a_layer_is_that_of_its_data(error: float) -> None:
    data = layer(error)
    report = LayerReport.model_validate(data)
    assert report.to_json() == json.dumps(data)
    assert json.dumps(report.model_dump()) == json.dumps(data)
    again = LayerReport.model_validate(json.loads(report.to_json()))
    assert again == report
    assert report.basis_ranks() == "48, 40"


def test_the_json_of_a_run_is_that_of_its_data() -> None:
    sanity = {
        "tokens": 100, "perplexity_original": float("inf"), "perplexity_quantized": None,
        "likeliest_token_share_original": 0.25, "likeliest_token_share_quantized": 1.0, "degenerate": True,
        "faults": ["it stammers"], "advice": "more bits",
    }  # fmt: skip
    data = {
        "bpw": 2.1249999, "expert_weights": 3, "expert_bytes": 1, "calibration_tokens": 7,
        "options": {"bits": 2.125, "ranks": [0, 8], "calib": None, "feedback": True}, "sanity": sanity,
        "model_budget": {"solver_gap": 1e-05, "sensitivity": {"b": 1e-07, "a": 2.0}, "bits_per_weight": {"b": 2.5}},
        "model_tuning": {"kl_before": 0.5, "kl_after": 0.25, "kept": True},
        "layers": [layer(), layer(1e-05)],
        "dense_layers": {"bits": [4, 8], "matrices": 2, "weights": 8, "bytes": 5, "bits_per_weight": 5.0},
        "forecast": {"kl": 0.01, "low": 0.008, "high": 0.013, "tokens": 100},
    }  # fmt: skip
    report = ModelReport.model_validate(data)
    assert report.to_json(indent=1) == json.dumps(data, indent=1)
    measured = data | {"forecast": {**report.forecast.model_dump(), "measured": 0.009}}
    assert ModelReport.model_validate(measured).to_json() == json.dumps(measured)
    for empty in ("sanity", "model_budget", "model_tuning", "dense_layers", "forecast"):
        assert ModelReport.model_validate(data | {empty: None}).to_json() == json.dumps(data | {empty: None})


def test_a_report_is_checked_and_frozen() -> None:
    budget = ModelBudget(solver_gap=0.0, sensitivity={}, bits_per_weight={})
    with pytest.raises(ValidationError, match="frozen"):
        budget.solver_gap = 1.0
    with pytest.raises(ValidationError, match="extra_forbidden"):
        LayerReport.model_validate(layer() | {"more": 1})
    with pytest.raises(ValidationError, match="missing"):
        LayerReport.model_validate({k: v for k, v in layer().items() if k != "basis"})


def test_linear_layers_as_a_sentence() -> None:
    report = LinearLayersReport(bits=[4, 8], matrices=2, weights=8_000_000, bytes=5_000_000, bits_per_weight=5.0)
    assert str(report) == (
        "linear layers outside the experts at 4 and 8 bits: 5.00 MB, 5.0000 bits per weight with scales"
    )
