"""Rounding by torch's own operations: the reference, and what computes where there are no kernels."""

from functools import lru_cache

import torch
from torch import Tensor

from offline_quant.linalg import CholeskyFactor, add_product, mirrored, output_energy
from offline_quant.rounding.backends.base import RoundingBackend
from offline_quant.rounding.grid import Grid, Quantized, as_half

COLUMN_BLOCK = 32
ROUND_VALUES, GPU_ROUND_VALUES = 1 << 15, 1 << 24
"""Values that are rounded at once where no row waits for another, by a processor and by a GPU."""
_NO_FRACTION = 1.5 * 2**23
"""Float32 sums with it have no room for a fraction."""
_SCALE_CANDIDATES = (0.7, 0.85, 1.0, 1.2)
_SCALE_STEPS = 3


class TorchRounding(RoundingBackend):
    """Rows in turn, all experts of the batch at once. Rows are short: the number of operations is what takes time."""

    def hand_on(self, F: Tensor, U: Tensor, grid: Grid, c: Tensor, rough: bool) -> Quantized:
        """See `RoundingBackend`."""
        n, K, _ = F.shape
        F = F.clone()
        codes = torch.zeros_like(F, dtype=torch.uint8)
        a, norms, total = F.new_zeros(n, K), F.new_zeros(n, K), F.new_zeros(n)
        for start in range(0, K, COLUMN_BLOCK):
            end = min(start + COLUMN_BLOCK, K)
            errors = torch.empty_like(F[:, start:end])
            for k in range(start, end):
                rows, w = _Rows.of(grid, k), F[:, k]
                norms[:, k] = _dot(w, w)
                a[:, k] = rows.scale(w, c, rough)
                codes[:, k], value = rows.round(w, a[:, k], c)
                error = errors[:, k - start] = (w - value).div_(U[:, k, k, None])
                F[:, k + 1 : end].addcmul_(U[:, k, k + 1 : end, None], error[:, None], value=-1)
            F[:, end:].baddbmm_(U[:, start:end, end:].mT, errors, alpha=-1)
            total += errors.square().sum((1, 2))
        return Quantized(codes, a, c, norms, total)

    def round_alone(
        self, F: Tensor, M: Tensor, factor: CholeskyFactor, grid: Grid, c: Tensor, rough: bool
    ) -> Quantized:
        """See `RoundingBackend`. As many rows at once as a processor's cache holds."""
        n, K, N = F.shape

        def rows(x: Tensor) -> Tensor:
            return x.expand(n, K, x.shape[2]).reshape(n * K, -1)

        flat, half, power, columns = (rows(x) for x in (F, grid.half, grid.power, c[:, None]))
        a, codes, left = flat.new_empty(n * K), torch.empty_like(flat, dtype=torch.uint8), torch.empty_like(flat)
        step = max(1, (GPU_ROUND_VALUES if F.is_cuda else ROUND_VALUES) // N)
        for at in range(0, n * K, step):
            part = slice(at, at + step)
            own = _Rows(half[part], power[part])
            a[part] = own.scale(flat[part], columns[part], rough)
            codes[part], value = own.round(flat[part], a[part], columns[part])
            torch.sub(flat[part], value, out=left[part])
        norms = F.square().sum(-1)
        return measured(codes.view(n, K, N), a.view(n, K), c, norms, left.view(n, K, N), M, factor)

    def refit(self, M: Tensor, MF: Tensor, q: Quantized, grid: Grid) -> tuple[Quantized, Tensor]:
        """See `RoundingBackend`."""
        level = grid.levels(q.codes)
        A = level * q.c[:, None]
        normal = M * mirrored(add_product(torch.zeros_like(M), A.mT, A.mT))
        diagonal = normal.diagonal(dim1=-2, dim2=-1)
        ridge = 1e-6 * diagonal.mean(-1, keepdim=True) + 1e-30
        diagonal += ridge
        a = torch.linalg.solve(normal, (A * MF).sum(-1, keepdim=True))[..., 0]
        a = as_half(torch.where(level.abs().sum(-1) > 0, a, 0.0))
        A = level.mul_(a[:, :, None])
        MA = M @ A
        power = (A * MA).sum(1)
        c = as_half(torch.where(power > 0, (A * MF).sum(1) / power.clamp(min=1e-30), q.c))
        return Quantized(q.codes, a, c, q.norms, q.error), torch.sub(MF, MA.mul_(c[:, None]), out=MA)

    def descend(self, F: Tensor, M: Tensor, q: Quantized, grid: Grid, gradient: Tensor) -> Quantized:
        """See `RoundingBackend`."""
        codes = q.codes.clone()
        value = q.values(grid)
        error = ((F - value) * gradient).sum((1, 2))
        change = torch.empty_like(F)
        K, own = F.shape[1], M.diagonal(dim1=-2, dim2=-1)[:, :, None]
        for start in range(0, K, COLUMN_BLOCK):
            end = min(start + COLUMN_BLOCK, K)
            # A row's gradient is brought up to date when its turn comes, and stays as it was then.
            gradient[:, start:end].baddbmm_(M[:, start:end, :start], change[:, :start], alpha=-1)
            for k in range(start, end):
                target = torch.addcdiv(value[:, k], gradient[:, k], own[:, k])
                codes[:, k], new = _Rows.of(grid, k).round(target, q.a[:, k], q.c)
                moved = torch.sub(new, value[:, k], out=change[:, k])
                gradient[:, k + 1 : end].addcmul_(M[:, k + 1 : end, k, None], moved[:, None], value=-1)
        return Quantized(codes, q.a, q.c, q.norms, error - gained(gradient, change, own))


def measured(
    codes: Tensor, a: Tensor, c: Tensor, norms: Tensor, left: Tensor, M: Tensor, factor: CholeskyFactor
) -> Quantized:
    """Rows rounded alone, with what they lost; `left` [n, K, N] is factors less their rounded values."""
    lost = output_energy(left, M)
    return Quantized(codes, a, c, norms, factor.damped_energy(lost, left, M), lost)


def gained(gradient: Tensor, change: Tensor, own: Tensor) -> Tensor:
    """What moves took off the error [n]: 2 g d - m d^2 for a move d of a value with gradient g and own moment m.

    Args:
        gradient: [n, K, N], of each row when its turn came; is overwritten.
        change: [n, K, N], the moves.
        own: [n, K, 1].
    """
    return gradient.mul_(2).addcmul_(own, change, value=-1).mul_(change).sum((1, 2))


class _Rows:
    """Levels of some rows [n, 1] or [n, N]."""

    def __init__(self, half: Tensor, power: Tensor):
        self.half, self.power = half, power

    @classmethod
    def of(cls, grid: Grid, k: int) -> "_Rows":
        """Row k of every expert."""
        k = k if grid.half.shape[1] > 1 else 0
        return cls(grid.half[:, k], grid.power[:, k])

    def nearest(self, v: Tensor, step: Tensor) -> Tensor:
        """Nearest level of v / step among -half, -half + 1, ..., half; 0 for 0 bits."""
        # A step of zero gives zero levels' values anyway; it must not give NaN.
        x = _round_((v / step.masked_fill(step == 0, torch.inf)).add_(self.half)).sub_(self.half)
        return torch.minimum(torch.maximum(x, -self.half, out=x), self.half, out=x)

    def round(self, w: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values of rows w [n, N] with scales a [n] and c [n, N]."""
        step = a[:, None] * c
        level = self.nearest(w, step)
        return (level + self.half).to(torch.uint8), step.mul_(level)

    def scale(self, w: Tensor, c: Tensor, rough: bool = False) -> Tensor:
        """a [n]: the best scales of rows w [n, N] against the column scales, by alternating least squares."""
        weight = c.square()
        v = torch.where(c > 0, w / c, 0.0)
        product = weight * v
        start = (_dot(product, v) / (weight * self.power).sum(-1).clamp(min=1e-30)).sqrt()
        if rough:
            level = self.nearest(v, start[:, None])
            return as_half(_dot(product, level) / _dot(weight, level.square()).clamp(min=1e-30))
        # All candidates at once: one operation costs as much as four.
        a = start * _candidates(w.device)[:, None]
        for _ in range(_SCALE_STEPS):
            level = self.nearest(v, a[..., None])
            a = _dot(product, level) / _dot(weight, level.square()).clamp(min=1e-30)
        a = as_half(a)
        error = _dot(weight, (v - a[..., None] * self.nearest(v, a[..., None])).square())
        return a.gather(0, error.argmin(0, keepdim=True))[0]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y)


@lru_cache
def _candidates(device: torch.device) -> Tensor:
    """Factors of a first guess at a scale, made once: for every row anew a GPU would wait for them."""
    return torch.tensor(_SCALE_CANDIDATES, device=device)


def _round_(x: Tensor) -> Tensor:
    """Round to the nearest integer in place, halves to even; what is beyond 2^22 stays beyond every code.

    On a processor `round_` wakes a second thread for a few thousand values, which takes longer than they do.
    """
    return x.round_() if x.is_cuda else x.add_(_NO_FRACTION).sub_(_NO_FRACTION)
