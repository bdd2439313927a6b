"""Second moments: products, damping, Cholesky factors, permutation.

Products with or of symmetric matrices go stripe by stripe from the diagonal on, in half the multiplications.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError

LEAST_STRIPE, MOST_STRIPES = 64, 16
"""Rows of a stripe; into how many a matrix is cut."""
TRIANGLE = 128
"""A triangular matrix of this size is inverted at once."""
DAMPING = 0.01
"""Added to the diagonal of moments, relative to its mean (GPTQ's customary 1%)."""
SHRINKAGE = 0.1
"""Share by which moments that rounding goes by are moved towards their diagonal first. Correlations of the calibration
text are not quite those of other text (docs/log/2026-12-03.md)."""


def add_product(total: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Add x^T y, which is symmetric, to the upper triangle of `total`; returns it.

    Args:
        total: [K, K] or [n, K, K].
        x: [T, K] or [n, T, K].
        y: of the shape of x.
    """
    for rows, _ in _stripes(total.shape[-1]):
        own = slice(rows.start, None)
        stripe = total[..., rows, own]
        add = stripe.addmm_ if total.ndim == 2 else stripe.baddbmm_
        add(x[..., rows].mT, y[..., own])
    return total


def mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrix [..., K, K] whose upper triangle is given."""
    return upper.triu() + upper.triu(1).mT


def output_energy(F: Tensor, M: Tensor) -> Tensor:
    """tr(F^T M F) [n], what factors F [n, K, N] put out for inputs of second moments M [n, K, K]."""
    total = F.new_zeros(len(F))
    for rows, after in _stripes(M.shape[-1]):
        product = M[:, rows, rows] @ F[:, rows]
        if after.start < M.shape[-1]:
            product.baddbmm_(M[:, rows, after], F[:, after], alpha=2)  # as much again from below the diagonal
        total += product.mul_(F[:, rows]).sum((1, 2))
    return total


def _stripes(K: int) -> Iterator[tuple[slice, slice]]:
    """Rows of every stripe, and those after it."""
    width = max(LEAST_STRIPE, K // MOST_STRIPES)
    for k in range(0, K, width):
        yield slice(k, k + width), slice(k + width, None)


def add_damping(moments: Tensor) -> Tensor:
    """Moments [n, K, K], shrunk and damped as `factorize` does it."""
    return factorize(moments).damped(moments)


@dataclass(frozen=True)
class CholeskyFactor:
    """Factorization of shrunk and damped moments of n experts.

    Attributes:
        ridge: float32 [n], what was added to the diagonal after shrinking.
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
        """The moments [n, K, K] that were factorized: shrunk, with the ridge."""
        return _shrunk(moments, self.ridge)

    def damped_energy(self, energy: Tensor, F: Tensor, M: Tensor) -> Tensor:
        """tr(F^T M' F) [n] for the damped M' of moments M [n, K, K]; `energy` is that of M itself."""
        own = SHRINKAGE * M.diagonal(dim1=-2, dim2=-1) + self.ridge[:, None]
        return (1 - SHRINKAGE) * energy + (own[:, :, None] * F.square()).sum((1, 2))


def _shrunk(moments: Tensor, ridge: Tensor) -> Tensor:
    out = moments * (1 - SHRINKAGE)
    out.diagonal(dim1=-2, dim2=-1).copy_(moments.diagonal(dim1=-2, dim2=-1) + ridge[:, None])
    return out


def factorize(moments: Tensor) -> CholeskyFactor:
    """Factor of second moments [n, K, K], moved towards their diagonal by SHRINKAGE, and with a ridge.

    The ridge is DAMPING times the mean diagonal. Where that is not enough in float32 (fewer distinct tokens than
    components), ten times as much is added, and so on.

    Raises:
        BitsmoeError: moments that are not finite.
    """
    if not bool(moments.isfinite().all()):
        raise BitsmoeError("second moments of the activations are not finite; the layer's weights are too large")
    ridge = _least_ridge(moments)
    while True:
        # Upper triangular R with R R^T = M, so that U = R^-1.
        root, info = torch.linalg.cholesky_ex(_shrunk(moments, ridge).flip(-1, -2))
        failed = info > 0
        if not bool(failed.any()):
            break
        ridge = torch.where(failed, 10 * ridge, ridge)
    return CholeskyFactor(ridge, _inverse(root.flip(-1, -2)))


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


def solve_damped(moments: Tensor, right: Tensor) -> Tensor:
    """X of (M + ridge I) X = B, with DAMPING times M's mean diagonal as the ridge.

    Args:
        moments: M [K, K].
        right: B [K, N].
    """
    return torch.linalg.solve(_damped(moments), right)


def unit_directions(moments: Tensor) -> Tensor:
    """Columns U [K, K] with U^T (M + ridge I) U = I, the principal directions; `ridge` as in `solve_damped`."""
    energy, directions = torch.linalg.eigh(_damped(moments))
    return directions * energy.rsqrt()


def _damped(moments: Tensor) -> Tensor:
    ridge = (DAMPING * moments.diagonal().mean()).clamp(min=torch.finfo(moments.dtype).tiny)
    return moments + ridge * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)


def on_diagonal(moments: Tensor) -> CholeskyFactor:
    """The factor of the diagonal of moments, for rounding without feedback: components count as independent."""
    ridge = _least_ridge(moments)
    return CholeskyFactor(ridge, (moments.diagonal(dim1=-2, dim2=-1) + ridge[:, None]).rsqrt().diag_embed())


def permute(M: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of M [n, K, K] in the given order [n, K]."""
    K = M.shape[-1]
    M = M.gather(1, order[:, :, None].expand(-1, -1, K))
    return M.gather(2, order[:, None, :].expand(-1, K, -1))
