"""Rounding by the compiled CPU kernels."""

import torch
from torch import Tensor

from bitsmoe_kernels._cpu import rounding as compiled
from offline_quant.linalg import CholeskyFactor, mirrored
from offline_quant.rounding.backends.base import RoundingBackend
from offline_quant.rounding.backends.torch_reference import measured
from offline_quant.rounding.grid import Grid, Quantized, as_half


class CpuRounding(RoundingBackend):
    """Tensors on the CPU, where `library.why_not` has no reason."""

    def hand_on(self, F: Tensor, U: Tensor, grid: Grid, c: Tensor, rough: bool) -> Quantized:
        """See `RoundingBackend`."""
        codes, a, norms, error, _ = compiled.round_with_feedback(F, U, grid.half, grid.power, c, rough)
        assert error is not None
        return Quantized(codes, a, c, norms, error)

    def round_alone(
        self, F: Tensor, M: Tensor, factor: CholeskyFactor, grid: Grid, c: Tensor, rough: bool
    ) -> Quantized:
        """See `RoundingBackend`."""
        codes, a, norms, _, left = compiled.round_alone(F, grid.half, grid.power, c, rough)
        assert left is not None
        return measured(codes, a, c, norms, left, M, factor)

    def refit(self, M: Tensor, MF: Tensor, q: Quantized, grid: Grid) -> tuple[Quantized, Tensor]:
        """See `RoundingBackend`. By a Cholesky factor where float32 has one."""
        system, right = compiled.scale_system(M, MF, grid.half, q.codes, q.c)
        diagonal = system.diagonal(dim1=-2, dim2=-1)
        diagonal += 1e-6 * diagonal.mean(-1, keepdim=True) + 1e-30
        root, info = torch.linalg.cholesky_ex(system)
        if bool(info.any()):
            a = torch.linalg.solve(mirrored(system.mT), right[:, :, None])[..., 0]
        else:
            a = torch.cholesky_solve(right[:, :, None], root)[..., 0]
        a = as_half(torch.where(grid.half.amax(-1) > 0, a, 0.0))
        MA = M @ compiled.scaled_levels(grid.half, q.codes, a)
        c = compiled.refit_columns_(MA, MF, grid.half, q.codes, a, q.c)
        return Quantized(q.codes, a, c, q.norms, q.error), MA

    def descend(self, F: Tensor, M: Tensor, q: Quantized, grid: Grid, gradient: Tensor) -> Quantized:
        """See `RoundingBackend`."""
        codes, error = compiled.descend(F, M, grid.half, q.codes, q.a, q.c, gradient)
        return Quantized(codes, q.a, q.c, q.norms, error)
