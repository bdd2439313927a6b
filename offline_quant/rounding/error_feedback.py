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

from bitsmoe_kernels._cpu import rounding as compiled
from bitsmoe_kernels.format.schema import MAX_BITS
from offline_quant.linalg import CholeskyFactor, add_product, factorize, mirrored, on_diagonal, output_energy
from offline_quant.rounding import native
from offline_quant.rounding.gaussian import gaussian_quantizer

COLUMN_BLOCK = 32
ROUND_VALUES, GPU_ROUND_VALUES = 1 << 15, 1 << 24
"""Values that are rounded at once where no row waits for another, by a processor and by a GPU."""
MAX_COLUMN_SCALE = 2.0**15
"""Bound of column scales: an outlier must not take one out of float16. Row scales absorb the rest."""
_NO_FRACTION = 1.5 * 2**23
"""Float32 sums with it have no room for a fraction."""
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
        error: [n], tr((F - F^)^T M (F - F^)) for damped M.
        lost: [n], the same for undamped M; None where it was not computed.
    """

    codes: Tensor
    a: Tensor
    c: Tensor
    norms: Tensor
    error: Tensor
    lost: Tensor | None = None

    def dequantize(self, width: Tensor) -> Tensor:
        """F^ [n, K, N], float32."""
        return self.a[:, :, None] * self.c[:, None] * _centred(self.codes, width)


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
    c, grid = _column_scale(F, factor.variances, width), _Grid.of(width)
    if mode.feedback:
        out = _feedback(F, factor.U, grid, c, mode.rough)
    else:
        out = _round_all(F, M, factor.ridge, grid, c, mode.rough)
    if not mode.refine:
        return out
    best, M = out, factor.damped(M)
    MF = M @ F
    for _ in range(mode.refine):
        out, gradient = _refit(M, MF, out, width, grid)
        out = _coordinate_descent(F, M, out, width, grid, gradient)
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


@dataclass(frozen=True)
class _Grid:
    """Levels of every row, worked out once: rows are short, so the number of operations is what takes time.

    Attributes:
        half: the largest level, (2^b - 1) / 2, by row: [n, K, 1] where widths run along K, [n, 1, N] along N.
        power: mean square of the levels that suit a unit Gaussian, of the same shape.
    """

    half: Tensor
    power: Tensor

    @classmethod
    def of(cls, width: Tensor) -> "_Grid":
        step = _steps(width.device)[width.long()]
        # A Gaussian's levels have a root mean square of about 1 / step.
        power = torch.where(width > 0, step.clamp(min=1e-6).pow(-2), 0.0)
        return cls((torch.exp2(width.float()) - 1) / 2, power)

    def row(self, k: int) -> "_Grid":
        """Of row k: [n, 1] or [n, N]."""
        k = k if self.half.shape[1] > 1 else 0
        return _Grid(self.half[:, k], self.power[:, k])

    def nearest(self, v: Tensor, step: Tensor) -> Tensor:
        """Nearest level of v / step among -half, -half + 1, ..., half; 0 for 0 bits."""
        # A step of zero gives zero levels' values anyway; it must not give NaN.
        x = _round_((v / step.masked_fill(step == 0, torch.inf)).add_(self.half)).sub_(self.half)
        return torch.minimum(torch.maximum(x, -self.half, out=x), self.half, out=x)

    def round(self, w: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values of one row w [n, N] with scales a [n] and c [n, N]."""
        step = a[:, None] * c
        level = self.nearest(w, step)
        return (level + self.half).to(torch.uint8), step.mul_(level)

    def scale(self, w: Tensor, c: Tensor, rough: bool = False) -> Tensor:
        """a [n]: the best scale of one row w [n, N] against the column scales, by alternating least squares."""
        weight = c.square()
        v = torch.where(c > 0, w / c, 0.0)
        product = weight * v
        start = (_dot(product, v) / (weight * self.power).sum(-1).clamp(min=1e-30)).sqrt()
        if rough:
            level = self.nearest(v, start[:, None])
            return _half(_dot(product, level) / _dot(weight, level.square()).clamp(min=1e-30))
        # All candidates at once, for the same reason.
        a = start * _candidates(w.device)[:, None]
        for _ in range(_SCALE_STEPS):
            level = self.nearest(v, a[..., None])
            a = _dot(product, level) / _dot(weight, level.square()).clamp(min=1e-30)
        a = _half(a)
        error = _dot(weight, (v - a[..., None] * self.nearest(v, a[..., None])).square())
        return a.gather(0, error.argmin(0, keepdim=True))[0]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y)


