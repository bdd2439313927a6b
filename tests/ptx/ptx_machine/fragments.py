"""Matrices in the registers of warps, as the matrix instructions deal them out.

Lane l of a warp is g = l / 4 and t = l mod 4. A register of 16-bit numbers holds two of them, the first in its lower
half.
"""

from collections.abc import Sequence

import numpy as np

from ptx_machine.registers import Array
from ptx_machine.scalar import bfloat16_to_float32


def numbers(bits: Array, kind: str) -> Array:
    """uint16 of float16 (`f16`) or bfloat16 (`bf16`) -> float32."""
    return bits.view(np.float16).astype(np.float32) if kind == "f16" else bfloat16_to_float32(bits)


def left(registers: Sequence[Array]) -> Array:
    """A of 16 x 16: four registers uint32 [threads] -> uint16 [warps, 16, 16].

    Register i of a lane: rows g + 8 (i mod 2), columns 2 t + 8 (i / 2) and the next.
    """
    x = np.stack(registers).view(np.uint16).reshape(2, 2, -1, 8, 4, 2)
    return x.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16)


def right(registers: Sequence[Array]) -> Array:
    """B of 16 x 8: two registers uint32 [threads] -> uint16 [warps, 16, 8].

    Register i of a lane: rows 2 t + 8 i and the next, column g.
    """
    x = np.stack(registers).view(np.uint16).reshape(2, -1, 8, 4, 2)
    return x.transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8)


def sums(registers: Array) -> Array:
    """C of 16 x 8 j: float32 [4 j, threads] -> [warps, 16, 8 j].

    Register 4 j + 2 i + e of a lane: row g + 8 i, column 8 j + 2 t + e.
    """
    n = len(registers) // 4
    return registers.reshape(n, 2, 2, -1, 8, 4).transpose(3, 1, 4, 0, 5, 2).reshape(-1, 16, 8 * n)


def dealt(matrix: Array) -> Array:
    """The inverse of `sums`: [warps, 16, 8 j] -> float32 [4 j, threads]."""
    n = matrix.shape[2] // 8
    return matrix.reshape(-1, 2, 8, n, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(4 * n, -1)


def product(a: Array, b: Array, c: Array, rounding: tuple[int, int] | None) -> Array:
    """a [n, 16, 16] times b [n, 16, m] plus c [n, 16, m], float32.

    rounding: None: IEEE sums in float32. Else as matrix units add: this number of products and the running sum
    are cut to 24 bits of the largest and this number of bits more, added, and cut to 24 bits.
    """
    if rounding is None:
        return np.matmul(a, b) + c
    terms, extra = rounding
    for k in range(0, a.shape[2], terms):
        some = slice(k, k + terms)
        each = a[:, :, None, some].astype(np.float64) * b.transpose(0, 2, 1)[:, None, :, some]
        c = _cut_sum(np.concatenate([each, c[..., None].astype(np.float64)], 3), extra)
    return c


def _cut_sum(terms: Array, extra: int) -> Array:
    """Sum over the last axis, float64 -> float32."""
    _, exponent = np.frexp(np.abs(terms).max(3))
    unit = np.ldexp(1.0, exponent - 24 - extra)
    total = (np.trunc(terms / unit[..., None])).sum(3) * unit
    near = total.astype(np.float32)
    beyond = np.abs(near) > np.abs(total)
    return np.where(beyond, np.nextafter(near, np.float32(0)), near)
