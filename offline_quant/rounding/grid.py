"""Levels of rounded values, and what rounding gives."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bitsmoe_kernels.format.schema import MAX_BITS
from offline_quant.rounding.gaussian import gaussian_quantizer


@dataclass(frozen=True)
class Grid:
    """Levels of every row or column of factors [n, K, N].

    Attributes:
        half: float32, the largest level, (2^b - 1) / 2: [n, K, 1] where widths run along K, [n, 1, N] along N.
        power: float32, mean square of the levels that suit a unit Gaussian, of the same shape.
    """

    half: Tensor
    power: Tensor

    @classmethod
    def of(cls, width: Tensor) -> "Grid":
        """Of widths in bits, of half's shape."""
        step = gaussian_steps(width.device)[width.long()]
        # A Gaussian's levels have a root mean square of about 1 / step.
        power = torch.where(width > 0, step.clamp(min=1e-6).pow(-2), 0.0)
        return cls((torch.exp2(width.float()) - 1) / 2, power)

    def levels(self, codes: Tensor) -> Tensor:
        """q - (2^b - 1) / 2, and 0 where b = 0."""
        return (codes - self.half) * (self.half > 0)


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

    def values(self, grid: Grid) -> Tensor:
        """F^ [n, K, N], float32."""
        return self.a[:, :, None] * self.c[:, None] * grid.levels(self.codes)

    def dequantize(self, width: Tensor) -> Tensor:
        """The same for widths [n, K, 1] or [n, 1, N]."""
        return self.values(Grid.of(width))


@lru_cache
def gaussian_steps(device: torch.device) -> Tensor:
    """Best step of a unit Gaussian at each bit-width."""
    return torch.tensor([gaussian_quantizer(b)[0] for b in range(MAX_BITS + 1)], device=device)


def as_half(x: Tensor) -> Tensor:
    """To values that float16 holds."""
    return x.half().float()
