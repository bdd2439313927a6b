"""Which backend rounds: by the device that holds the tensors."""

import torch
from torch import Tensor

from bitsmoe_kernels import _triton
from bitsmoe_kernels._cpu import library
from offline_quant.rounding.backends.base import RoundingBackend
from offline_quant.rounding.backends.cpu_kernels import CpuRounding
from offline_quant.rounding.backends.torch_reference import TorchRounding


def why_no_kernels(device: torch.device) -> str | None:
    """Why torch's own operations round on a device, in several times the time; None: kernels do."""
    if device.type == "cpu":
        return library.why_not() and f"without the CPU kernels: {library.why_not()}"
    if device.type == "cuda":
        return _triton.why_not() and f"without the Triton kernels: {_triton.why_not()}"
    return f"on {device.type}, for which there are no kernels"


def backend_of(tensor: Tensor) -> RoundingBackend:
    """For tensors that lie where this one does."""
    if why_no_kernels(tensor.device):
        return TorchRounding()
    if tensor.is_cuda:
        # Triton may be absent.
        from offline_quant.rounding.backends.triton_kernels import TritonRounding

        return TritonRounding()
    return CpuRounding()
