"""Routing that vLLM's router for CPUs refuses or does wrongly, against its formula."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bitsmoe_vllm import _compat

E, TOP_K, T = 12, 3, 40


def layer(scoring: str, biased: bool, **more: Any) -> Any:
    """What the plugin reads of vLLM's RoutedExperts."""
    bias = torch.linspace(1, -1, E) if biased else None
    usual: dict[str, Any] = {
        "scoring_func": scoring, "e_score_correction_bias": bias, "top_k": TOP_K, "use_grouped_topk": False,
        "renormalize": True, "topk_group": None, "num_expert_group": None, "custom_routing_function": None,
        "routed_scaling_factor": 2.5,
    }  # fmt: skip
    return SimpleNamespace(**usual | more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("scoring", "biased"), [("sigmoid", True), ("sigmoid", False), ("softmax", True)])
def test_a_layer_without_groups(scoring: str, biased: bool, renormalize: bool, dtype: torch.dtype) -> None:
    """Experts by score and bias, weights by score alone; only biased routing multiplies by the factor."""
    routed = layer(scoring, biased, renormalize=renormalize)
    route = _compat.own_routing(routed)
    assert route is not None
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights, ids = route(routed, torch.zeros(T, 8), logits)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    changed = 0
    for row, w, chosen in zip(logits.double().numpy(), weights.tolist(), ids.tolist(), strict=True):
        scores = 1 / (1 + np.exp(-row)) if scoring == "sigmoid" else np.exp(row) / np.exp(row).sum()
        biases = np.zeros(E) if routed.e_score_correction_bias is None else routed.e_score_correction_bias.numpy()
        want = np.argsort(-(scores + biases))[:TOP_K]
        changed += set(want) != set(np.argsort(-scores)[:TOP_K])
        assert set(chosen) == set(want)
        total = scores[want].sum() if renormalize else 1
        by_expert = {e: scores[e] / total * (2.5 if biased else 1) for e in want}
        assert w == pytest.approx([by_expert[e] for e in chosen], rel=1e-5)
    assert (changed > T / 4) == biased


@pytest.mark.parametrize(
    "routed",
    [
        layer("softmax", False),
        layer("sqrtsoftplus", True),
        layer("sigmoid", True, use_grouped_topk=True, num_expert_group=4, topk_group=2),
        layer("sigmoid", False, custom_routing_function=lambda: None),
    ],
    ids=["softmax", "sqrtsoftplus", "groups", "a function of its own"],
)
def test_other_layers_are_left_to_vllm(routed: Any) -> None:
    assert _compat.own_routing(routed) is None


def test_older_versions_route_nothing_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    older = SimpleNamespace(select_experts=lambda **given: (torch.ones(T, TOP_K), given))
    monkeypatch.setattr(_compat, "_CPU_ROUTER", "vllm.no_router")
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.fused_moe.cpu_fused_moe", older)
    for routed, groups in ((layer("softmax", False), None), (layer("sigmoid", True), 1)):
        route = _compat.own_routing(routed)
        assert route is not None
        given: Any = route(routed, torch.zeros(T, 8), torch.zeros(T, E))[1]
        assert (given["use_grouped_topk"], given["num_expert_group"]) == (groups == 1, groups)


def test_gpus_route_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms

    monkeypatch.setattr(vllm.platforms, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    assert _compat.own_routing(layer("sigmoid", True)) is None
