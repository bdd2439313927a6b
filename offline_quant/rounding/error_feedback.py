"""Codes and scales for given bit-widths: feedback, closed-form scale refit, coordinate descent. Batched over experts.

A factor F [n, K, N] is quantized to

    F^[k, n] = a[k] * c[n] * (q[k, n] - (2^b - 1) / 2)

with bits b along the contraction axis K (input-side components: a is the component scale) or along N (output-side
components: c is the component scale). The error measured is tr((F - F^)^T M (F - F^)), M [n, K, K] the second moments.
Feedback follows GPTQ (arXiv 2210.17323) along K in the order the caller stored: ascending importance, so that dropped
and 1-bit components hand their error to well-quantized ones. `backends` does the work that goes row by row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from offline_quant.linalg import CholeskyFactor, factorize, on_diagonal
from offline_quant.rounding.backends import select
from offline_quant.rounding.grid import Grid, Quantized, as_half, gaussian_steps

MAX_COLUMN_SCALE = 2.0**15
"""Bound of column scales: an outlier must not take one out of float16. Row scales absorb the rest."""


@dataclass(frozen=True)
class RoundingMode:
    """How much work rounding takes.

    Attributes:
        refine: rounds of scale refit and coordinate descent after the feedback.
        feedback: hand errors on to rows not yet rounded; without, and without `refine`, every row is rounded alone.
        rough: guess scales instead of searching for them, in a third of the time.
    """

    refine: int = 2
    feedback: bool = True
    rough: bool = False

    @classmethod
    def pilot(cls, feedback: bool = True) -> "RoundingMode":
        """For a first pass that only measures what rows hand to one another."""
        return cls(refine=0, feedback=feedback, rough=True)


def quantize(
    F: Tensor,
    M: Tensor,
    width: Tensor,
    along: str,
    mode: RoundingMode = RoundingMode(),
    factor: CholeskyFactor | None = None,
) -> Quantized:
    """Quantize a batch of factors.

    Args:
        F: float32 [n, K, N].
        M: float32 [n, K, K], undamped.
        width: uint8 [n, K] if along is "K", else [n, N].
        along: the axis that the widths run along, "K" or "N".
        mode: how much work it takes.
        factor: of M, where it is known.
    """
    width = width[:, :, None] if along == "K" else width[:, None, :]
    if factor is None:
        factor = factorize(M) if mode.feedback else on_diagonal(M)
    c, grid, backend = _column_scale(F, factor.variances, width), Grid.of(width), select.backend_of(F)
    if mode.feedback:
        out = backend.hand_on(F, factor.U, grid, c, mode.rough)
    else:
        out = backend.round_alone(F, M, factor, grid, c, mode.rough)
    if not mode.refine:
        return out
    best, M = out, factor.damped(M)
    MF = M @ F
    for _ in range(mode.refine):
        out, gradient = backend.refit(M, MF, out, grid)
        out = backend.descend(F, M, out, grid, gradient)
        # Float16 rounding of the scales can undo a gain: keep the best seen, expert by expert.
        better = out.error < best.error
        best = Quantized(
            torch.where(better[:, None, None], out.codes, best.codes),
            torch.where(better[:, None], out.a, best.a),
            torch.where(better[:, None], out.c, best.c),
            best.norms,
            torch.minimum(out.error, best.error),
        )
    return best


def _column_scale(F: Tensor, variances: Tensor, width: Tensor) -> Tensor:
    """c [n, N]: each output's root mean square error energy, and for widths along N the step that suits its bits.

    Magnitude is shared between a and c, so that both stay far from float16's limits.
    """
    rms = (variances[:, :, None] * F.square()).mean(1).sqrt()
    rms = rms.clamp(min=1e-4 * rms.mean(-1, keepdim=True)).clamp(min=1e-12)
    c = rms / rms.log().mean(-1, keepdim=True).exp()
    c = c * F.square().mean((1, 2)).sqrt().sqrt().clamp(min=1e-6)[:, None]
    if width.shape[1] == 1:
        c = c * gaussian_steps(F.device)[width[:, 0].long()]
    excess = (c.amax(-1, keepdim=True) / MAX_COLUMN_SCALE).clamp(min=1)
    return as_half(c / torch.exp2(excess.log2().ceil()))
