"""Rounding of factors on a GPU: the steps that go row by row, one launch for a block of rows or for all of them.

    n factors      K rows of each, one after another      N columns, one program holds a row of them

What is computed stands in `offline_quant/rounding/error_feedback.py`; `_cpu/rounding.py` is the same for processors.
Torch's own operations take a hundred launches for each row. Everything is float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32
"""Rows of a launch. Errors go on within it row by row, and to all rows after it by one matrix product."""
DESCENT_COLUMNS = 256
"""Columns of a program where no row needs a sum over its columns."""
VALUES_PER_THREAD = 8
MOST_WARPS = 16

_BLOCK = tl.constexpr(BLOCK)
_NO_FRACTION = tl.constexpr(1.5 * 2**23)
_SCALE_STEPS = tl.constexpr(3)


@triton.jit
def _nearest(x, half):
    """Nearest of the levels -half, -half + 1, ..., half; halves to even."""
    # Float32 sums with _NO_FRACTION have no room for a fraction.
    level = ((x + half) + _NO_FRACTION) - _NO_FRACTION - half
    return tl.minimum(tl.maximum(level, -half), half)


@triton.jit
def _over(v, step):
    """v / step, and 0 where the step is 0: its levels' values are 0 anyway."""
    return v / tl.where(step == 0.0, float("inf"), step)


@triton.jit
def _as_half(x):
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def _scale(w, c, half, power, ROUGH: tl.constexpr):
    """The best scale of one row w [BN] against column scales c, by alternating least squares from four starts.

    half, power: [1] or [BN]. Columns beyond N have c = 0, and so no weight.
    """
    weight = c * c
    v = tl.where(c > 0.0, w / tl.where(c > 0.0, c, 1.0), 0.0)
    product = weight * v
    start = tl.sqrt(tl.sum(product * v) / tl.maximum(tl.sum(weight * power), 1e-30))
    if ROUGH:
        level = _nearest(_over(v, start), half)
        return _as_half(tl.sum(product * level) / tl.maximum(tl.sum(weight * level * level), 1e-30))
    else:
        # All four at once, [4, BN]: a sum over columns costs barriers, and four of them cost no more.
        one = tl.arange(0, 4)
        a = start * tl.where(one == 0, 0.7, tl.where(one == 1, 0.85, tl.where(one == 2, 1.0, 1.2)))
        v2, w2, p2, h2 = v[None, :], weight[None, :], product[None, :], half[None, :]
        for _ in tl.static_range(_SCALE_STEPS):
            level = _nearest(_over(v2, a[:, None]), h2)
            a = tl.sum(p2 * level, 1) / tl.maximum(tl.sum(w2 * level * level, 1), 1e-30)
        a = _as_half(a)
        left = v2 - a[:, None] * _nearest(_over(v2, a[:, None]), h2)
        error = tl.sum(w2 * left * left, 1)
        winner = tl.min(tl.where(error == tl.min(error, 0), one, 4), 0)
        return tl.sum(tl.where(one == winner, a, 0.0), 0)


@triton.jit
def _row_levels(half, power, factor, k, n, K, N, BN: tl.constexpr, OF_COLUMNS: tl.constexpr):
    """Largest levels and powers of row k: [BN], or [1] where they are the row's own."""
    if OF_COLUMNS:
        at, there = factor * N + n, n < N
        return tl.load(half + at, mask=there, other=0.0), tl.load(power + at, mask=there, other=0.0)
    else:
        at = factor * K + k + tl.arange(0, 1)
        return tl.load(half + at), tl.load(power + at)


