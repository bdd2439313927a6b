"""Reads checkpoints whose matrices are packed integers (Kimi-K2-Thinking to K2.7) as bfloat16.

The form is `pack-quantized` of compressed-tensors: symmetric codes of 4 or 8 bits in words of 32, and a scale for each
group of columns.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError, fault_list
from bitsmoe_kernels.format.linear_layers import DenseBits, dequantize
from bitsmoe_kernels.format.safetensors_io import ShardReader
from bitsmoe_kernels.format.schema import TensorSpec

FORMAT = "pack-quantized"
PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
"""What follows `weight` in the names of the codes, of the scales, and of the matrix's shape."""


class PackedReader(ShardReader):
    """Tensors of a checkpoint with packed integers; packed matrices appear as bfloat16, their parts do not appear.

    Args:
        directory: the checkpoint.
        quantization: `quantization_config` of its config.json.

    Raises:
        BitsmoeError: another form, or lists codes and scales that do not fit.
    """

    def __init__(self, directory: Path, quantization: dict[str, Any]):
        self.bits = _bits(quantization, directory)
        super().__init__(directory)
        self._packed: set[str] = set()
        faults = []
        for packed in [n for n in self.specs if n.endswith(f"weight{PACKED}")]:
            name = packed.removesuffix(PACKED)
            codes, scale = self.specs.pop(packed), self.specs.pop(name + SCALE, None)
            shape = self.specs.pop(name + SHAPE, None)
            if codes.dtype != torch.int32 or len(codes.shape) != 2:
                faults.append(f"tensor {packed} is {codes}, but must be an int32 matrix")
                continue
            rows, columns = codes.shape[0], codes.shape[1] * 32 // self.bits
            if scale is None or shape is None:
                faults.append(f"tensor {packed} has no {name}{SCALE if scale is None else SHAPE}")
            elif len(scale.shape) != 2 or scale.shape[0] != rows or not scale.shape[1] >= 1 or columns % scale.shape[1]:
                faults.append(f"tensor {name}{SCALE} is {scale}, which does not divide {rows} x {columns} codes")
            elif shape.shape != (2,) or shape.dtype not in (torch.int32, torch.int64):
                faults.append(f"tensor {name}{SHAPE} is {shape}, but must be two whole numbers")
            self.specs[name] = TensorSpec(torch.bfloat16, (rows, columns))
            self._packed.add(name)
        if faults:
            raise BitsmoeError(fault_list(f"{directory}: packed integers cannot be read", faults))

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU; packed ones in bfloat16.

        Raises:
            BitsmoeError: a packed matrix of another shape than its codes have.
        """
        if name not in self._packed:
            return super().get(name)
        matrix = dequantize(super().get(name + PACKED), super().get(name + SCALE), self.bits)
        if (said := super().get(name + SHAPE).tolist()) != list(matrix.shape):
            raise BitsmoeError(f"{self.directory}: tensor {name}{SHAPE} says {said}, the codes {list(matrix.shape)}")
        return matrix.bfloat16()


def _bits(quantization: dict[str, Any], directory: Path) -> DenseBits:
    """Bits of a code, where all matrices are of the form that is read here."""
    groups = quantization.get("config_groups")
    found: set[int] = set()
    for group in groups.values() if isinstance(groups, dict) else ():
        described = group.get("weights") if isinstance(group, dict) else None
        weights = described if isinstance(described, dict) else {}
        form = [weights.get(key) for key in ("type", "symmetric", "strategy")]
        known = form in (["int", True, "group"], ["int", True, "channel"]) and not group.get("input_activations")
        found.add(weights["num_bits"] if known and weights.get("num_bits") in (4, 8) else 0)
    if quantization.get("format") != FORMAT or len(found) != 1 or 0 in found:
        raise BitsmoeError(
            f"{directory}: is already quantized (compressed-tensors, format {quantization.get('format')!r:.80}); only "
            f"symmetric {FORMAT} integers of 4 or 8 bits without quantized activations are read: quantize the 16-bit "
            "model instead"
        )
    return cast(DenseBits, found.pop())
