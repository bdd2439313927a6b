"""MXFP4 as bfloat16, which holds it exactly; reads checkpoints whose experts are stacked matrices in it (gpt-oss).

A code of 4 bits is a sign, two bits of exponent and one of mantissa; 32 neighbours share a power of two (OCP
Microscaling Formats 1.0). Two codes share a byte, the first in its lower half.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError, fault_list
from bitsmoe_kernels.format.safetensors_io import ShardReader
from bitsmoe_kernels.format.schema import TensorSpec

BLOCKS, SCALES = "_blocks", "_scales"
"""What follows a stacked matrix's name: codes uint8 [E, N, K / 32, 16], exponents uint8 [E, N, K / 32]."""
BLOCK, EXPONENT_OF_ONE = 32, 127
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], dtype=torch.bfloat16)
_PAIRS = torch.stack([_NUMBERS[torch.arange(256) % 16], _NUMBERS[torch.arange(256) // 16]], 1)


def decoded(codes: Tensor, exponents: Tensor) -> Tensor:
    """bfloat16 [..., K] of codes uint8 [..., K / 2] and exponents uint8 [..., K / 32]."""
    values = _PAIRS[codes.int()].view(*exponents.shape, BLOCK)
    values *= torch.exp2(exponents.float() - EXPONENT_OF_ONE).bfloat16()[..., None]
    return values.flatten(-2)


class Mxfp4Reader(ShardReader):
    """Tensors of a checkpoint with MXFP4; such matrices appear as bfloat16 [E, K, N], their parts do not appear.

    Args:
        directory: the checkpoint.
        quantization: `quantization_config` of its config.json.

    Raises:
        BitsmoeError: lists codes and exponents that do not fit.
    """

    def __init__(self, directory: Path, quantization: dict[str, Any]):
        super().__init__(directory)
        self._coded: set[str] = set()
        faults = []
        for name in [n.removesuffix(BLOCKS) for n in self.specs if n.endswith(BLOCKS)]:
            codes, scales = self.specs.pop(name + BLOCKS), self.specs.pop(name + SCALES, None)
            if codes.dtype != torch.uint8 or len(codes.shape) != 4 or codes.shape[3] != BLOCK // 2:
                faults.append(f"tensor {name}{BLOCKS} is {codes}, but must be uint8 [experts, outputs, blocks, 16]")
            elif scales != TensorSpec(torch.uint8, codes.shape[:3]):
                found = "missing" if scales is None else str(scales)
                faults.append(f"tensor {name}{SCALES} is {found}, but must be uint8 {list(codes.shape[:3])}")
            else:
                E, N, groups, _ = codes.shape
                self.specs[name] = TensorSpec(torch.bfloat16, (E, groups * BLOCK, N))
                self._coded.add(name)
        if faults:
            raise BitsmoeError(fault_list(f"{directory}: MXFP4 cannot be read", faults))

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU; coded ones in bfloat16."""
        if name not in self._coded:
            return super().get(name)
        spec = self.specs[name]
        whole = torch.empty(spec.shape, dtype=spec.dtype)
        # One by one: decoding takes several times the memory.
        for held, codes, scales in zip(whole, super().get(name + BLOCKS), super().get(name + SCALES), strict=True):
            held.copy_(self._decoded(codes, scales))
        return whole

    def rows(self, name: str, part: slice) -> Tensor:
        """Some experts of a tensor; no others are decoded."""
        if name not in self._coded:
            return super().rows(name, part)
        return self._decoded(super().get(name + BLOCKS)[part], super().get(name + SCALES)[part])

    def _decoded(self, codes: Tensor, scales: Tensor) -> Tensor:
        """bfloat16 [..., K, N] of codes uint8 [..., N, K / 32, 16] and exponents uint8 [..., N, K / 32]."""
        return decoded(codes.flatten(-2), scales).mT
