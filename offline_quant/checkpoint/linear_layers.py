"""Linear layers outside the routed experts, quantized to 8 or 4 bits."""

import re
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError, fault_list
from bitsmoe_kernels.format.linear_layers import (
    GROUP,
    DenseBits,
    DenseConfig,
    DenseGroup,
    DenseWeights,
    dense_linears,
    dequantize,
    pack,
)
from bitsmoe_kernels.format.safetensors_io import ShardWriter
from bitsmoe_kernels.format.schema import TensorSpec
from offline_quant.model.expert_weights import ExpertWeights
from offline_quant.model.source import SourceModel
from offline_quant.model.tensors import Tensors, WeightSource

_SCALES = {4: torch.linspace(1.0, 0.5, 21), 8: torch.linspace(1.004, 0.96, 12)}
"""Scales that are tried, relative to the one that clips nothing. At 4 bits, clipping the few largest values pays. At 8
bits it does not; the best of some neighbouring scales in bfloat16 is still better than one."""
_CHUNK = 1 << 21
"""Weights that are quantized at a time."""
_IN_LAYER = re.compile(r"(model\.layers\.\d+\.(.+))\.weight")


def dense_plan(source: SourceModel, bits: Literal[4, 8, 16]) -> DenseConfig | None:
    """Choose how every linear layer outside the experts is stored; None with 16 bits.

    Raises:
        BitsmoeError: lists all matrices of a shape that no engine's kernels take.
    """
    if bits == 16:
        return None
    if source.shape.family.text:
        raise BitsmoeError(
            f"--dense-bits {bits}: {source.directory} is a model of several parts, whose linear layers stay at 16 "
            "bits; use --dense-bits 16"
        )
    unknown = BitsmoeError(
        f"--dense-bits {bits}: {source.directory} has no linear layers of known names outside its routed experts"
    )
    if not source.shape.family.decoder(0).startswith("model.layers."):
        raise unknown
    specs, per_word = source.tensors.specs, 32 // bits
    targets: dict[str, list[str]] = {"group": [], "channel": []}
    faults = []
    for linear in dense_linears(source.config, specs):
        for name in linear.names:
            spec = specs[f"{name}.weight"]
            columns = spec.shape[-1]
            if len(spec.shape) != 2 or columns % per_word:
                faults.append(
                    f"tensor {name}.weight is {spec}; a matrix with a multiple of {per_word} columns is needed"
                )
            # One group is a row: as such it can be divided among ranks.
            targets["group" if columns % GROUP == 0 and columns > GROUP else "channel"].append(name)
    if faults:
        raise BitsmoeError(fault_list(f"--dense-bits {bits}: cannot store, so use --dense-bits 16", faults))
    groups = {}
    for strategy in ("group", "channel"):
        if named := targets[strategy]:
            weights = DenseWeights(num_bits=bits, strategy=strategy, group_size=GROUP if strategy == "group" else None)
            groups[strategy] = DenseGroup(targets=tuple(named), weights=weights)
    if not groups:
        raise unknown
    return DenseConfig(quant_method="compressed-tensors", format="pack-quantized", config_groups=groups)


def left_at_16_bits(source: SourceModel, dense: DenseConfig) -> list[str]:
    """Matrices outside the experts that `dense_plan` does not quantize, by their names within a decoder layer."""
    found = (_IN_LAYER.fullmatch(name) for name, spec in source.tensors.specs.items() if len(spec.shape) == 2)
    inside = {match[1]: match[2] for match in found if match and not source.shape.is_expert_tensor(match[0])}
    return sorted({name for module, name in inside.items() if module not in dense.matrices})