@triton.jit
def feedback_kernel(F, U, half, power, c, a, codes, norms, errors, total, start, end, K, N,
                    BN: tl.constexpr, OF_COLUMNS: tl.constexpr, ROUGH: tl.constexpr):  # fmt: skip
    """Rows start to end - 1 of one factor, in turn; a program for each factor.

    F: [n, K, N], brought up to date with all rows before `start`. U: [n, K, K]. half, power: [n, K] or [n, N].
    c: [n, N]. Written: a [n, K], codes uint8 [n, K, N], norms [n, K], errors [n, BLOCK, N] of these rows over U_kk.
    total: [n], their squares are added.
    """
    factor = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    there = n < N
    columns = tl.load(c + factor * N + n, mask=there, other=0.0)
    first, slot = factor * K, factor * _BLOCK
    lost = 0.0
    for k in range(start, end):
        row = first + k
        w = tl.load(F + row * N + n, mask=there, other=0.0)
        for j in range(start, k):
            handed = tl.load(errors + (slot + j - start) * N + n, mask=there, other=0.0)
            w -= tl.load(U + (first + j) * K + k) * handed
        tl.store(norms + row, tl.sum(w * w))
        levels, powers = _row_levels(half, power, factor, k, n, K, N, BN, OF_COLUMNS)
        scale = _scale(w, columns, levels, powers, ROUGH)
        tl.store(a + row, scale)
        step = scale * columns
        level = _nearest(_over(w, step), levels)
        tl.store(codes + row * N + n, (level + levels).to(tl.uint8), mask=there)
        error = (w - step * level) / tl.load(U + row * K + k)
        lost += tl.sum(tl.where(there, error * error, 0.0))
        tl.store(errors + (slot + k - start) * N + n, error, mask=there)
        # Threads of the program that hold other columns of it in the next turn must find it there.
        tl.debug_barrier()
    tl.store(total + factor, tl.load(total + factor) + lost)


@triton.jit
def alone_kernel(F, half, power, c, a, codes, norms, left, K, N,
                 BN: tl.constexpr, OF_COLUMNS: tl.constexpr, ROUGH: tl.constexpr):  # fmt: skip
    """One row of one factor: a program for each. Arguments as those of `feedback_kernel`.

    left: [n, K, N], written: the row less its rounded values.
    """
    row = tl.program_id(0).to(tl.int64)
    factor = row // K
    n = tl.arange(0, BN)
    there = n < N
    columns = tl.load(c + factor * N + n, mask=there, other=0.0)
    w = tl.load(F + row * N + n, mask=there, other=0.0)
    tl.store(norms + row, tl.sum(w * w))
    levels, powers = _row_levels(half, power, factor, row % K, n, K, N, BN, OF_COLUMNS)
    scale = _scale(w, columns, levels, powers, ROUGH)
    tl.store(a + row, scale)
    step = scale * columns
    level = _nearest(_over(w, step), levels)
    tl.store(codes + row * N + n, (level + levels).to(tl.uint8), mask=there)
    tl.store(left + row * N + n, w - step * level, mask=there)


