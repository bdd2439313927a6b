"""A layer of routed experts in the plugin's hands, without an engine: the method and the module as vLLM makes them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from bitsmoe_kernels.backends.base import Target
from bitsmoe_vllm import moe_method
from builders import MadeLayer

SIZES = {"num_experts": 4, "hidden_size": 48, "intermediate_size": 64}


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    """The method takes this process for one with a GPU."""
    monkeypatch.setattr(moe_method, "compute_target", lambda dtype: Target("cuda", capability, dtype))


def log_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the method says from now on, formatted; a warning begins with WARNING."""
    said: list[str] = []
    logger = SimpleNamespace(
        info_once=lambda message, *args: said.append(message % args),
        warning_once=lambda message, *args: said.append("WARNING " + message % args),
    )
    monkeypatch.setattr(moe_method, "logger", logger)
    return said


def route_by_softmax(module: Any) -> None:
    """Routing that vLLM's router for CPUs does."""
    module.use_grouped_topk, module.custom_routing_function = False, None
    module.scoring_func, module.e_score_correction_bias = "softmax", None


def loaded(
    made: MadeLayer,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    before_loading: Callable[[torch.nn.Module], None] = lambda module: None,
    tp_size: int = 1,
    expert_map: torch.Tensor | None = None,
) -> tuple[Any, Any]:
    """The method and module of a layer, all tensors loaded, as vLLM makes them."""
    parallel = SimpleNamespace(tp_rank=0, tp_size=tp_size, enable_eplb=False)
    moe = SimpleNamespace(
        moe_parallel_config=parallel,
        num_experts=SIZES["num_experts"],
        intermediate_size=SIZES["intermediate_size"],
        has_bias=False,
    )
    module: Any = torch.nn.Module()
    module.moe_config, module.expert_map, module.swiglu_limit = moe, expert_map, None
    module.activation, module.apply_router_weight_on_input = MoEActivation.SILU, False
    route_by_softmax(module)
    config = SimpleNamespace(load_config=SimpleNamespace(load_format="auto"))
    monkeypatch.setattr(moe_method, "get_current_vllm_config", lambda: config)
    method = moe_method.BitsmoeMoEMethod(module, "experts", made.layer, made.block_size, [])
    method.create_weights(module, SIZES["num_experts"], SIZES["hidden_size"], SIZES["intermediate_size"], dtype)
    before_loading(module)
    assert set(method.loader.load_weights(made.tensors.items())) == set(made.tensors)
    method.process_weights_after_loading(module)
    return method, module


def call(method: Any, module: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, routing weights, expert ids, and what the method makes of them."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(5, SIZES["hidden_size"], generator=gen).to(dtype)
    ids = torch.rand(5, SIZES["num_experts"], generator=gen).topk(2).indices.int()
    weights = torch.rand(5, 2, generator=gen)
    return x, weights, ids, method.apply(module, x, weights, ids)
