"""Which path computes a layer: the Triton kernels, or the torch reference and why."""

import importlib.util

import torch

from bitsmoe_kernels.backends.launch_config import why_no_table
from bitsmoe_kernels.format.schema import Layer

KERNEL_DTYPES = (torch.float16, torch.bfloat16)


def why_not_kernels(layer: Layer, dtype: torch.dtype, capability: int | None) -> str | None:
    """Why the kernels cannot compute a layer; None where they can.

    Args:
        layer: schema of the layer or of a shard of it.
        dtype: of activations.
        capability: of the GPU, such as 90; None: no CUDA device.
    """
    from bitsmoe_kernels.layout.pack import unsupported

    if capability is None:
        return "there is no CUDA device"
    if reason := why_no_table(capability):
        return reason
    if dtype not in KERNEL_DTYPES:
        return f"activations are {str(dtype).removeprefix('torch.')}, not float16 or bfloat16"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return unsupported(layer)
