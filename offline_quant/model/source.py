"""A model's weights from its files, ordinary or quantized: routed experts as stacked matrices, the rest by name."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError, fault_list
from bitsmoe_kernels.format.safetensors_io import ShardReader, read_json
from bitsmoe_kernels.models.families import language_config, without_quantization
from offline_quant.model.expert_files import expert_tensor_shapes, read_experts
from offline_quant.model.expert_weights import ExpertWeights
from offline_quant.model.float8 import Float8Reader
from offline_quant.model.mxfp4 import Mxfp4Reader
from offline_quant.model.outside.shape import model_shape
from offline_quant.model.packed_integers import PackedReader
from offline_quant.model.side_files import check_side_files
from offline_quant.model.sizes import RunSizes
from offline_quant.model.tensors import Tensors

CHECKED_VALUES = 1 << 24
"""Values of a tensor that are checked at a time."""
MAX_WEIGHT = 1e12
"""Largest weight that can be quantized: far beyond any trained weight. Squares of what larger ones compute leave
float32."""
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")
"""Parts of tensor names that wrappers of modules add."""
_EXPERT_NUMBER = re.compile(r"(.*?\.experts\.)(\d+)\.")
MAX_FAULTS = 1_000
"""Faults after which no more are looked for."""


def source_reader(config: dict[str, Any], directory: Path) -> Callable[[], ShardReader]:
    """What reads a model's tensors: of 16 or 32 bits, or as some are published, float8, packed integers or MXFP4.

    Raises:
        BitsmoeError: config.json names another quantization.
    """
    own, nested = config.get("quantization_config"), language_config(config).get("quantization_config")
    if own is not None and nested is not None and own != nested:
        raise BitsmoeError(f"{directory}: config.json describes two quantizations; quantize the 16-bit model instead")
    quantization = nested if own is None else own
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    readers = {"fp8": Float8Reader, "compressed-tensors": PackedReader, "mxfp4": Mxfp4Reader}
    if quantization is None or (isinstance(quantization, dict) and method is None):
        return lambda: ShardReader(directory)
    if not isinstance(quantization, dict) or not isinstance(method, str) or method not in readers:
        raise BitsmoeError(f"{directory}: is already quantized ({method!r:.80}); quantize the 16-bit model instead")
    return lambda: readers[method](directory, quantization)


class SourceModel:
    """An unquantized checkpoint directory: config, tensors, and its experts as stacked matrices.

    Block-wise float8, packed integers and MXFP4 count as unquantized: some models are published so.

    Raises:
        BitsmoeError: lists all missing or misshapen tensors and files.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = read_json(directory / "config.json")
        reader = source_reader(self.config, directory)
        self.config = without_quantization(self.config)
        self.shape = model_shape(self.config, directory, lambda: reader().specs.keys())
        check_side_files(directory)
        self.tensors = reader()
        self._check_experts()

    def _check_experts(self) -> None:
        s = self.shape
        if fault := self._prefix_fault():
            raise BitsmoeError(f"{self.directory}: {fault}")
        faults = self._count_faults()
        known: set[str] = set()
        for layer in s.layers:
            if len(faults) > MAX_FAULTS:
                break  # config.json may claim any number of layers and experts
            expected = expert_tensor_shapes(s, layer, self.tensors.specs, len(self.tensors.specs) + 1)
            known |= expected.keys()
            for name, shape in expected.items():
                spec = self.tensors.specs.get(name)
                if spec is None:
                    faults.append(f"tensor {name} is missing")
                elif spec.shape != shape:
                    faults.append(f"tensor {name} has shape {list(spec.shape)}, config.json says {list(shape)}")
                elif spec.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                    faults.append(f"tensor {name} is {spec.dtype}; bfloat16, float16 or float32 is needed")
        if not faults:
            left = sorted(name for name in self.tensors if s.is_expert_tensor(name) and name not in known)
            faults = [f"tensor {name} belongs to experts, but is no gate, up or down matrix of theirs" for name in left]
        if faults:
            raise BitsmoeError(fault_list(f"{self.directory}: experts are not as config.json describes them", faults))

    def _count_faults(self) -> list[str]:
        """Layers that hold another number of experts than config.json says."""
        s = self.shape
        stored: dict[str, set[int]] = {f"{s.prefix(layer)}.": set() for layer in s.layers}
        for name in self.tensors:
            if (match := _EXPERT_NUMBER.match(name)) and match[1] in stored:
                stored[match[1]].add(int(match[2]))
        # Experts missing in the middle are missing tensors, and named so.
        counts = {prefix: len(found) for prefix, found in stored.items() if found == set(range(len(found))) and found}
        wanted = {f"{s.prefix(layer)}.": s.of_layer(layer).num_experts for layer in s.layers}
        unequal = (
            "; it knows one number for all layers" if s.layer_experts is None and len({*counts.values()}) > 1 else ""
        )
        return [
            f"{prefix[:-1]}: {count} experts are stored, config.json says {wanted[prefix]}{unequal}"
            for prefix, count in counts.items()
            if count != wanted[prefix]
        ]

    def _prefix_fault(self) -> str | None:
        """The fault of names that all have a part too many or too few in front; None where there is none."""
        layer = self.shape.layers[0]
        wanted = (self.shape.expert_names(layer, 0)[0], self.shape.fused_names(layer)[0])
        if any(name in self.tensors for name in wanted):
            return None
        bare = [(name, name.removeprefix("model.")) for name in wanted]
        for found in self.tensors:
            inner = ".".join(part for part in found.split(".") if part not in _WRAPPERS)
            if inner != found and inner in wanted:
                return f"tensor {found} should be called {inner}: rename it, and all others likewise"
            for name, end in bare:
                if found == end or found.endswith(f".{end}"):
                    return f"tensor {found} should be called {name}: rename it, and all others likewise"
        return None

    def experts(self, layer: int, chunk: range | None = None) -> ExpertWeights:
        """Routed experts of a layer, see `WeightSource`."""
        whole = range(self.shape.of_layer(layer).num_experts)
        return read_experts(self.tensors, self.shape, layer, whole if chunk is None else chunk)

    def check_finite(self, progress: Callable[[Sequence[str], str], Iterable[str]]) -> None:
        """Read every tensor once and refuse values that nothing can be computed with, see `value_faults`.

        Raises:
            BitsmoeError: names every tensor that has some.
        """
        if faults := value_faults(self.tensors, progress, self.shape.is_expert_tensor):
            raise BitsmoeError(
                fault_list(
                    f"{self.directory}: weights that nothing can be computed with; if they are not meant to be so, "
                    "download the model again",
                    faults,
                )
            )


