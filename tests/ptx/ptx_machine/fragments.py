"""Matrices in the registers of warps, as the matrix instructions deal them out.

Lane l of a warp is g = l / 4 and t = l mod 4. A register of 16-bit numbers holds two of them, the first in its lower
half.
"""

from collections.abc import Sequence

import numpy as np

from ptx_machine.registers import Array
from ptx_machine.scalar import bfloat16_to_float32
from tensor_core import MatrixUnit, multiply_add


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


def product(a: Array, b: Array, c: Array, rounding: MatrixUnit | None) -> Array:
    """a [n, 16, 16] times b [n, 16, m] plus c [n, 16, m], float32; rounding: as that matrix unit adds; None: IEEE."""
    if rounding is None:
        return np.matmul(a, b) + c
    a, b, c = (v.astype(np.float64) for v in (a, b, c))
    return multiply_add(a, b, c, rounding).astype(np.float32)
