"""Products with or of symmetric matrices, stripe by stripe from the diagonal on, in half the multiplications."""

from collections.abc import Iterator

from torch import Tensor

LEAST_STRIPE, MOST_STRIPES = 64, 16
"""Rows of a stripe; into how many a matrix is cut."""


def add_product(total: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Add x^T y, which is symmetric, to the upper triangle of `total`; returns it.

    Args:
        total: [K, K] or [n, K, K].
        x: [T, K] or [n, T, K].
        y: likewise.
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
