"""The backend that computes with plain torch, `reference.moe_forward`: any layer on any device, slowly."""

import json
from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from bitsmoe_kernels.backends.base import Backend, Prepared, Target, moe_op
from bitsmoe_kernels.format.schema import Layer
from bitsmoe_kernels.reference import LayerWeights, moe_forward


def layout_key(layer: Layer, block_size: int) -> str:
    """The op's static description of a layer's tensors."""
    # Keys stay in their order: it is the order of the tensors.
    return json.dumps({"block_size": block_size, "layer": layer.model_dump(mode="json")})


@lru_cache(maxsize=1024)
def _parse_layout(key: str) -> tuple[Layer, int, list[str]]:
    data = json.loads(key)
    layer = Layer.model_validate(data["layer"])
    return layer, data["block_size"], list(layer.tensor_specs(data["block_size"]))


@moe_op("bitsmoe::moe_forward")
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


class TorchReference(Backend):
    """Computes any layer from the tensors of the file, one expert after another, in float32."""

    name = "the torch reference path"
    device_type = None
    cuda_graphs = False
    slow = True
    compute = staticmethod(moe_forward_op)

    def why_not(self, layer: Layer, target: Target) -> str | None:
        """None: it computes everything."""
        return None

    def describe(self, target: Target) -> str:
        """See `Backend`."""
        if target.device_type == "cpu":
            return "the torch reference path, on the CPU"
        return "the torch REFERENCE path: right, but very slow"

    def prepare(self, weights: LayerWeights, target: Target) -> Prepared:
        """The file's own tensors."""
        names = weights.layer.tensor_specs(weights.block_size)
        return Prepared({name: weights.tensors[name] for name in names}, layout_key(weights.layer, weights.block_size))
