"""Rounding by the Triton kernels: what goes row by row. All else are few launches of torch's."""

from torch import Tensor

from bitsmoe_kernels._triton import rounding as kernels
from offline_quant.linalg import CholeskyFactor
from offline_quant.rounding.backends.torch_reference import TorchRounding, gained, measured
from offline_quant.rounding.grid import Grid, Quantized


class TritonRounding(TorchRounding):
    """Tensors on a CUDA device."""

    def hand_on(self, F: Tensor, U: Tensor, grid: Grid, c: Tensor, rough: bool) -> Quantized:
        """See `RoundingBackend`."""
        codes, a, norms, error = kernels.round_with_feedback(F, U, grid.half, grid.power, c, rough)
        return Quantized(codes, a, c, norms, error)

    def round_alone(
        self, F: Tensor, M: Tensor, factor: CholeskyFactor, grid: Grid, c: Tensor, rough: bool
    ) -> Quantized:
        """See `RoundingBackend`."""
        codes, a, norms, left = kernels.round_alone(F, grid.half, grid.power, c, rough)
        return measured(codes, a, c, norms, left, M, factor)

    def descend(self, F: Tensor, M: Tensor, q: Quantized, grid: Grid, gradient: Tensor) -> Quantized:
        """See `RoundingBackend`."""
        error = ((F - q.values(grid)) * gradient).sum((1, 2))
        codes, change = kernels.descend(M, grid.half, q.codes, q.a, q.c, gradient)
        own = M.diagonal(dim1=-2, dim2=-1)[:, :, None]
        return Quantized(codes, q.a, q.c, q.norms, error - gained(gradient, change, own))
