"""The MoE layer as torch custom ops, opaque to torch.compile, with fakes for tracing: one by torch, one by kernels."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitsmoe_kernels.format.schema import Layer
from bitsmoe_kernels.reference import LayerWeights, moe_forward

if TYPE_CHECKING:
    from bitsmoe_kernels.layout.pack import KernelLayer


def layout_key(layer: Layer, block_size: int) -> str:
    """The op's static description of a layer's tensors."""
    # Keys stay in their order: it is the order of the tensors.
    return json.dumps({"block_size": block_size, "layer": layer.model_dump(mode="json")})


@lru_cache(maxsize=1024)
def _parse_layout(key: str) -> tuple[Layer, int, list[str]]:
    data = json.loads(key)
    layer = Layer.model_validate(data["layer"])
    return layer, data["block_size"], list(layer.tensor_specs(data["block_size"]))


@torch.library.custom_op("bitsmoe::moe_forward", mutates_args=())
def moe_forward_op(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    tensors: Sequence[Tensor],
    layout: str,
) -> Tensor:
    """`reference.moe_forward` as an op.

    Args:
        x: [T, H].
        topk_weights: [T, top_k].
        topk_ids: [T, top_k].
        expert_map: see `reference.moe_forward`.
        tensors: the layer's tensors in the order of `Layer.tensor_specs`.
        layout: `layout_key` of the layer.

    Returns:
        [T, H] in x's dtype.
    """
    layer, block_size, names = _parse_layout(layout)
    weights = LayerWeights(layer, block_size, dict(zip(names, tensors, strict=True)))
    return moe_forward(weights, x, topk_weights, topk_ids, expert_map)


def kernel_key(layer: "KernelLayer") -> str:
    """The kernel op's static description of a layer's tensors."""
    return json.dumps({"static": layer.static(), "names": list(layer.tensors())})


@lru_cache(maxsize=1024)
def _parse_kernel_key(key: str) -> tuple[dict[str, int], list[str]]:
    data = json.loads(key)
    return data["static"], data["names"]


@torch.library.custom_op("bitsmoe::moe_kernels", mutates_args=())
def moe_kernels_op(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    tensors: Sequence[Tensor],
    key: str,
) -> Tensor:
    """`moe.moe_forward` as an op: free of synchronization, for CUDA graphs.

    Args:
        x: [T, H], float16 or bfloat16.
        topk_weights: [T, top_k].
        topk_ids: [T, top_k].
        expert_map: see `reference.moe_forward`.
        tensors: `KernelLayer.tensors`, in its order.
        key: `kernel_key` of the layer.

    Returns:
        [T, H] in x's dtype.
    """
    from bitsmoe_kernels.backends import triton_moe as moe
    from bitsmoe_kernels.layout.pack import KernelLayer

    static, names = _parse_kernel_key(key)
    layer = KernelLayer.of(dict(zip(names, tensors, strict=True)), static)
    return moe.moe_forward(layer, x, topk_weights, topk_ids, expert_map)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)  # contiguous, as the ops' results are, whatever the strides of x


moe_forward_op.register_fake(_fake)
moe_kernels_op.register_fake(_fake)
