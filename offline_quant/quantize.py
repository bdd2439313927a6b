"""Codes and scales for given bit-widths: feedback, closed-form scale refit, coordinate descent. Batched over experts.

A factor F [n, K, N] is quantized to

    F^[k, n] = a[k] * c[n] * (q[k, n] - (2^b - 1) / 2)

with bits b along the contraction axis K (input-side components: a is the component scale) or along N (output-side
components: c is the component scale). The error measured is tr((F - F^)^T M (F - F^)), M [n, K, K] the second moments.
Feedback follows GPTQ (arXiv 2210.17323) along K in the order the caller stored: ascending importance, so that dropped
and 1-bit components hand their error to well-quantized ones.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bitsmoe_kernels.format.schema import MAX_BITS
from offline_quant.distortion import damped, feedback_factor, gaussian_quantizer

COLUMN_BLOCK = 64
_SCALE_CANDIDATES = (0.7, 0.85, 1.0, 1.2)
_SCALE_STEPS = 3


@dataclass
class Quantized:
    """Codes and scales of a batch of factors.

    Attributes:
        codes: uint8 [n, K, N].
        a: [n, K], and
        c: [n, N]: scales, float32 values that float16 holds exactly.
        norms: [n, K], squared norms of the rows as they were rounded, with what others had handed them.
    """

    codes: Tensor
    a: Tensor
    c: Tensor
    norms: Tensor

    def dequantize(self, width: Tensor) -> Tensor:
        """F^ [n, K, N], float32."""
        return self.a[:, :, None] * self.c[:, None] * _centred(self.codes, width)


def quantize(
    F: Tensor, M: Tensor, width: Tensor, along: str, passes: int = 2, feedback: bool = True, rough: bool = False
) -> Quantized:
    """Quantize a batch of factors.

    Args:
        F: float32 [n, K, N].
        M: float32 [n, K, K], undamped.
        width: uint8 [n, K] if along is "K", else [n, N].
        along: the axis that the widths run along, "K" or "N".
        passes: rounds of scale refit and coordinate descent after the feedback; 0: feedback only.
        feedback: whether errors are handed on; without, and without passes, every row is rounded on its own.
        rough: guess scales instead of searching for them, in a third of the time.
    """
    width = width[:, :, None] if along == "K" else width[:, None, :]
    M = damped(M)
    U = feedback_factor(M) if feedback else M.diagonal(dim1=-2, dim2=-1).rsqrt().diag_embed()
    c = _column_scale(F, U, width)
    out = _feedback(F, U, width, c, rough) if feedback else _round_all(F, width, c, rough)
    best, best_error = out, _error(F, M, out.dequantize(width))
    for _ in range(passes):
        out = _refit(F, M, out, width)
        out = _coordinate_descent(F, M, out, width)
        # Float16 rounding of the scales can undo a gain: keep the best seen, expert by expert.
        error = _error(F, M, out.dequantize(width))
        better = error < best_error
        best = Quantized(
            torch.where(better[:, None, None], out.codes, best.codes),
            torch.where(better[:, None], out.a, best.a),
            torch.where(better[:, None], out.c, best.c),
            best.norms,
        )
        best_error = torch.minimum(error, best_error)
    return best


def _centred(codes: Tensor, width: Tensor) -> Tensor:
    """q - (2^b - 1) / 2, and 0 where b = 0."""
    return (codes - (torch.exp2(width.float()) - 1) / 2) * (width > 0)


@lru_cache
def _steps(device: torch.device) -> Tensor:
    """Best step of a unit Gaussian at each bit-width. Kept: every row of every factor asks."""
    return torch.tensor([gaussian_quantizer(b)[0] for b in range(MAX_BITS + 1)], device=device)


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def _error(F: Tensor, M: Tensor, approximation: Tensor) -> Tensor:
    d = F - approximation
    return (d * (M @ d)).sum((1, 2))


def _column_scale(F: Tensor, U: Tensor, width: Tensor) -> Tensor:
    """c [n, N]: each output's root mean square error energy, and for widths along N the step that suits its bits.

    Magnitude is shared between a and c, so that both stay far from float16's limits.
    """
    d = U.diagonal(dim1=-2, dim2=-1).pow(-2)
    rms = (d[:, :, None] * F.square()).mean(1).sqrt()
    rms = rms.clamp(min=1e-4 * rms.mean(-1, keepdim=True)).clamp(min=1e-12)
    c = rms / rms.log().mean(-1, keepdim=True).exp()
    c = c * F.square().mean((1, 2)).sqrt().sqrt().clamp(min=1e-6)[:, None]
    if width.shape[1] == 1:
        c = c * _steps(F.device)[width[:, 0].long()]
    return _half(c)


def _row_scale(w: Tensor, c: Tensor, width: Tensor, rough: bool = False) -> Tensor:
    """a [n]: the best scale of one row w [n, N] against the column scales, by alternating least squares."""
    half = (torch.exp2(width.float()) - 1) / 2
    live = (width > 0) & (c > 0)
    v = torch.where(live, w / c.clamp(min=1e-30), 0.0)
    weight = torch.where(live, c.square(), 0.0)
    # A Gaussian's levels have a root mean square of about 1 / step.
    spread = torch.where(live, _steps(w.device)[width.long()].clamp(min=1e-6).pow(-2), 0.0)
    start = ((weight * v.square()).sum(-1) / (weight * spread).sum(-1).clamp(min=1e-30)).sqrt()
    if rough:
        level = _nearest(v, start[:, None], half)
        return _half((weight * v * level).sum(-1) / (weight * level.square()).sum(-1).clamp(min=1e-30))
    # All candidates at once: rows are short, so the number of operations is what takes time.
    a = start * torch.tensor(_SCALE_CANDIDATES, device=w.device)[:, None]
    product = weight * v
    for _ in range(_SCALE_STEPS):
        level = _nearest(v, a[..., None], half)
        a = (product * level).sum(-1) / (weight * level.square()).sum(-1).clamp(min=1e-30)
    a = _half(a)
    error = (weight * (v - a[..., None] * _nearest(v, a[..., None], half)).square()).sum(-1)
    return a.gather(0, error.argmin(0, keepdim=True))[0]


def _nearest(v: Tensor, step: Tensor, half: Tensor) -> Tensor:
    """Nearest level of v / step among -half, -half + 1, ..., half."""
    # A step of zero gives zero levels' values anyway; it must not give NaN.
    x = (v / torch.where(step == 0, torch.inf, step)).add_(half).round_().sub_(half)
    return torch.minimum(torch.maximum(x, -half, out=x), half, out=x)


def _round_row(w: Tensor, a: Tensor, c: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and values of one row w [n, N]."""
    half = (torch.exp2(width.float()) - 1) / 2
    level = _nearest(w, a[:, None] * c, half)
    return (level + half).to(torch.uint8), a[:, None] * c * level * (width > 0)


