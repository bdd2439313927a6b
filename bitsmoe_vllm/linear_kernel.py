"""Linear layers at 8 or 4 bits on CPUs for which vLLM has no kernel: they become 16-bit ones when they are loaded.

vLLM chooses among classes like this one. Importing this module adds ours to them.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel, MPLinearLayerConfig
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from bitsmoe_kernels.format.linear_layers import DenseBits, dequantize
from bitsmoe_vllm import _compat

_BITS: dict[Any, DenseBits] = {scalar_types.uint4b8: 4, scalar_types.uint8b128: 8}


def vllm_computes(c: MPLinearLayerConfig) -> bool:
    """Whether vLLM's own kernel can compute a layer here. Its library for AVX2 lacks the function."""
    return hasattr(torch.ops._C, "cpu_gemm_wna16") and CPUWNA16LinearKernel.can_implement(c)[0]


class DequantizedLinearKernel(MPLinearKernel):
    """Dequantizes a layer after loading; torch multiplies by the 16-bit weight."""

    @classmethod
    def get_min_capability(cls) -> int:
        """None."""
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Any layer of ours that vLLM cannot compute on a CPU, or why not."""
        if not current_platform.is_cpu():
            return False, "it is for CPUs"
        if c.weight_type not in _BITS or c.zero_points:
            return False, "it is for symmetric integers of 4 or 8 bits"
        if vllm_computes(c):
            return False, "vLLM has a kernel of its own"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Put the weight in the dtype of activations in place of the packed one."""
        packed, scale, _ = self._get_weight_params(layer)
        bits = _BITS[self.config.weight_type]
        _compat.warn_once(
            "bitsmoe: this vLLM has no kernel for linear layers of %d bits on this CPU (--dense-bits %d). They are "
            "dequantized, and take the memory and time of 16 bits.",
            bits,
            bits,
        )
        weight = dequantize(packed.data, scale.data, bits).to(self.config.act_type)
        setattr(layer, self.w_q_name, torch.nn.Parameter(weight, requires_grad=False))

    def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] times the weight: [..., N]."""
        return torch.nn.functional.linear(x, getattr(layer, self.w_q_name), bias)


_compat.add_linear_kernel(DequantizedLinearKernel)
