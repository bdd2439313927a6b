"""A layer of the file's neutral layout to the kernels' layout.

Gate and up are stored for the components of down, in their order: row 2 i is the gate and row 2 i + 1 the up of down's
component i, so that the kernel of gate and up writes what that of down reads. Where gate and up are stored apart each
is a matrix of its own: gate of expert e is matrix 2 e, its up is matrix 2 e + 1. Without a gate row i is the up of
component i.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bitsmoe_kernels.expert_mlp import ACTIVATION_NUMBERS, ACTIVATIONS
from bitsmoe_kernels.format.schema import Layer, ProjectionName
from bitsmoe_kernels.layout.fields import CLASSES, TILE
from bitsmoe_kernels.layout.forms import restricted
from bitsmoe_kernels.layout.matrices import Matrices, MatrixContent, components_of, pack_matrices
from bitsmoe_kernels.reference import LayerWeights, ProjectionWeights


@dataclass(frozen=True)
class KernelLayer:
    """The routed experts of one layer (or of one rank's shard) in the kernels' layout.

    Attributes:
        inputs: gate and up, one matrix for each expert or two (`split`); or up alone.
        down: one matrix for each expert.
        bases: of gate and up together, [R, H] int8 or the activations' dtype; None without a basis.
        basis_scale: float32 [R]; None without a basis.
        split: whether gate and up are matrices of their own.
        fused: whether gate and up are stored in the order of down's components.
        input_widths: one bit for each class of `inputs` that occurs (1: 1-bit codes ... 8: 4-bit codes).
        down_widths: one bit for each class of `down` that occurs.
        kwidth: neighbouring components that one thread of the matrix unit holds: 2 (wgmma) or 4 (mma).
        act: number of the activation, see `ACTIVATION_NUMBERS`.
    """

    inputs: Matrices
    down: Matrices
    basis: Tensor | None
    basis_scale: Tensor | None
    split: bool
    fused: bool
    input_widths: int
    down_widths: int
    kwidth: int
    act: int

    @property
    def in_turn(self) -> bool:
        """Whether rows of `inputs` are gate and up in turn; else each is one component of down."""
        return not self.split and tuple(ACTIVATIONS.values())[self.act].matrices == 2

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        out = {f"{p}_{f.name}": getattr(getattr(self, p), f.name) for p in ("inputs", "down") for f in fields(Matrices)}
        return out | {k: v for k, v in (("basis", self.basis), ("basis_scale", self.basis_scale)) if v is not None}

    def static(self) -> dict[str, int]:
        """All fields that are not tensors."""
        return {k: int(getattr(self, k)) for k in ("split", "fused", "input_widths", "down_widths", "kwidth", "act")}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], static: Mapping[str, int]) -> "KernelLayer":
        """Make a layer from what `tensors` and `static` gave."""
        inputs, down = (Matrices(*(tensors[f"{p}_{f.name}"] for f in fields(Matrices))) for p in ("inputs", "down"))
        return cls(
            inputs, down, tensors.get("basis"), tensors.get("basis_scale"),
            bool(static["split"]), bool(static["fused"]),
            static["input_widths"], static["down_widths"], static["kwidth"], static["act"],
        )  # fmt: skip


def unsupported(layer: Layer) -> str | None:
    """Why the kernels cannot compute this layer; None where they can."""
    if reason := restricted(layer):
        return reason
    if any(p.basis and (p.kept_experts or p.lowrank_total) for p in layer.projections.values()):
        return "a projection has both a basis and experts at 16 bits or compensators"
    return None


def to_kernel_layout(weights: LayerWeights, dtype: torch.dtype, kwidth: int) -> KernelLayer:
    """Re-order a layer for the kernels.

    Args:
        weights: schema and tensors of a layer or shard.
        dtype: of activations, float16 or bfloat16.
        kwidth: see `KernelLayer`.

    Raises:
        ValueError: `unsupported` names a reason.
    """
    if reason := unsupported(weights.layer):
        raise ValueError(reason)
    layer, p = weights.layer, weights.projections
    E = layer.num_experts
    inner = layer.intermediate_size
    down_components = [components_of(p["down"], e, dtype, kwidth) for e in range(E)]
    fused = not layer.projections["down"].lowrank_total
    if fused:
        channels = [torch.cat(r.index) if r.index else torch.empty(0, dtype=torch.int64) for r in down_components]
        live = [torch.cat(r.factor) != 0 if r.factor else torch.empty(0, dtype=torch.bool) for r in down_components]
    else:
        padded = -(-inner // TILE) * TILE
        at = torch.arange(padded, device=p["down"].part("bits").device)
        channels, live = [at.clamp(max=inner - 1)] * E, [at < inner] * E
    every = torch.arange(layer.hidden_size, device=p["down"].part("bits").device)
    down_parts = [MatrixContent(p["down"], e, c, every, every >= 0) for e, c in enumerate(down_components)]
    down = pack_matrices(down_parts, dtype, kwidth)
    split = "gate" in p
    parts = []
    for e in range(E):
        at, on = channels[e].to(every.device), live[e].to(every.device)
        if split:
            parts += [
                MatrixContent(p[n], e, components_of(p[n], e, dtype, kwidth, _source(p, n)), at, on)
                for n in ("gate", "up")
            ]
        elif not layer.gated:
            parts.append(MatrixContent(p["up"], e, components_of(p["up"], e, dtype, kwidth), at, on))
        else:
            both = torch.stack([at, at + inner], 1).flatten()
            components = components_of(p["gate_up"], e, dtype, kwidth)
            parts.append(MatrixContent(p["gate_up"], e, components, both, on.repeat_interleave(2)))
    inputs = pack_matrices(parts, dtype, kwidth)
    basis, basis_scale = _bases([p[n] for n in ("gate_up", "gate", "up") if n in p], dtype)
    act = ACTIVATION_NUMBERS[layer.hidden_act]
    return KernelLayer(inputs, down, basis, basis_scale, split, fused, _widths(inputs), _widths(down), kwidth, act)


def _widths(m: Matrices) -> int:
    return sum(1 << c for c in range(len(CLASSES)) if bool(m.tiles[:, c].any()))


def _source(p: Mapping[ProjectionName, ProjectionWeights], name: ProjectionName) -> int:
    """Where a projection's components begin among the components of all bases."""
    gate = p["gate"].spec.basis
    return gate.rank if name == "up" and gate and p["up"].spec.basis else 0


def _bases(projections: Sequence[ProjectionWeights], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    having = [w for w in projections if w.spec.basis]
    if not having:
        return None, None
    basis = torch.cat([w.part("basis") for w in having])
    if basis.dtype == torch.int8:
        return basis, torch.cat([w.part("basis_scale") for w in having])
    return basis.to(dtype), torch.ones(len(basis), device=basis.device)
