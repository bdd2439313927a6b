"""The backend of the Triton kernels. Importing it needs no Triton: `triton_launch.py` does, at the first call."""

import json
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from bitsmoe_kernels import _triton
from bitsmoe_kernels.backends.base import Backend, Prepared, Target, moe_op
from bitsmoe_kernels.backends.launch_config import kwidth_of, why_no_table
from bitsmoe_kernels.format.schema import Layer
from bitsmoe_kernels.layout.pack import KernelLayer, to_kernel_layout, unsupported
from bitsmoe_kernels.reference import LayerWeights

DTYPES = (torch.float16, torch.bfloat16)


def kernel_key(layer: KernelLayer) -> str:
    """The op's static description of a layer's tensors."""
    return json.dumps({"static": layer.static(), "names": list(layer.tensors())})


@lru_cache(maxsize=1024)
def _parse_kernel_key(key: str) -> tuple[dict[str, int], list[str]]:
    data = json.loads(key)
    return data["static"], data["names"]


@moe_op("bitsmoe::moe_kernels")
def moe_kernels_op(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    tensors: Sequence[Tensor],
    key: str,
) -> Tensor:
    """`triton_launch.moe_forward` as an op: free of synchronization, for CUDA graphs.

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
    from bitsmoe_kernels.backends import triton_launch

    static, names = _parse_kernel_key(key)
    layer = KernelLayer.of(dict(zip(names, tensors, strict=True)), static)
    return triton_launch.moe_forward(layer, x, topk_weights, topk_ids, expert_map)


class TritonMoE(Backend):
    """Computes a layer on an NVIDIA GPU from codes in the kernels' layout."""

    name = "Triton kernels"
    device_type = "cuda"
    cuda_graphs = True
    compute = staticmethod(moe_kernels_op)

    def why_not(self, layer: Layer, target: Target) -> str | None:
        """See `Backend`: the device, the dtype, a missing package, or what `layout` cannot pack."""
        if target.capability is None:
            return "there is no CUDA device"
        if reason := why_no_table(target.capability):
            return reason
        if target.dtype not in DTYPES:
            return f"activations are {target.dtype_name}, not float16 or bfloat16"
        return _triton.why_not() or unsupported(layer)

    def describe(self, target: Target) -> str:
        """See `Backend`."""
        return f"Triton kernels: mixed-bit grouped GEMM for sm_{target.capability}, {target.dtype_name}"

    def prepare(self, weights: LayerWeights, target: Target) -> Prepared:
        """The layer in the kernels' layout, see `layout`."""
        assert target.capability is not None
        packed = to_kernel_layout(weights, target.dtype, kwidth_of(target.capability))
        return Prepared({f"kernel_{name}": tensor for name, tensor in packed.tensors().items()}, kernel_key(packed))