def _row_width(width: Tensor, k: int) -> Tensor:
    """Widths of row k: [n, 1] for widths along K, [n, N] along N."""
    return width[:, k] if width.shape[2] == 1 else width[:, 0]


def _feedback(F: Tensor, U: Tensor, width: Tensor, c: Tensor, rough: bool = False) -> Quantized:
    n, K, _ = F.shape
    F = F.clone()
    codes = torch.zeros_like(F, dtype=torch.uint8)
    a, norms = F.new_zeros(n, K), F.new_zeros(n, K)
    for start in range(0, K, COLUMN_BLOCK):
        end = min(start + COLUMN_BLOCK, K)
        errors = torch.empty_like(F[:, start:end])
        for k in range(start, end):
            bits = _row_width(width, k)
            norms[:, k] = F[:, k].square().sum(-1)
            a[:, k] = _row_scale(F[:, k], c, bits, rough)
            codes[:, k], value = _round_row(F[:, k], a[:, k], c, bits)
            errors[:, k - start] = (F[:, k] - value) / U[:, k, k, None]
            F[:, k + 1 : end] -= U[:, k, k + 1 : end, None] * errors[:, k - start, None]
        F[:, end:] -= U[:, start:end, end:].mT @ errors
    return Quantized(codes, a, c, norms)


def _round_all(F: Tensor, width: Tensor, c: Tensor, rough: bool = False) -> Quantized:
    """Every row to its own best scale, all at once."""
    n, K, N = F.shape
    rows = F.reshape(n * K, N)
    columns = c[:, None].expand(n, K, N).reshape(n * K, N)
    widths = width.expand(n, K, width.shape[2]).reshape(n * K, -1)
    a = _row_scale(rows, columns, widths, rough)
    codes, _ = _round_row(rows, a, columns, widths)
    return Quantized(codes.view(n, K, N), a.view(n, K), c, F.square().sum(-1))


def _refit(F: Tensor, M: Tensor, q: Quantized, width: Tensor) -> Quantized:
    """Best a for fixed codes and c (one K x K solve), then best c for fixed codes and a (one ratio per output)."""
    level = _centred(q.codes, width)
    MF = M @ F
    A = level * q.c[:, None]
    normal = M * (A @ A.mT)
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    ridge = 1e-6 * diagonal.mean(-1, keepdim=True) + 1e-30
    normal = normal + torch.diag_embed(ridge.expand_as(diagonal))
    a = torch.linalg.solve(normal, (A * MF).sum(-1, keepdim=True))[..., 0]
    a = _half(torch.where(level.abs().sum(-1) > 0, a, 0.0))
    A = level * a[:, :, None]
    power = (A * (M @ A)).sum(1)
    c = torch.where(power > 0, (A * MF).sum(1) / power.clamp(min=1e-30), q.c)
    return Quantized(q.codes, a, _half(c), q.norms)


def _coordinate_descent(F: Tensor, M: Tensor, q: Quantized, width: Tensor) -> Quantized:
    """Round every row again, against what all other rows leave over."""
    codes = q.codes.clone()
    value = q.dequantize(width)
    residual = F - value
    K = F.shape[1]
    for start in range(0, K, COLUMN_BLOCK):
        end = min(start + COLUMN_BLOCK, K)
        gradient = M[:, start:end] @ residual
        for k in range(start, end):
            i = k - start
            target = value[:, k] + gradient[:, i] / M[:, k, k, None]
            codes[:, k], new = _round_row(target, q.a[:, k], q.c, _row_width(width, k))
            change = new - value[:, k]
            value[:, k] = new
            residual[:, k] -= change
            gradient -= M[:, start:end, k, None] * change[:, None]
    return Quantized(codes, q.a, q.c, q.norms)