@triton.jit
def descent_kernel(M, half, a, c, codes, gradient, change, start, end, K, N,
                   BN: tl.constexpr, OF_COLUMNS: tl.constexpr):  # fmt: skip
    """Rows start to end - 1 of some columns of one factor, each against what the others leave over.

    M: [n, K, K]. half: [n, K] or [n, N]. a: [n, K]. c: [n, N]. codes: uint8 [n, K, N], rewritten. gradient [n, K, N]:
    up to date with all rows before `start`; written: that of each row when its turn came. change: [n, K, N], written.
    """
    factor = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    there = n < N
    columns = tl.load(c + factor * N + n, mask=there, other=0.0)
    first = factor * K
    for k in range(start, end):
        row = first + k
        at = row * N + n
        g = tl.load(gradient + at, mask=there, other=0.0)
        for j in range(start, k):
            moved = tl.load(change + (first + j) * N + n, mask=there, other=0.0)
            g -= tl.load(M + row * K + j) * moved
        levels, _ = _row_levels(half, half, factor, k, n, K, N, BN, OF_COLUMNS)
        step = tl.load(a + row) * columns
        old = tl.load(codes + at, mask=there, other=0).to(tl.float32)
        value = step * tl.where(levels > 0.0, old - levels, 0.0)
        level = _nearest(_over(value + g / tl.load(M + row * K + k), step), levels)
        tl.store(codes + at, (level + levels).to(tl.uint8), mask=there)
        tl.store(gradient + at, g, mask=there)
        tl.store(change + at, step * level - value, mask=there)
        tl.debug_barrier()  # as in `feedback_kernel`


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Every kernel goes through here: tests count them."""
    kernel[grid](*args, **options)


def row_options(N: int, of_columns: bool) -> dict[str, int | bool]:
    """Of kernels whose programs hold whole rows of N values."""
    BN = max(16, triton.next_power_of_2(N))
    return {"BN": BN, "OF_COLUMNS": of_columns, "num_warps": _warps(BN)}


def descent_options(N: int, of_columns: bool) -> dict[str, int | bool]:
    """Of the kernel whose programs hold some columns."""
    BN = min(DESCENT_COLUMNS, max(16, triton.next_power_of_2(N)))
    return {"BN": BN, "OF_COLUMNS": of_columns, "num_warps": _warps(BN)}


def _warps(BN: int) -> int:
    return min(MOST_WARPS, max(1, BN // (32 * VALUES_PER_THREAD)))


def _of_columns(half: Tensor, K: int) -> bool:
    """Whether levels belong to columns."""
    return half.shape[1:] != (K, 1)


def round_with_feedback(
    F: Tensor, U: Tensor, half: Tensor, power: Tensor, c: Tensor, rough: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round rows in turn; arguments as those of `_cpu.rounding.round_with_feedback`.

    Returns:
        Codes uint8 [n, K, N], row scales [n, K] that float16 holds, squared norms of the rows as they were rounded
        [n, K], and what is lost [n].
    """
    n, K, N = F.shape
    F, U, half, power, c = (
        F.clone(memory_format=torch.contiguous_format),
        *(x.contiguous() for x in (U, half, power, c)),
    )
    codes, a, norms = torch.empty_like(F, dtype=torch.uint8), F.new_empty(n, K), F.new_empty(n, K)
    errors, total = F.new_empty(n, BLOCK, N), F.new_zeros(n)
    options = row_options(N, _of_columns(half, K))
    # Kernels go to the current device, wherever their arguments lie.
    with torch.cuda.device_of(F):
        for start in range(0, K, BLOCK):
            end = min(start + BLOCK, K)
            _launch(feedback_kernel, (n,), F, U, half, power, c, a, codes, norms, errors, total, start, end, K, N,
                    ROUGH=rough, **options)  # fmt: skip
            if end < K:
                F[:, end:].baddbmm_(U[:, start:end, end:].mT, errors[:, : end - start], alpha=-1)
    return codes, a, norms, total


def round_alone(
    F: Tensor, half: Tensor, power: Tensor, c: Tensor, rough: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round every row by itself; arguments as those of `round_with_feedback`.

    Returns:
        Codes, row scales and squared norms as there, and factors less their rounded values [n, K, N].
    """
    n, K, N = F.shape
    F, half, power, c = (x.contiguous() for x in (F, half, power, c))
    codes, left = torch.empty_like(F, dtype=torch.uint8), torch.empty_like(F)
    a, norms = F.new_empty(n, K), F.new_empty(n, K)
    with torch.cuda.device_of(F):
        _launch(alone_kernel, (n * K,), F, half, power, c, a, codes, norms, left, K, N,
                ROUGH=rough, **row_options(N, _of_columns(half, K)))  # fmt: skip
    return codes, a, norms, left


def descend(M: Tensor, half: Tensor, codes: Tensor, a: Tensor, c: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Round every row again, against what all other rows leave over.

    Args:
        M: float32 [n, K, K], damped second moments.
        half, codes, a, c: as those of `_cpu.rounding.descend`.
        gradient: float32 [n, K, N], contiguous, M (F - F^) for F^ of the given codes and scales; becomes that of each
            row when its turn came.

    Returns:
        New codes, and the change of every value [n, K, N].
    """
    assert gradient.is_contiguous()
    n, K, N = gradient.shape
    M, half, a, c = (x.contiguous() for x in (M, half, a, c))
    codes, change = codes.clone(memory_format=torch.contiguous_format), torch.empty_like(gradient)
    options = descent_options(N, _of_columns(half, K))
    grid = n, triton.cdiv(N, options["BN"])
    with torch.cuda.device_of(gradient):
        for start in range(0, K, BLOCK):
            end = min(start + BLOCK, K)
            if start:
                gradient[:, start:end].baddbmm_(M[:, start:end, :start], change[:, :start], alpha=-1)
            _launch(descent_kernel, grid, M, half, a, c, codes, gradient, change, start, end, K, N, **options)
    return codes, change
