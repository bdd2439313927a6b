"""How files hold the routed experts of a layer: matrix by matrix, or stacked, perhaps transposed."""

from collections.abc import Container, Iterator, Mapping

import torch
from torch import Tensor

from bitsmoe_kernels.format.schema import TensorSpec
from bitsmoe_kernels.models.families import MoEShape
from offline_quant.model.expert_weights import ExpertWeights
from offline_quant.model.tensors import Tensors


def is_stacked(shape: MoEShape, layer: int, stored: Container[str]) -> bool:
    """Whether a layer's matrices are stacked, given the names of the stored tensors."""
    return shape.family.stacked is not None or shape.fused_names(layer)[0] in stored


def is_transposed(shape: MoEShape, layer: int, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether a layer's stacked matrices are transposed: files have both forms, which down's shape tells apart."""
    down = specs.get(shape.fused_names(layer)[1])
    usual = (shape.num_experts, shape.hidden_size, shape.intermediate_size)
    return shape.family.transposed and (down is None or down.shape != usual)


def expert_tensor_shapes(
    shape: MoEShape, layer: int, specs: Mapping[str, TensorSpec], experts: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a layer's experts.

    Args:
        shape: of the model.
        layer: index of the decoder layer.
        specs: of the stored tensors, which decide between the forms.
        experts: of them, only that many, where each has tensors of its own.
    """
    E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
    if is_stacked(shape, layer, specs):
        sizes = [(E, H, 2 * I), (E, I, H)] if is_transposed(shape, layer, specs) else [(E, 2 * I, H), (E, H, I)]
        return dict(zip(shape.fused_names(layer), sizes, strict=True))
    sizes_of_one = [(I, H), (I, H), (H, I)]
    each = (shape.expert_names(layer, e) for e in range(min(E, experts)))
    return {name: size for names in each for name, size in zip(names, sizes_of_one, strict=True)}


def read_experts(tensors: Tensors, shape: MoEShape, layer: int, chunk: range) -> ExpertWeights:
    """A chunk of a layer's experts from the files' tensors."""
    H, I = shape.hidden_size, shape.intermediate_size  # noqa: E741
    if is_stacked(shape, layer, tensors):
        part = slice(chunk.start, chunk.stop)
        stacked = (tensors.get(name)[part].float() for name in shape.fused_names(layer))
        transposed = is_transposed(shape, layer, tensors.specs)
        return ExpertWeights(*((w.mT.contiguous() if transposed else w) for w in stacked))
    experts = ExpertWeights(torch.empty(len(chunk), 2 * I, H), torch.empty(len(chunk), H, I))
    for i, e in enumerate(chunk):
        gate, up, down = shape.expert_names(layer, e)
        experts.gate_up[i, :I] = tensors.get(gate)
        experts.gate_up[i, I:] = tensors.get(up)
        experts.down[i] = tensors.get(down)
    return experts


def expert_tensors(shape: MoEShape, layer: int, experts: ExpertWeights) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the tensors that hold a layer's experts: stacked only where the family has no other form."""
    if shape.family.stacked is not None:
        for name, weights in zip(shape.fused_names(layer), experts, strict=True):
            yield name, weights.mT.contiguous() if shape.family.transposed else weights
        return
    for e in range(shape.num_experts):
        matrices = (*experts.gate_up[e].chunk(2), experts.down[e])
        yield from zip(shape.expert_names(layer, e), matrices, strict=True)
