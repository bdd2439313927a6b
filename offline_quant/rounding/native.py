"""Where rounding and packing run: by the compiled CPU kernels, or by torch."""

from torch import Tensor

from bitsmoe_kernels._cpu import library
from bitsmoe_kernels._cpu import rounding as compiled
from bitsmoe_kernels.format import packing


def runs_on(tensor: Tensor) -> bool:
    """Whether the compiled kernels compute with a tensor. Torch does it on other devices, and where there are none."""
    return tensor.device.type == "cpu" and library.why_not() is None


def pack_codes(codes: Tensor, bits: Tensor, block_size: int) -> Tensor:
    """See `format.packing.pack_codes`."""
    return (compiled.pack_codes if runs_on(codes) else packing.pack_codes)(codes, bits, block_size)
