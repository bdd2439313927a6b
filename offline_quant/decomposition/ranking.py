"""Components of a projection in order of importance, with what each is worth.

Symbols: n experts of a chunk, K contraction axis, N output axis, F [n, K, N] factors with W = F^T (in the component
space), M [n, K, K] second moments of what enters the contraction.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_kernels.format.schema import ProjectionName
from offline_quant.decomposition.bases import Decomposition
from offline_quant.linalg import CholeskyFactor, factorize, on_diagonal, output_energy, permute


@dataclass(frozen=True)
class Components:
    """The components of one projection of some experts, in ascending order of importance.

    Attributes:
        order: int64 [n, C], stored row -> component.
        norms: float32 [n, C], squared norm of the stored row; with what other rows hand it, once that was measured.
        variance: float32 [n, C], of the stored row's component, given those after it. Where components are outputs,
            the variances are within `norms` and this is one.
        total: float32 [n], energy of the projection's output.
    """

    order: Tensor
    norms: Tensor
    variance: Tensor
    total: Tensor

    @property
    def energy(self) -> Tensor:
        """Error energy at the output if the row is dropped and all later ones make up for it, [n, C]."""
        return self.variance * self.norms

    def cpu(self) -> "Components":
        """The same in the CPU's memory."""
        return Components(self.order.cpu(), self.norms.cpu(), self.variance.cpu(), self.total.cpu())

    def part(self, experts: slice) -> "Components":
        """Those of some experts."""
        return Components(*(getattr(self, f)[experts] for f in ("order", "norms", "variance", "total")))

    @classmethod
    def concatenate(cls, parts: "Sequence[Components]", device: torch.device) -> "Components":
        """Those of several chunks of experts, on a device."""
        return cls(
            *(torch.cat([getattr(p, f) for p in parts]).to(device) for f in ("order", "norms", "variance", "total"))
        )


def rank_components(
    F: Tensor, M: Tensor, component_axis: str, sort: bool = True, feedback: bool = True
) -> tuple[Components, Tensor, CholeskyFactor]:
    """Order and weigh components: the contraction axis for "input", the output axis for "output".

    Args:
        F: [n, K, N].
        M: [n, K, K].
        component_axis: which.
        sort: by ascending importance; else in their own order.
        feedback: whether later components make up for the error of earlier ones.

    Returns:
        The components, and M and its factor with rows in stored order.
    """
    find = factorize if feedback else on_diagonal
    total = output_energy(F, M)
    if component_axis == "output":
        factor = find(M)
        energy = (factor.variances[:, :, None] * F.square()).sum(1)
        order = energy.argsort(dim=-1, stable=True)
        return Components(order, energy.gather(1, order), torch.ones_like(energy), total), M, factor
    norms = F.square().sum(-1)
    importance = M.diagonal(dim1=-2, dim2=-1) * norms if sort else torch.zeros_like(norms)
    order = importance.argsort(dim=-1, stable=True)
    M = permute(M, order)
    factor = find(M)
    return Components(order, norms.gather(1, order), factor.variances, total), M, factor


@dataclass(frozen=True)
class RankedProjection:
    """A projection's decomposition and the importance of its components, before bits are chosen.

    Attributes:
        decomposition: of the projection.
        components: of all experts, in order of importance.
        key: what its moments and their factors are kept under.
        ridge: float32 [E], added to the diagonal of the moments before they were factorized.
    """

    decomposition: Decomposition
    components: Components
    key: str
    ridge: Tensor

    @property
    def name(self) -> ProjectionName:
        """Which projection."""
        return self.decomposition.name

    def order(self, chunk: range) -> Tensor:
        """Component of every stored row of some experts, int64 [n, C]."""
        return self.components.order[chunk.start : chunk.stop]
