"""Bases shared by the experts of a layer, and the factors of every expert in them.

Options (BitsMoE, arXiv 2606.00079, and its whitened form):

    natural   no basis: components are the channels themselves, no bytes
    whitened  SVD of [W_1; ...; W_E] C^(1/2): rows of V^T C^(-1/2), shared by gate and up. Noise in any component then
              weighs the same at the output, so a component's energy is its importance
    paper     SVD of the stacked weights alone: a right basis for gate, one for up, a left basis for down
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from bitsmoe_kernels.format.schema import Axis, Basis, ProjectionName
from offline_quant.linalg import DAMPING, add_product, mirrored


@dataclass(frozen=True)
class Decomposition:
    """How one projection W [N, K] of every expert becomes a factor F [K', N'] with components on one side.

    Attributes:
        name: the projection.
        component_axis: the side of the components.
        basis: [R, side], R = side, float32 as it will be read back from the file, or None.
        tensors: `basis`, `basis_scale` as stored.
        spec: the schema's entry for the basis.
    """

    name: ProjectionName
    component_axis: Axis = "input"
    basis: Tensor | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    spec: Basis | None = None

    @cached_property
    def _inverse(self) -> Tensor:
        """[side, R], float32."""
        assert self.basis is not None
        return torch.linalg.inv(self.basis.double()).float()

    def factors(self, W: Tensor) -> Tensor:
        """F of experts W [n, N, K]: [n, K or R, N] for input-side components, [n, K, N or R] for output-side ones.

        The basis is square, so factors of its stored form undo the rounding of its rows exactly.
        """
        if self.basis is None:
            return W.mT.contiguous()
        inverse = self._inverse
        if self.component_axis == "input":
            return (W @ inverse).mT.contiguous()  # W = F^T B
        return W.mT @ inverse  # W = B^T F^T

    def moments(self, M: Tensor) -> Tensor:
        """Second moments of what enters the contraction, given those of the projection's input [n, K, K]."""
        if self.basis is None or self.component_axis == "output":
            return M
        B = self.basis.T.expand(len(M), -1, -1)
        return mirrored(add_product(torch.zeros_like(M), B, M @ B))


def natural(name: ProjectionName) -> Decomposition:
    """No basis."""
    return Decomposition(name)


def whitened(name: ProjectionName, gram: Tensor, C: Tensor, bits: int) -> Decomposition:
    """Basis on the input side from weights and activations.

    Args:
        name: the projection.
        gram: float64 [H, H], sum_e weight_e W_e^T W_e over the experts.
        C: [H, H] second moments of the input, pooled over the layer's tokens.
        bits: 8 or 16, of the stored basis.
    """
    C = C.to(torch.float64, copy=True)
    C.diagonal().add_(DAMPING * C.diagonal().mean() or 1.0)  # where nothing ever enters, any basis will do
    value, vector = torch.linalg.eigh(C)
    del C  # [H, H] in float64 weighs much in a large model, so each goes as soon as it can
    root = (vector * value.sqrt()) @ vector.T
    product = root @ gram @ root
    del root
    _, V = torch.linalg.eigh(product)
    del product
    inverse_root = (vector / value.sqrt()) @ vector.T
    return stored_basis(name, "input", (V.flip(-1).T @ inverse_root).float(), bits)


def paper(name: ProjectionName, gram: Tensor, component_axis: Axis, bits: int) -> Decomposition:
    """Singular vectors of the stacked weights, right ones on the input side, left ones on the output side.

    Args:
        name: the projection.
        gram: float64 [side, side], sum_e W_e^T W_e for the input side, sum_e W_e W_e^T for the output side.
        component_axis: which.
        bits: 8 or 16, of the stored basis.
    """
    _, V = torch.linalg.eigh(gram)
    return stored_basis(name, component_axis, V.flip(-1).T.float(), bits)


def stored_basis(name: ProjectionName, axis: Axis, rows: Tensor, bits: int) -> Decomposition:
    """The decomposition with given basis rows, rounded as the file stores them.

    Args:
        name: the projection.
        axis: the side of the components.
        rows: float32 [side, side].
        bits: 8 or 16, of the stored basis.
    """
    if bits == 16:
        half = (rows / rows.abs().amax(1, keepdim=True)).half()
        return Decomposition(name, axis, half.float(), {"basis": half}, Basis(rank=len(rows), bits=16))
    scale = rows.abs().amax(1) / 127
    codes = (rows / scale[:, None]).round().to(torch.int8)
    tensors = {"basis": codes, "basis_scale": scale}
    return Decomposition(name, axis, codes.float() * scale[:, None], tensors, Basis(rank=len(rows), bits=8))
