"""Packing of codes, by the compiled kernels where they run."""

from torch import Tensor

from bitsmoe_kernels._cpu import library
from bitsmoe_kernels._cpu import rounding as compiled
from bitsmoe_kernels.format import packing


def pack_codes(codes: Tensor, bits: Tensor, block_size: int) -> Tensor:
    """See `format.packing.pack_codes`; codes are on the CPU."""
    return (packing if library.why_not() else compiled).pack_codes(codes, bits, block_size)
