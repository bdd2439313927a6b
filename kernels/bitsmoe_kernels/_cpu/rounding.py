"""Rounding of factors and packing of codes by the compiled CPU kernels.

What is computed stands in `offline_quant/rounding/error_feedback.py` and `format/packing.py`. Tensors are on the CPU.
The result does not depend on the instruction set or on the number of threads.
"""

from ctypes import Structure, byref, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from bitsmoe_kernels._cpu import library
from bitsmoe_kernels.format.schema import code_dtype, num_blocks

_FEEDBACK, _ALONE, _DESCENT, _SYSTEM, _LEVELS, _COLUMNS = range(6)


class _Call(Structure):
    """`struct Rounding` of rounding_call.h."""

    _fields_ = (
        ("n", c_int64), ("K", c_int64), ("N", c_int64), ("of_columns", c_int64), ("rough", c_int64), ("F", c_void_p),
        ("matrix", c_void_p), ("half", c_void_p), ("power", c_void_p), ("c", c_void_p), ("a", c_void_p),
        ("codes", c_void_p), ("norms", c_void_p), ("error", c_void_p), ("left", c_void_p), ("memory", c_void_p),
    )  # fmt: skip


class Rounded(NamedTuple):
    """Rounded factors.

    Attributes:
        codes: uint8 [n, K, N].
        a: float32 [n, K], row scales that float16 holds.
        norms: float32 [n, K], squared norms of the rows as they were rounded.
        error: float32 [n], what feedback loses; None without feedback.
        left: float32 [n, K, N], factors less their rounded values; None with feedback.
    """

    codes: Tensor
    a: Tensor
    norms: Tensor
    error: Tensor | None
    left: Tensor | None


def _run(kind: int, isa: str | None, threads: int, shape: torch.Size, **given: Tensor | int | None) -> None:
    """Call `bitsmoe_round`; tensors are contiguous, and float32 but for codes."""
    loaded, (n, K, N) = library.load(), shape
    memory = torch.empty(loaded.bitsmoe_rounding_floats(kind, n, K, N, threads))
    fields = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in {**given, "memory": memory}.items()}
    call = _Call(n=n, K=K, N=N, **fields)
    status = loaded.bitsmoe_round(library.INSTRUCTION_SETS[isa or library.best()], kind, byref(call), threads)
    assert status == 0, status


def _levels(half: Tensor, shape: torch.Size) -> tuple[int, Tensor]:
    """Whether levels belong to columns, and the largest ones [n, K] or [n, N]."""
    return int(half.shape[1:] != (shape[1], 1)), half.flatten(1).contiguous()


def round_with_feedback(
    F: Tensor,
    U: Tensor,
    half: Tensor,
    power: Tensor,
    c: Tensor,
    rough: bool,
    isa: str | None = None,
    threads: int = 0,
) -> Rounded:
    """Round rows in turn; each hands its error on to those after it.

    Args:
        F: float32 [n, K, N].
        U: float32 [n, K, K], upper triangular, see `CholeskyFactor`.
        half: float32, largest level, 0 for 0 bits: [n, K, 1], or [n, 1, N] where widths run along N.
        power: float32, of half's shape, mean square of the levels that suit a unit Gaussian.
        c: float32 [n, N], column scales.
        rough: guess row scales instead of searching for them.
        isa: a key of `library.INSTRUCTION_SETS`; None: the best.
        threads: 0: as many as torch uses.
    """
    error = F.new_empty(len(F))
    found = _round(_FEEDBACK, F, half, power, c, rough, isa, threads, matrix=U.contiguous(), error=error)
    return Rounded(*found, error, None)


def round_alone(
    F: Tensor, half: Tensor, power: Tensor, c: Tensor, rough: bool, isa: str | None = None, threads: int = 0
) -> Rounded:
    """Round every row by itself; arguments as those of `round_with_feedback`."""
    left = F.new_empty(F.shape)
    found = _round(_ALONE, F, half, power, c, rough, isa, threads, left=left)
    return Rounded(*found, None, left)


