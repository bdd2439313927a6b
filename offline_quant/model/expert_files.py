"""How files hold the routed experts of a layer: matrix by matrix, or stacked, perhaps transposed or interleaved."""

from collections.abc import Container, Iterator, Mapping

import torch
from torch import Tensor

from bitsmoe_kernels.format.safetensors_io import ShardReader
from bitsmoe_kernels.format.schema import TensorSpec
from bitsmoe_kernels.models.families import Family, MoEShape, bias_name
from offline_quant.model.expert_weights import ExpertBiases, ExpertWeights


def is_stacked(shape: MoEShape, layer: int, stored: Container[str]) -> bool:
    """Whether a layer's matrices are stacked, given the names of the stored tensors."""
    return shape.family.stacked is not None or shape.fused_names(layer)[0] in stored


def is_transposed(shape: MoEShape, layer: int, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether a layer's stacked matrices are transposed: some files have both forms, which down's shape tells apart."""
    down = specs.get(shape.fused_names(layer)[1])
    usual = (shape.of_layer(layer).num_experts, shape.hidden_size, shape.intermediate_size)
    always = shape.family.interleaved or shape.family.module_transposed
    return always or (shape.family.transposed and (down is None or down.shape != usual))


def _interleaved(both: Tensor) -> Tensor:
    """Gate and up [n, 2 I, ...], one behind the other, in turn."""
    return torch.stack(both.chunk(2, 1), 2).flatten(1, 2)


def _apart(both: Tensor) -> Tensor:
    """The reverse of `_interleaved`."""
    return torch.cat([both[:, 0::2], both[:, 1::2]], 1)


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
    E, H, I = shape.of_layer(layer).num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
    if is_stacked(shape, layer, specs):
        names = shape.fused_names(layer)
        N = shape.input_matrices * I
        sizes: list[tuple[int, ...]] = [(E, N, H), (E, H, I)]
        if is_transposed(shape, layer, specs):
            sizes = [(E, H, N), (E, I, H)]
        biases = zip(map(bias_name, names), [(E, N), (E, H)], strict=True) if shape.family.bias else ()
        return dict([*zip(names, sizes, strict=True), *biases])
    each = (shape.expert_names(layer, e) for e in range(min(E, experts)))
    return {name: size for names in each for name, size in zip(names, shape.matrix_sizes, strict=True)}


def read_experts(tensors: ShardReader, shape: MoEShape, layer: int, chunk: range) -> ExpertWeights:
    """A chunk of a layer's experts from the files' tensors."""
    H, I = shape.hidden_size, shape.intermediate_size  # noqa: E741
    if is_stacked(shape, layer, tensors):
        part, names = slice(chunk.start, chunk.stop), shape.fused_names(layer)
        transposed = is_transposed(shape, layer, tensors.specs)
        both, out = (w.mT if transposed else w for w in (tensors.rows(name, part) for name in names))
        if shape.family.interleaved:
            both = _apart(both)
        weights = both.float().contiguous(), out.float().contiguous()
        if not shape.family.bias:
            return ExpertWeights(*weights)
        of_gate_up, of_down = (tensors.rows(bias_name(name), part).float() for name in names)
        of_gate_up = _apart(of_gate_up) if shape.family.interleaved else of_gate_up
        return ExpertWeights(*weights, ExpertBiases(of_gate_up, of_down))
    experts = ExpertWeights(torch.empty(len(chunk), shape.input_matrices * I, H), torch.empty(len(chunk), H, I))
    for i, e in enumerate(chunk):
        *inputs, down = shape.expert_names(layer, e)
        for name, rows in zip(inputs, experts.gate_up[i].split(I), strict=True):
            rows[:] = tensors.get(name)
        experts.down[i] = tensors.get(down)
    return experts


def module_experts(family: Family, held: Mapping[str, Tensor], chunk: range) -> ExpertWeights:
    """The reverse of `module_tensors`, for a chunk of experts, in the parameters' dtype."""
    gate_up, down = (held[name][chunk.start : chunk.stop] for name in family.fused_names)
    biases = None
    if family.bias:
        of_gate_up, of_down = (held[bias_name(name)][chunk.start : chunk.stop] for name in family.fused_names)
        biases = ExpertBiases(_apart(of_gate_up) if family.interleaved else of_gate_up, of_down)
    if family.interleaved or family.module_transposed:
        gate_up, down = gate_up.mT, down.mT
    if family.interleaved:
        gate_up = _apart(gate_up)
    return ExpertWeights(gate_up, down, biases)


def module_tensors(family: Family, experts: ExpertWeights) -> dict[str, Tensor]:
    """Parameters of transformers' experts module, by name."""
    gate_up, down = experts.gate_up, experts.down
    if family.interleaved:
        gate_up = _interleaved(gate_up)
    if family.interleaved or family.module_transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    found = dict(zip(family.fused_names, (gate_up, down), strict=True))
    if experts.biases is not None:
        of_gate_up = _interleaved(experts.biases.gate_up) if family.interleaved else experts.biases.gate_up
        found |= zip(map(bias_name, family.fused_names), (of_gate_up, experts.biases.down), strict=True)
    return found


def expert_tensors(shape: MoEShape, layer: int, experts: ExpertWeights) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the tensors that hold a layer's experts: stacked only where the family has no other form."""
    if shape.family.stacked is not None:
        held, names = module_tensors(shape.family, experts), shape.fused_names(layer)
        for name, own in zip(names, shape.family.fused_names, strict=True):
            turned = shape.family.transposed and not shape.family.module_transposed
            yield name, held[own].mT.contiguous() if turned else held[own]
            if shape.family.bias:
                yield bias_name(name), held[bias_name(own)]
        return
    for e in range(shape.of_layer(layer).num_experts):
        matrices = (*experts.gate_up[e].split(shape.intermediate_size), experts.down[e])
        yield from zip(shape.expert_names(layer, e), matrices, strict=True)
