"""Checkpoints in block-wise float8, as DeepSeek-V3 ships: read as if they were bfloat16."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError, fault_list
from bitsmoe_kernels.format.safetensors_io import ShardReader
from bitsmoe_kernels.format.schema import TensorSpec

SCALE = "_scale_inv"
"""`weight` and `weight_scale_inv`: one float32 factor for each block."""


class Float8Reader(ShardReader):
    """Tensors of a float8 checkpoint; scaled ones appear as bfloat16, their factors do not appear.

    Args:
        directory: the checkpoint.
        quantization: `quantization_config` of its config.json.

    Raises:
        BitsmoeError: another kind of float8, or lists tensors and factors that do not fit.
    """

    def __init__(self, directory: Path, quantization: dict[str, Any]):
        block = quantization.get("weight_block_size")
        if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)):
            raise BitsmoeError(
                f"{directory}: is float8 with weight_block_size {block!r:.80} (config.json); only blocks, such as "
                "[128, 128], are read: quantize the 16-bit model instead"
            )
        super().__init__(directory)
        self.block: tuple[int, int] = (block[0], block[1])
        self._scaled: set[str] = set()
        faults = []
        for name in [n for n in self.specs if n.endswith(SCALE)]:
            weight, scale = name.removesuffix(SCALE), self.specs.pop(name)
            spec = self.specs.get(weight)
            if spec is None or spec.dtype != torch.float8_e4m3fn or len(spec.shape) != 2:
                faults.append(f"tensor {name} has no float8 matrix {weight}")
                continue
            blocks = tuple(-(-size // b) for size, b in zip(spec.shape, self.block, strict=True))
            if scale.shape != blocks:
                faults.append(f"tensor {name} is {scale}, but {weight} of {list(spec.shape)} needs {list(blocks)}")
            self.specs[weight] = TensorSpec(torch.bfloat16, spec.shape)
            self._scaled.add(weight)
        left = [n for n, s in self.specs.items() if s.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)]
        faults += [f"tensor {name} is {self.specs[name]}, without {name}{SCALE}" for name in left]
        if faults:
            raise BitsmoeError(fault_list(f"{directory}: float8 weights cannot be read", faults))

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU; scaled ones in bfloat16."""
        tensor = super().get(name)
        if name not in self._scaled:
            return tensor
        scale = super().get(name + SCALE).float()
        for axis, block in enumerate(self.block):
            # Not by repeating: a block may be larger than the matrix, and then of any size.
            size = tensor.shape[axis]
            scale = scale.index_select(axis, torch.arange(size) // min(block, max(size, 1)))
        return (tensor.float() * scale).bfloat16()