def _round(
    kind: int, F: Tensor, half: Tensor, power: Tensor, c: Tensor, rough: bool, isa: str | None, threads: int,
    **more: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes, row scales and squared norms of rows; `more` is what one of both ways takes or gives besides."""
    n, K, _ = F.shape
    of_columns, halves = _levels(half, F.shape)
    codes, a, norms = torch.empty(F.shape, dtype=torch.uint8), F.new_empty(n, K), F.new_empty(n, K)
    F, powers, c = (x.contiguous() for x in (F, power.flatten(1), c))
    _run(
        kind, isa, threads, F.shape, of_columns=of_columns, rough=int(rough), F=F, half=halves, power=powers, c=c, a=a,
        codes=codes, norms=norms, **more,
    )  # fmt: skip
    return codes, a, norms


def descend(
    F: Tensor,
    M: Tensor,
    half: Tensor,
    codes: Tensor,
    a: Tensor,
    c: Tensor,
    gradient: Tensor,
    isa: str | None = None,
    threads: int = 0,
) -> tuple[Tensor, Tensor]:
    """Round every row again, against what all other rows leave over.

    Args:
        F: float32 [n, K, N].
        M: float32 [n, K, K], damped second moments.
        half: see `round_with_feedback`.
        codes: uint8 [n, K, N].
        a: float32 [n, K].
        c: float32 [n, N].
        gradient: float32 [n, K, N], M (F - F^) for F^ of the given codes and scales.
        isa: a key of `library.INSTRUCTION_SETS`; None: the best.
        threads: 0: as many as torch uses.

    Returns:
        New codes, and the error tr((F - F^)^T M (F - F^)) [n] they have.
    """
    of_columns, halves = _levels(half, F.shape)
    F, M, a, c, gradient = (x.contiguous() for x in (F, M, a, c, gradient))
    codes, error = codes.clone(memory_format=torch.contiguous_format), F.new_empty(len(F))
    _run(
        _DESCENT, isa, threads, F.shape, of_columns=of_columns, F=F, matrix=M, half=halves, c=c, a=a, codes=codes,
        error=error, left=gradient,
    )  # fmt: skip
    return codes, error


def scale_system(
    M: Tensor, MF: Tensor, half: Tensor, codes: Tensor, c: Tensor, isa: str | None = None, threads: int = 0
) -> tuple[Tensor, Tensor]:
    """The system that the best row scales solve for given codes and column scales; A is level times column scale.

    Args:
        M: float32 [n, K, K], damped second moments.
        MF: float32 [n, K, N], M F.
        half: see `round_with_feedback`.
        codes: uint8 [n, K, N].
        c: float32 [n, N].
        isa: a key of `library.INSTRUCTION_SETS`; None: the best.
        threads: 0: as many as torch uses.

    Returns:
        M (A A^T) by entries [n, K, K], of which the lower triangle is filled; and sums of A M F over columns [n, K].
    """
    of_columns, halves = _levels(half, MF.shape)
    M, MF, codes, c = (x.contiguous() for x in (M, MF, codes, c))
    system, right = torch.empty_like(M), M.new_empty(M.shape[:2])
    _run(
        _SYSTEM, isa, threads, MF.shape, of_columns=of_columns, F=MF, matrix=M, half=halves, codes=codes, c=c,
        left=system, norms=right,
    )  # fmt: skip
    return system, right


def scaled_levels(half: Tensor, codes: Tensor, a: Tensor, isa: str | None = None, threads: int = 0) -> Tensor:
    """Levels of codes [n, K, N] times row scales a [n, K], float32."""
    of_columns, halves = _levels(half, codes.shape)
    codes, a = codes.contiguous(), a.contiguous()
    out = torch.empty(codes.shape)
    _run(_LEVELS, isa, threads, codes.shape, of_columns=of_columns, half=halves, codes=codes, a=a, left=out)
    return out


def refit_columns_(
    MA: Tensor, MF: Tensor, half: Tensor, codes: Tensor, a: Tensor, c: Tensor, isa: str | None = None, threads: int = 0
) -> Tensor:
    """The best column scales for given codes and row scales; A is level times row scale.

    Args:
        MA: float32 [n, K, N], M A, contiguous; becomes M (F - F^).
        MF: float32 [n, K, N], M F.
        half: see `round_with_feedback`.
        codes: uint8 [n, K, N].
        a: float32 [n, K].
        c: float32 [n, N], kept where all levels of a column are 0.
        isa: a key of `library.INSTRUCTION_SETS`; None: the best.
        threads: 0: as many as torch uses.

    Returns:
        float32 [n, N], values that float16 holds.
    """
    assert MA.is_contiguous()
    of_columns, halves = _levels(half, codes.shape)
    MF, codes, a, c = (x.contiguous() for x in (MF, codes, a, c))
    found = torch.empty_like(c)
    _run(
        _COLUMNS, isa, threads, codes.shape, of_columns=of_columns, F=MF, half=halves, codes=codes, a=a, c=c, left=MA,
        norms=found,
    )  # fmt: skip
    return found


def pack_codes(codes: Tensor, bits: Tensor, block_size: int) -> Tensor:
    """See `format.packing.pack_codes`."""
    C, F = codes.shape
    widths = bits.tolist()
    if len(widths) != num_blocks(C, block_size) or any(not 0 <= b <= 8 for b in widths):
        raise ValueError(f"{C} components in blocks of {block_size} with block bits {widths}")
    codes, bits = codes.contiguous(), bits.to(torch.uint8).contiguous()
    words = torch.empty(sum(widths), F, dtype=code_dtype(block_size))
    wrong = library.load().bitsmoe_pack_codes(
        codes.data_ptr(), C, F, bits.data_ptr(), len(widths), words.itemsize, words.data_ptr()
    )
    if wrong >= 0:
        largest = int(codes[wrong * block_size : (wrong + 1) * block_size].max())
        raise ValueError(f"block {wrong}: code {largest} does not fit {widths[wrong]} bits")
    return words