@torch.no_grad()
def quantize_matrix(weight: Tensor, bits: DenseBits, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Round a matrix, each group with the scale of least squared error among those tried.

    Args:
        weight: [N, K], K a multiple of the group size.
        bits: of a code.
        group_size: columns that share a scale; None: whole rows.

    Returns:
        Codes int8 [N, K] and scales bfloat16 [N, groups].
    """
    rows, columns = weight.shape
    size = group_size or columns
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scale = torch.empty(rows, columns // size, dtype=torch.bfloat16)
    step = max(1, _CHUNK // columns)
    for at in range(0, rows, step):
        part = weight[at : at + step].float().reshape(-1, size)
        q, s = _quantize_groups(part, bits)
        codes[at : at + step] = q.view(-1, columns)
        scale[at : at + step] = s.view(-1, columns // size)
    return codes, scale


def _quantize_groups(x: Tensor, bits: DenseBits) -> tuple[Tensor, Tensor]:
    """Codes int8 [n, size] and scales bfloat16 [n] of groups [n, size]."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    widest = x.abs().amax(1) / high
    best = torch.full_like(widest, torch.inf)
    scale = torch.ones_like(widest)

    def rounded(s: Tensor) -> Tensor:
        return (x / s[:, None]).round_().clamp_(low, high)

    def consider(s: Tensor) -> None:
        # Scales are stored in bfloat16. A group of zeros, or of values too small for a scale, is zero with any.
        s = s.bfloat16().float()
        s = torch.where(s > 0, s, 1.0)
        error = (rounded(s) * s[:, None] - x).square_().sum(1)
        better = error < best
        best[better], scale[better] = error[better], s[better]

    for factor in _SCALES[bits].tolist():
        consider(widest * factor)
    # The last candidate is the scale that fits the best codes.
    q = rounded(scale)
    consider((q * x).sum(1) / q.square().sum(1).clamp(min=1))
    return rounded(scale).to(torch.int8), scale.bfloat16()


class DenseTensors:
    """A model's tensors with some matrices replaced by their dequantized form.

    A matrix is quantized again whenever it is read: a fraction of the work on a layer's experts.

    Args:
        source: the tensors.
        dense: which are replaced.
    """

    def __init__(self, source: Tensors, dense: DenseConfig):
        self.source, self.matrices = source, dense.matrices
        self.specs: Mapping[str, TensorSpec] = source.specs

    def __contains__(self, name: object) -> bool:
        return name in self.source

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU; replaced ones in float32."""
        stored = self.stored(name)
        if stored is None:
            return self.source.get(name)
        form = self.matrices[name.removesuffix(".weight")]
        return dequantize(stored["weight_packed"], stored["weight_scale"], form.num_bits)

    def stored(self, name: str) -> dict[str, Tensor] | None:
        """The stored tensors of a quantized matrix, by the last part of their names; None for any other tensor."""
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in self.matrices:
            return None
        form = self.matrices[module]
        weight = self.source.get(name)
        codes, scale = quantize_matrix(weight, form.num_bits, form.group_size)
        return {
            "weight_packed": pack(codes, form.num_bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }


class DenseModel:
    """A model whose linear layers outside the experts are quantized, for calibration.

    Args:
        source: the model.
        dense: which layers.
    """

    def __init__(self, source: SourceModel, dense: DenseConfig):
        self.directory, self.config, self.shape = source.directory, source.config, source.shape
        self.tensors = DenseTensors(source.tensors, dense)
        self._source: WeightSource = source

    def experts(self, layer: int, chunk: range | None = None) -> ExpertWeights:
        """The original's routed experts of a layer, see `WeightSource`."""
        return self._source.experts(layer, chunk)


def write_other_tensors(source: SourceModel, dense: DenseConfig | None, writer: ShardWriter) -> None:
    """Write everything but the routed experts, quantized where `dense` says so."""
    tensors = None if dense is None else DenseTensors(source.tensors, dense)
    for name in source.tensors:
        if source.shape.is_expert_tensor(name):
            continue
        if tensors is None or (stored := tensors.stored(name)) is None:
            writer.add(name, source.tensors.get(name))
            continue
        for part, tensor in stored.items():
            writer.add(f"{name.removesuffix('.weight')}.{part}", tensor)
