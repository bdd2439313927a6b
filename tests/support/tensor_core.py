"""How a matrix unit adds: products of a few components and the sum so far are aligned, cut and added, toward zero.

Fasi et al., "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7 (2021), e330; later units keep more
bits and add more products together.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
MANTISSA = 24


@dataclass(frozen=True)
class MatrixUnit:
    """One generation.

    Attributes:
        terms: products that are added together.
        extra: bits below a float32's last one that aligned terms keep.
    """

    terms: int
    extra: int


AMPERE, HOPPER = MatrixUnit(8, 1), MatrixUnit(16, 2)


def cut(v: Array, unit: Array) -> Array:
    """v rounded toward zero to multiples of `unit`, powers of two."""
    return np.trunc(v / unit) * unit


def multiply_add(left: Array, right: Array, acc: Array, unit: MatrixUnit) -> Array:
    """acc + left @ right as the unit computes it, values of float32.

    Args:
        left: [..., M, K], values of float16 or bfloat16.
        right: [..., K, N], likewise.
        acc: [..., M, N], values of float32.
        unit: see `MatrixUnit`.
    """
    for k in range(0, left.shape[-1], unit.terms):
        products = left[..., k : k + unit.terms, None] * right[..., None, k : k + unit.terms, :]
        terms = np.concatenate([acc[..., None, :], products], -2)
        _, exponent = np.frexp(np.abs(terms).max(-2))
        total = cut(terms, np.ldexp(1.0, exponent - MANTISSA - unit.extra)[..., None, :]).sum(-2)
        _, exponent = np.frexp(np.abs(total))
        acc = cut(total, np.ldexp(1.0, exponent - MANTISSA))
    return acc


@contextmanager
def rounding_toward_zero(unit: MatrixUnit) -> Iterator[None]:
    """Products in Triton's interpreter are those of a matrix unit."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        left, right, acc = (v.data.astype(np.float64) for v in (a, b, d))
        total = multiply_add(left, right, acc, unit)
        return TensorHandle(total.astype(np.float32), d.dtype.scalar)

    with patch.object(InterpreterBuilder, "create_dot", create_dot):
        yield
