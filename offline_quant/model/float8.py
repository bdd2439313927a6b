"""Reads checkpoints in block-wise float8 (DeepSeek-V3), perhaps with experts in MXFP4 (DeepSeek-V4), as bfloat16."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError, fault_list
from bitsmoe_kernels.format.safetensors_io import ShardReader
from bitsmoe_kernels.format.schema import TensorSpec
from offline_quant.model.mxfp4 import BLOCK, decoded

SCALE, BARE_SCALE, WEIGHT = "_scale_inv", ".scale", ".weight"
"""`weight` and `weight_scale_inv`, or `scale` in the place of `weight`: one factor for each block."""


class Float8Reader(ShardReader):
    """Tensors of a float8 checkpoint; scaled ones appear as bfloat16, their factors do not appear.

    A matrix int8 [N, K / 2] with factors float8_e8m0 [N, K / 32] is MXFP4 of [N, K].

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
        self._scales: dict[str, str] = {}
        self._mxfp4: set[str] = set()
        faults = []
        for name in [n for n in self.specs if n.endswith((SCALE, BARE_SCALE))]:
            bare = name.endswith(BARE_SCALE)
            weight = name.removesuffix(BARE_SCALE) + WEIGHT if bare else name.removesuffix(SCALE)
            spec = self.specs.get(weight)
            if bare and (spec is None or spec.dtype not in (torch.float8_e4m3fn, torch.int8)):
                continue  # a weight of that name
            scale = self.specs.pop(name)
            if spec is not None and spec.dtype == torch.int8 and len(spec.shape) == 2:
                rows, columns = spec.shape[0], 2 * spec.shape[1]
                if scale != (wanted := TensorSpec(torch.float8_e8m0fnu, (rows, columns // BLOCK))) or columns % BLOCK:
                    faults.append(f"tensor {name} is {scale}, but {weight}, MXFP4 of {[rows, columns]}, needs {wanted}")
                self._mxfp4.add(weight)
                self.specs[weight] = TensorSpec(torch.bfloat16, (rows, columns))
            elif spec is None or spec.dtype != torch.float8_e4m3fn or len(spec.shape) != 2:
                faults.append(f"tensor {name} has no float8 matrix {weight}")
                continue
            else:
                blocks = tuple(-(-size // b) for size, b in zip(spec.shape, self.block, strict=True))
                if scale.shape != blocks:
                    faults.append(f"tensor {name} is {scale}, but {weight} of {list(spec.shape)} needs {list(blocks)}")
                self.specs[weight] = TensorSpec(torch.bfloat16, spec.shape)
            self._scales[weight] = name
        kinds = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
        left = [n for n, s in self.specs.items() if s.dtype in kinds and len(s.shape) > 1]
        faults += [f"tensor {name} is {self.specs[name]}, without scales" for name in left]
        if faults:
            raise BitsmoeError(fault_list(f"{directory}: float8 weights cannot be read", faults))

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU; scaled ones in bfloat16."""
        tensor = super().get(name)
        if name not in self._scales:
            return tensor
        scale = super().get(self._scales[name])
        if name in self._mxfp4:
            return decoded(tensor.view(torch.uint8), scale.view(torch.uint8))
        scale = scale.float()
        for axis, block in enumerate(self.block):
            # A block may be larger than the matrix, and of any size: repeating the scale could take any memory.
            size = tensor.shape[axis]
            scale = scale.index_select(axis, torch.arange(size) // min(block, max(size, 1)))
        return (tensor.float() * scale).bfloat16()
