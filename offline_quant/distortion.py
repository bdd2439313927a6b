"""What a component costs at b bits: the Gaussian preview kappa_b, feedback order and conditional variances.

Symbols: n experts of a chunk, K contraction axis, N output axis, F [n, K, N] factors with W = F^T (in the component
space), M [n, K, K] second moments of what enters the contraction.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.statistics import DAMPING
from offline_quant.symmetric import output_energy

TRIANGLE = 128
"""A triangular matrix of this size is inverted at once."""


@lru_cache
def gaussian_quantizer(bits: int) -> tuple[float, float]:
    """The mid-rise uniform quantizer of 2^bits levels that is best for a unit Gaussian.

    Returns:
        (step, mean squared error kappa_b); (0, 1) for 0 bits.
    """
    if bits == 0:
        return 0.0, 1.0
    x = np.linspace(0, 8, 80_001)
    weight = np.exp(-x * x / 2) * np.sqrt(2 / np.pi) * (x[1] - x[0])
    half = 2.0 ** (bits - 1)

    def error(step: float) -> float:
        level = (np.clip(np.floor(x / step), 0, half - 1) + 0.5) * step
        return float(((x - level) ** 2 * weight).sum())

    low, high = 1.0 / 2.0**bits, 10.0 / 2.0**bits
    for _ in range(60):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if error(a) < error(b) else (a, high)
    return (low + high) / 2, error((low + high) / 2)


def kappa(bits: int) -> float:
    """Share of a Gaussian component's energy that is lost at `bits`."""
    return gaussian_quantizer(bits)[1]


def damped(moments: Tensor) -> Tensor:
    """Moments [n, K, K] with as much added to the diagonal as `factorize` does."""
    return factorize(moments).damped(moments)


@dataclass(frozen=True)
class Factor:
    """Factorization of damped moments of n experts.

    Attributes:
        ridge: float32 [n], what was added to the diagonal.
        U: float32 [n, K, K], upper triangular, U^T U the inverse, as GPTQ's feedback uses it.
    """

    ridge: Tensor
    U: Tensor

    @property
    def variances(self) -> Tensor:
        """d_k [n, K], the variance of component k given all those after it.

        What is lost of k where it is quantized first and the others make up for it.
        """
        return self.U.diagonal(dim1=-2, dim2=-1).pow(-2)

    def damped(self, moments: Tensor) -> Tensor:
        """The moments [n, K, K] that were factorized, with the ridge."""
        return _ridged(moments, self.ridge)


def _ridged(moments: Tensor, ridge: Tensor) -> Tensor:
    out = moments.clone()
    out.diagonal(dim1=-2, dim2=-1).add_(ridge[:, None])
    return out


def factorize(moments: Tensor) -> Factor:
    """Add DAMPING times the mean diagonal to second moments [n, K, K], so that they have a factor, and find it.

    Where that is not enough in float32 (fewer distinct tokens than components), ten times as much is added, and so on.

    Raises:
        BitsmoeError: moments that are not finite.
    """
    if not bool(moments.isfinite().all()):
        raise BitsmoeError("second moments of the activations are not finite; the layer's weights are too large")
    ridge = _least_ridge(moments)
    while True:
        # Upper triangular R with R R^T = M, so that U = R^-1.
        root, info = torch.linalg.cholesky_ex(_ridged(moments, ridge).flip(-1, -2))
        failed = info > 0
        if not bool(failed.any()):
            break
        ridge = torch.where(failed, 10 * ridge, ridge)
    return Factor(ridge, _inverse(root.flip(-1, -2)))


def _inverse(R: Tensor) -> Tensor:
    """Of upper triangular R [n, K, K], by halves: a third of the multiplications of solving for the identity."""
    K = R.shape[-1]
    if K <= TRIANGLE:
        return torch.linalg.solve_triangular(R, torch.eye(K, dtype=R.dtype, device=R.device).expand_as(R), upper=True)
    first, last = slice(K // 2), slice(K // 2, None)
    out = torch.zeros_like(R)
    out[:, first, first], out[:, last, last] = _inverse(R[:, first, first]), _inverse(R[:, last, last])
    out[:, first, last] = (out[:, first, first] @ R[:, first, last] @ out[:, last, last]).neg_()
    return out


def _least_ridge(moments: Tensor) -> Tensor:
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    return (DAMPING * mean).clamp(min=torch.finfo(moments.dtype).tiny)


def on_diagonal(moments: Tensor) -> Factor:
    """What stands for the factor where errors are not handed on: components as if they were independent."""
    ridge = _least_ridge(moments)
    return Factor(ridge, _ridged(moments, ridge).diagonal(dim1=-2, dim2=-1).rsqrt().diag_embed())


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


def rank_components(
    F: Tensor, M: Tensor, component_axis: str, sort: bool = True, feedback: bool = True
) -> tuple[Components, Tensor, Factor]:
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
    M = permuted(M, order)
    factor = find(M)
    return Components(order, norms.gather(1, order), factor.variances, total), M, factor


def permuted(M: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of M [n, K, K] in the given order [n, K]."""
    K = M.shape[-1]
    M = M.gather(1, order[:, :, None].expand(-1, -1, K))
    return M.gather(2, order[:, None, :].expand(-1, K, -1))
