"""Low-rank compensators: the rank-r matrix that makes up best for what quantization left over.

Symbols: R [n, K, N] residuals of n experts, M [n, K, K] damped second moments of what enters the contraction.
"""

import torch
from torch import Tensor


def tail_energies(R: Tensor, M: Tensor) -> Tensor:
    """What of tr(R^T M R) remains after the best compensator of rank r, for r = 0 .. min(K, N): [n, min(K, N) + 1]."""
    root = torch.linalg.cholesky(M)
    energy = torch.linalg.svdvals(root.mT @ R).square()
    tail = energy.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([tail, tail.new_zeros(len(tail), 1)], -1)


def fit(R: Tensor, M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best compensator V^T U of rank r: minimises tr((R - V^T U)^T M (R - V^T U)).

    Returns:
        V [n, r, K] and U [n, r, N], of equal norm for each pair so that float16 holds both.
    """
    root = torch.linalg.cholesky(M)
    left, value, right = torch.linalg.svd(root.mT @ R, full_matrices=False)
    V = torch.linalg.solve_triangular(root.mT, left[..., :rank], upper=True).mT
    U = value[:, :rank, None] * right[:, :rank]
    norms = V.norm(dim=-1, keepdim=True), U.norm(dim=-1, keepdim=True)
    balance = (norms[1] / norms[0].clamp(min=1e-30)).sqrt()
    return V * balance, U / balance.clamp(min=1e-30)