def value_faults(
    tensors: Tensors,
    progress: Callable[[Sequence[str], str], Iterable[str]],
    quantized: Callable[[str], bool] = lambda name: False,
) -> list[str]:
    """Faults of tensors that hold NaN, infinity or, to be quantized, far too large values. Reads all tensors."""
    faults = []
    for name in progress(list(tensors), "Checking weights"):
        tensor = tensors.get(name)
        if not tensor.is_floating_point():
            continue
        largest, bad = _largest(tensor)
        if bad:
            faults.append(f"tensor {name}: {bad} of {tensor.numel()} values are NaN or infinite")
        elif largest > MAX_WEIGHT and quantized(name):
            faults.append(f"tensor {name}: holds values up to {largest:.3g}; up to {MAX_WEIGHT:.0e} can be quantized")
    return faults


def _largest(tensor: Tensor) -> tuple[float, int]:
    """The largest magnitude, and the number of values that are NaN or infinite. Reads in parts: torch makes copies."""
    largest, bad = 0.0, 0
    for part in tensor.view(-1).split(CHECKED_VALUES):
        known = part.float() if part.itemsize == 1 else part  # torch knows no extremes of float8
        found = max(abs(float(v)) for v in known.aminmax()) if len(known) else 0.0
        if math.isfinite(found):
            largest = max(largest, found)
        else:
            bad += len(known) - int(known.isfinite().count_nonzero())
    return largest, bad


def checking_bytes(sizes: RunSizes) -> int:
    """Bytes of memory that `SourceModel.check_finite` takes: the largest tensor is read as a whole."""
    return sizes.whole_tensor_bytes
