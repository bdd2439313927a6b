"""Experts whose up and down matrices have sizes of the same order."""

import torch
from torch import Tensor

UNBALANCED = 2.0**8
"""Ratio of an expert's up to its down matrix from which the two are brought together, see `balance_up_and_down`."""


def balance_up_and_down(gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Experts that compute the same, without up and down of very different sizes.

    A power of two goes from one to the other. Errors of both are weighed together, and their scales are float16.
    Ordinary experts stay as they are.

    Args:
        gate_up: [n, 2 I, H].
        down: [n, H, I].
    """
    gate, up = gate_up.chunk(2, 1)
    sizes = [torch.maximum(w.amax((1, 2)), -w.amin((1, 2))) for w in (up, down)]
    ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), sizes[0] / sizes[1], 1.0)
    unbalanced = (ratio > UNBALANCED) | (ratio < 1 / UNBALANCED)
    if not bool(unbalanced.any()):
        return gate_up, down
    shift = torch.exp2((0.5 * ratio.log2()).round().clamp(-48, 48)).where(unbalanced, 1.0)[:, None, None]
    return torch.cat([gate, up / shift], 1), down * shift