def _centred(codes: Tensor, width: Tensor) -> Tensor:
    """q - (2^b - 1) / 2, and 0 where b = 0."""
    return (codes - (torch.exp2(width.float()) - 1) / 2) * (width > 0)


@lru_cache
def _steps(device: torch.device) -> Tensor:
    """Best step of a unit Gaussian at each bit-width."""
    return torch.tensor([gaussian_quantizer(b)[0] for b in range(MAX_BITS + 1)], device=device)


@lru_cache
def _candidates(device: torch.device) -> Tensor:
    """Factors of a first guess at a scale, made once: for every row anew a GPU would wait for them."""
    return torch.tensor(_SCALE_CANDIDATES, device=device)


def _round_(x: Tensor) -> Tensor:
    """Round to the nearest integer in place, halves to even; what is beyond 2^22 stays beyond every code.

    On a processor `round_` wakes a second thread for a few thousand values, which takes longer than they do.
    """
    return x.round_() if x.is_cuda else x.add_(_NO_FRACTION).sub_(_NO_FRACTION)


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def _column_scale(F: Tensor, variances: Tensor, width: Tensor) -> Tensor:
    """c [n, N]: each output's root mean square error energy, and for widths along N the step that suits its bits.

    Magnitude is shared between a and c, so that both stay far from float16's limits.
    """
    rms = (variances[:, :, None] * F.square()).mean(1).sqrt()
    rms = rms.clamp(min=1e-4 * rms.mean(-1, keepdim=True)).clamp(min=1e-12)
    c = rms / rms.log().mean(-1, keepdim=True).exp()
    c = c * F.square().mean((1, 2)).sqrt().sqrt().clamp(min=1e-6)[:, None]
    if width.shape[1] == 1:
        c = c * _steps(F.device)[width[:, 0].long()]
    excess = (c.amax(-1, keepdim=True) / MAX_COLUMN_SCALE).clamp(min=1)
    return _half(c / torch.exp2(excess.log2().ceil()))


def _feedback(F: Tensor, U: Tensor, grid: _Grid, c: Tensor, rough: bool = False) -> Quantized:
    if native.runs_on(F):
        codes, a, norms, error, _ = compiled.round_with_feedback(F, U, grid.half, grid.power, c, rough)
        assert error is not None
        return Quantized(codes, a, c, norms, error)
    n, K, _ = F.shape
    F = F.clone()
    codes = torch.zeros_like(F, dtype=torch.uint8)
    a, norms, total = F.new_zeros(n, K), F.new_zeros(n, K), F.new_zeros(n)
    for start in range(0, K, COLUMN_BLOCK):
        end = min(start + COLUMN_BLOCK, K)
        errors = torch.empty_like(F[:, start:end])
        for k in range(start, end):
            row, w = grid.row(k), F[:, k]
            norms[:, k] = _dot(w, w)
            a[:, k] = row.scale(w, c, rough)
            codes[:, k], value = row.round(w, a[:, k], c)
            error = errors[:, k - start] = (w - value).div_(U[:, k, k, None])
            F[:, k + 1 : end].addcmul_(U[:, k, k + 1 : end, None], error[:, None], value=-1)
        F[:, end:].baddbmm_(U[:, start:end, end:].mT, errors, alpha=-1)
        total += errors.square().sum((1, 2))
    return Quantized(codes, a, c, norms, total)


