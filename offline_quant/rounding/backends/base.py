"""What a backend of the rounding computes. `error_feedback` has the mathematics.

Shapes: factors F [n, K, N], their moments M [n, K, K], all float32.
"""

from abc import ABC, abstractmethod

from torch import Tensor

from offline_quant.linalg import CholeskyFactor
from offline_quant.rounding.grid import Grid, Quantized


class RoundingBackend(ABC):
    """Steps of `error_feedback.quantize`. The same input gives the same bytes, on any number of threads."""

    @abstractmethod
    def hand_on(self, F: Tensor, U: Tensor, grid: Grid, c: Tensor, rough: bool) -> Quantized:
        """Round rows in turn; each hands its error on to those after it.

        Args:
            F: [n, K, N].
            U: [n, K, K], see `CholeskyFactor`.
            grid: of the codes.
            c: [n, N], column scales.
            rough: guess row scales instead of searching for them.
        """

    @abstractmethod
    def round_alone(
        self, F: Tensor, M: Tensor, factor: CholeskyFactor, grid: Grid, c: Tensor, rough: bool
    ) -> Quantized:
        """Round every row to its own best scale.

        Args:
            F: [n, K, N].
            M: [n, K, K], undamped, and
            factor: that damps it: both measure the error.
            grid: of the codes.
            c: [n, N], column scales.
            rough: guess row scales instead of searching for them.
        """

    @abstractmethod
    def refit(self, M: Tensor, MF: Tensor, q: Quantized, grid: Grid) -> tuple[Quantized, Tensor]:
        """Best a for fixed codes and c (one K x K solve), then best c for fixed codes and a (one ratio per output).

        Args:
            M: [n, K, K], damped.
            MF: M F [n, K, N].
            q: codes and scales.
            grid: of the codes.

        Returns:
            Codes with these scales, their error still the former's; M (F - F^) [n, K, N].
        """

    @abstractmethod
    def descend(self, F: Tensor, M: Tensor, q: Quantized, grid: Grid, gradient: Tensor) -> Quantized:
        """Round every row again, against what all other rows leave over.

        Args:
            F: [n, K, N].
            M: [n, K, K], damped.
            q: codes and scales.
            grid: of the codes.
            gradient: M (F - F^) [n, K, N]; is overwritten.
        """
