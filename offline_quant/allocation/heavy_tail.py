"""Heavy-tail exponent of a weight's spectrum: PL_Alpha_Hill, as AlphaQ (arXiv 2606.04980) allocates by it."""

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError

TAIL_SHARE, LEAST_TAIL = 0.1, 10


def tail_length(eigenvalues: int) -> int:
    """k: a tenth of the eigenvalues, and 10 at least.

    Raises:
        BitsmoeError: fewer than k + 1 eigenvalues.
    """
    k = max(LEAST_TAIL, int(TAIL_SHARE * eigenvalues))
    if eigenvalues <= k:
        raise BitsmoeError(
            f"--objective alphaq: needs matrices of more than {k} rows and columns, found {eigenvalues}; "
            "use another objective"
        )
    return k


def alpha_hill(W: Tensor) -> Tensor:
    """Hill's estimate of the power-law exponent of the squared singular values.

    alpha = 1 + k / sum_{i <= k} ln(lambda_(i) / lambda_(k+1)), lambda_(i) the i-th largest. A smaller alpha means a
    heavier tail, which AlphaQ reads as a better trained matrix that deserves more bits.

    Args:
        W: [..., N, K].

    Returns:
        [...], float64; infinite where the tail is flat.
    """
    values = torch.linalg.svdvals(W.double()).square()
    k = tail_length(values.shape[-1])
    tiny = torch.finfo(torch.float64).tiny
    logs = values[..., : k + 1].clamp(min=tiny).log()
    return 1 + k / (logs[..., :k] - logs[..., k:]).sum(-1)