def _round_all(F: Tensor, M: Tensor, ridge: Tensor, grid: _Grid, c: Tensor, rough: bool = False) -> Quantized:
    """Every row to its own best scale, as many at once as a processor's cache holds."""
    n, K, N = F.shape
    if native.runs_on(F):
        found, a, norms, _, d = compiled.round_alone(F, grid.half, grid.power, c, rough)
        assert d is not None
        lost = output_energy(d, M)
        return Quantized(found, a, c, norms, lost + ridge * d.square().sum((1, 2)), lost)

    def rows(x: Tensor) -> Tensor:
        return x.expand(n, K, x.shape[2]).reshape(n * K, -1)

    flat, half, power, columns = (rows(x) for x in (F, grid.half, grid.power, c[:, None]))
    a, codes, d = flat.new_empty(n * K), torch.empty_like(flat, dtype=torch.uint8), torch.empty_like(flat)
    step = max(1, (GPU_ROUND_VALUES if F.is_cuda else ROUND_VALUES) // N)
    for at in range(0, n * K, step):
        part = slice(at, at + step)
        own = _Grid(half[part], power[part])
        a[part] = own.scale(flat[part], columns[part], rough)
        codes[part], value = own.round(flat[part], a[part], columns[part])
        torch.sub(flat[part], value, out=d[part])
    d = d.view(n, K, N)
    lost = output_energy(d, M)
    error = lost + ridge * d.square().sum((1, 2))
    return Quantized(codes.view(n, K, N), a.view(n, K), c, F.square().sum(-1), error, lost)


def _refit(M: Tensor, MF: Tensor, q: Quantized, width: Tensor, grid: _Grid) -> tuple[Quantized, Tensor]:
    """Best a for fixed codes and c (one K x K solve), then best c for fixed codes and a (one ratio per output).

    Returns:
        Codes with these scales, their error still the former's; M (F - F^) [n, K, N].
    """
    if native.runs_on(M):
        return _refit_compiled(M, MF, q, grid)
    level = _centred(q.codes, width)
    A = level * q.c[:, None]
    normal = M * mirrored(add_product(torch.zeros_like(M), A.mT, A.mT))
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    ridge = 1e-6 * diagonal.mean(-1, keepdim=True) + 1e-30
    diagonal += ridge
    a = torch.linalg.solve(normal, (A * MF).sum(-1, keepdim=True))[..., 0]
    a = _half(torch.where(level.abs().sum(-1) > 0, a, 0.0))
    A = level.mul_(a[:, :, None])
    MA = M @ A
    power = (A * MA).sum(1)
    c = _half(torch.where(power > 0, (A * MF).sum(1) / power.clamp(min=1e-30), q.c))
    return Quantized(q.codes, a, c, q.norms, q.error), torch.sub(MF, MA.mul_(c[:, None]), out=MA)


def _refit_compiled(M: Tensor, MF: Tensor, q: Quantized, grid: _Grid) -> tuple[Quantized, Tensor]:
    """`_refit` by the compiled kernels, and by a Cholesky factor where float32 has one."""
    system, right = compiled.scale_system(M, MF, grid.half, q.codes, q.c)
    diagonal = system.diagonal(dim1=-2, dim2=-1)
    diagonal += 1e-6 * diagonal.mean(-1, keepdim=True) + 1e-30
    root, info = torch.linalg.cholesky_ex(system)
    if bool(info.any()):
        a = torch.linalg.solve(mirrored(system.mT), right[:, :, None])[..., 0]
    else:
        a = torch.cholesky_solve(right[:, :, None], root)[..., 0]
    a = _half(torch.where(grid.half.amax(-1) > 0, a, 0.0))
    MA = M @ compiled.scaled_levels(grid.half, q.codes, a)
    c = compiled.refit_columns_(MA, MF, grid.half, q.codes, a, q.c)
    return Quantized(q.codes, a, c, q.norms, q.error), MA


def _coordinate_descent(F: Tensor, M: Tensor, q: Quantized, width: Tensor, grid: _Grid, gradient: Tensor) -> Quantized:
    """Round every row again, against what all other rows leave over.

    Args:
        F: [n, K, N].
        M: [n, K, K], damped.
        q: codes and scales.
        width: of every component.
        grid: of these.
        gradient: M (F - F^) [n, K, N]; is overwritten.
    """
    if native.runs_on(F):
        codes, error = compiled.descend(F, M, grid.half, q.codes, q.a, q.c, gradient)
        return Quantized(codes, q.a, q.c, q.norms, error)
    codes = q.codes.clone()
    value = q.dequantize(width)
    error = ((F - value) * gradient).sum((1, 2))
    change = torch.empty_like(F)
    K, own = F.shape[1], M.diagonal(dim1=-2, dim2=-1)[:, :, None]
    for start in range(0, K, COLUMN_BLOCK):
        end = min(start + COLUMN_BLOCK, K)
        # A row's gradient is brought up to date when its turn comes, and stays as it was then.
        gradient[:, start:end].baddbmm_(M[:, start:end, :start], change[:, :start], alpha=-1)
        for k in range(start, end):
            target = torch.addcdiv(value[:, k], gradient[:, k], own[:, k])
            codes[:, k], new = grid.row(k).round(target, q.a[:, k], q.c)
            moved = torch.sub(new, value[:, k], out=change[:, k])
            gradient[:, k + 1 : end].addcmul_(M[:, k + 1 : end, k, None], moved[:, None], value=-1)
    # Each move d of a row with gradient g and moment m took 2 g d - m d^2 off the error.
    gain = gradient.mul_(2).addcmul_(own, change, value=-1).mul_(change).sum((1, 2))
    return Quantized(codes, q.a, q.c, q.norms, error - gain)
