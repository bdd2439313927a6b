"""What reads a checkpoint, run on a damaged one: it must refuse with our error, or everything after it must work.

`examine` raises `FindingError` where that does not hold. What is read is watched in two ways: a parser of its own tells
which bytes of the file each tensor is, and the memory of every tensor must be those bytes in the mapping of that file.
"""

import json
import math
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.checkpoint import Checkpoint
from bitsmoe_kernels.format.safetensors_io import INDEX_FILE, ShardReader, read_json
from bitsmoe_kernels.format.schema import CheckpointConfig, Layer, num_blocks
from bitsmoe_kernels.layout.matrices import matrix_rows
from bitsmoe_kernels.layout.pack import to_kernel_layout, unsupported
from bitsmoe_kernels.reference import LayerWeights, moe_forward
from bitsmoe_kernels.sharding import shard_layer
from bitsmoe_vllm.startup import check_checkpoint, check_model
from bitsmoe_vllm.weight_loading import LayerLoader
from offline_quant.checkpoint.dequantize import dequantize_checkpoint
from offline_quant.model.expert_weights import ExpertWeights
from offline_quant.model.quantized import QuantizedModel, open_model
from offline_quant.model.source import SourceModel
from offline_quant.report.inspect import inspect_checkpoint
from tools.fuzz.mutations import SIZES

MESSAGE_LIMIT = 20_000
"""Characters of an error message; people read them."""

T = TypeVar("T")


class FindingError(Exception):
    """Something a damaged checkpoint must not cause."""


class RefusedError(Exception):
    """Our error: the expected end."""


def attempt(what: str, function: Callable[[], T]) -> T:
    """Run a reader, which may refuse.

    Raises:
        RefusedError: it did.
        FindingError: any other exception, or an error no terminal can show.
    """
    try:
        return function()
    except BitsmoeError as e:
        message = str(e)
        if len(message) > MESSAGE_LIMIT or not message:
            raise FindingError(f"{what}: the error has {len(message)} characters: {message[:300]}") from e
        try:
            message.encode()
        except UnicodeEncodeError as error:
            raise FindingError(f"{what}: the error cannot be printed: {message!a:.300}") from error
        raise RefusedError(message) from e
    except FindingError:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # pyo3's panics are no Exception
        raise FindingError(f"{what}: {type(e).__name__}: {e!a:.2000}") from e


def examine(directory: Path, scratch: Path) -> dict[str, str]:
    """Run every reader on a checkpoint.

    Args:
        directory: the checkpoint.
        scratch: a directory to write in.

    Returns:
        Reader -> "accepted" or the error.

    Raises:
        FindingError: see above.
    """
    outcome = {}
    readers: dict[str, Callable[[], object]] = {
        "shards": lambda: _read_shards(directory),
        "checkpoint": lambda: _use_checkpoint(directory),
        "startup": lambda: check_checkpoint(directory),
        "quantized model": lambda: _use_quantized(directory, scratch),
        "source model": lambda: _use_source(directory),
        "any model": lambda: _use_any(directory),
    }
    for name, reader in readers.items():
        try:
            attempt(name, reader)
            outcome[name] = "accepted"
        except RefusedError as e:
            outcome[name] = str(e)
    if outcome["checkpoint"] == "accepted" != outcome["startup"]:
        raise FindingError(f"startup refuses what the full check accepts: {outcome['startup']}")
    if outcome["quantized model"] == "accepted" != outcome["checkpoint"]:
        raise FindingError(f"a quantized model is accepted, but not its checkpoint: {outcome['checkpoint']}")
    return outcome


# Where tensors come from.


def expected_bytes(file: Path) -> dict[str, tuple[int, int]]:
    """Name -> first byte and end within a safetensors file, by the format's description alone.

    Raises:
        FindingError: a file no reader may accept.
    """
    raw = file.read_bytes()
    if len(raw) < 8:
        raise FindingError(f"{file.name}: accepted with {len(raw)} bytes")
    (length,) = struct.unpack_from("<Q", raw)
    if length > len(raw) - 8:
        raise FindingError(f"{file.name}: accepted, but its header of {length} bytes does not fit {len(raw)}")
    out = {}
    for name, info in json.loads(raw[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = info["data_offsets"]
        size = math.prod(info["shape"]) * SIZES[info["dtype"]]
        if not 0 <= begin <= end <= len(raw) - 8 - length or end - begin != size:
            raise FindingError(f"{file.name}: {name} is accepted with {info} in {len(raw) - 8 - length} bytes of data")
        out[name] = 8 + length + begin, 8 + length + end
    taken = sorted(out.values())
    if any(a[1] > b[0] for a, b in pairwise(taken)):
        raise FindingError(f"{file.name}: accepted with tensors that share bytes")
    return out


def mappings() -> list[tuple[int, int, int, str]]:
    """Begin, end, offset in the file and path of each mapping of this process."""
    out = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, offset, _, _, *path = line.split(maxsplit=5)
        begin, end = (int(v, 16) for v in addresses.split("-"))
        out.append((begin, end, int(offset, 16), path[0].strip() if path else ""))
    return out


def check_reader(reader: ShardReader) -> dict[str, Tensor]:
    """Read every tensor; its memory and its values must be its own bytes of its own file, in the directory.

    Raises:
        FindingError: they are not.
    """
    inside = reader.directory.resolve()
    _check_inside(reader.directory, INDEX_FILE)
    places: dict[str, tuple[Path, int, int]] = {}
    for file in sorted(set(reader._file_of.values())):
        path = (reader.directory / file).resolve()
        if path.parent != inside:
            raise FindingError(f"{file} leads to {path}, outside {inside}")
        places |= {
            name: (path, *place) for name, place in expected_bytes(path).items() if reader._file_of[name] == file
        }
    raw = {name: ShardReader.get(reader, name) for name in places}
    areas = mappings()
    for name, tensor in raw.items():
        path, begin, end = places[name]
        if tensor.nbytes != end - begin:
            raise FindingError(f"{name} has {tensor.nbytes} bytes in memory, {end - begin} in {path.name}")
        if not tensor.nbytes:
            continue
        at = tensor.data_ptr()
        area = next((a for a in areas if a[0] <= at and at + tensor.nbytes <= a[1]), None)
        if area is None or area[3] != str(path):
            raise FindingError(f"{name}: its memory is not within the mapping of {path}: {area}")
        if area[2] + at - area[0] != begin:
            raise FindingError(f"{name}: begins at byte {area[2] + at - area[0]} of {path.name}, not {begin}")
        if bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()) != path.read_bytes()[begin:end]:
            raise FindingError(f"{name}: is not what {path.name} holds from byte {begin} to {end}")
    for _, _, _, path_text in areas:
        if "outside" in path_text:
            raise FindingError(f"{path_text} is mapped, a file outside the checkpoint")
    return raw


def _check_inside(directory: Path, name: str) -> None:
    if not (directory / name).resolve().is_relative_to(directory.resolve()):
        raise FindingError(f"{name} was read, but leads outside {directory}")


def _read_shards(directory: Path) -> None:
    reader = ShardReader(directory)
    raw = check_reader(reader)
    for name in reader:
        if tuple(raw[name].shape) != reader.specs[name].shape or raw[name].dtype != reader.specs[name].dtype:
            raise FindingError(f"{name} is {raw[name].dtype} {raw[name].shape}, its header said {reader.specs[name]}")


# Quantized checkpoints.


def _use_checkpoint(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    _check_inside(directory, "config.json")
    check_reader(checkpoint.tensors)
    config = checkpoint.config
    faults = checkpoint.bit_faults()
    checkpoint.check()
    if faults:
        raise FindingError(f"accepted in full, but not its bits: {faults[:3]}")
    if CheckpointConfig.parse(json.loads(json.dumps(config.dump()))) != config:
        raise FindingError("the schema is not what is written of it")
    for prefix, layer in config.layers.items():
        use_layer(prefix, layer, config.block_size, checkpoint.layer_tensors(prefix))
    inspect_checkpoint(checkpoint)


def use_layer(prefix: str, layer: Layer, block_size: int, tensors: dict[str, Tensor]) -> None:
    """Everything done with a layer whose tensors have been accepted.

    Raises:
        FindingError: some of it gives other shapes than the schema says.
    """
    weights = LayerWeights(layer, block_size, tensors)
    experts, hidden, inner = layer.num_experts, layer.hidden_size, layer.intermediate_size
    gate_up, down = weights.experts(range(layer.num_experts))
    if gate_up.shape != (experts, (1 + layer.gated) * inner, hidden) or down.shape != (experts, hidden, inner):
        raise FindingError(f"{prefix}: dequantized to {list(gate_up.shape)} and {list(down.shape)}")
    x = torch.linspace(-1, 1, 2 * hidden).view(2, hidden)
    ids = torch.tensor([[0, experts - 1], [experts // 2, -1]])
    y = moe_forward(weights, x, torch.full((2, 2), 0.5), ids)
    if y.shape != x.shape:
        raise FindingError(f"{prefix}: output of {list(y.shape)}")
    if unsupported(layer) is None:
        kernel = to_kernel_layout(weights, torch.bfloat16, 4)
        for matrices in (kernel.inputs, kernel.down):
            for i in range(len(matrices.columns)):
                matrix_rows(matrices, i, 4)
            # Kernels do not check where they read.
            source = max(hidden, inner) if kernel.basis is None else max(len(kernel.basis), inner)
            if int(matrices.index.min()) < -1 or int(matrices.index.max()) >= source:
                raise FindingError(f"{prefix}: kernels would read component {int(matrices.index.max())} of {source}")
    ranks = 2 if num_blocks(inner, block_size) > 1 else 1
    for rank in range(ranks):
        part, shard = shard_layer(layer, tensors, block_size, rank, ranks)
        moe_forward(LayerWeights(part, block_size, shard), x, torch.full((2, 2), 0.5), ids)
        loader = LayerLoader(prefix, layer, block_size, rank, ranks)
        module = torch.nn.Module()  # the loader does not keep it alive
        loader.register(module)
        list(loader.load_weights(tensors.items()))
        if loader.shard != part or loader.missing():
            raise FindingError(f"{prefix}: the loader's shard is not that of shard_layer")


def _use_quantized(directory: Path, scratch: Path) -> None:
    model = QuantizedModel(directory)
    s = model.shape
    for layer in s.layers:
        _check_shapes(s, model.experts(layer))
    check_model(model.checkpoint.config, SimpleNamespace(**{k: v for k, v in model.config.items() if k.isidentifier()}))
    dequantize_checkpoint(directory, scratch / "dequantized", torch.float32)
    try:
        _use_source(scratch / "dequantized")
    except BitsmoeError as e:
        if "NaN or infinite" not in str(e):
            raise FindingError(f"what it was dequantized to is refused: {e}") from e


def _check_shapes(s: Any, experts: ExpertWeights) -> None:
    gate_up, down = experts.gate_up, experts.down
    expected = (s.num_experts, s.input_matrices * s.intermediate_size, s.hidden_size)
    if gate_up.shape != expected or down.shape != (s.num_experts, s.hidden_size, s.intermediate_size):
        raise FindingError(f"experts are {list(gate_up.shape)} and {list(down.shape)}")


# Unquantized ones.


def _use_source(directory: Path) -> None:
    model = SourceModel(directory)
    _check_inside(directory, "config.json")
    check_reader(model.tensors)
    model.check_finite(lambda names, _: names)
    for name, spec in model.tensors.specs.items():
        tensor = model.tensors.get(name)
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise FindingError(f"{name} is {tensor.dtype} {tensor.shape}, announced as {spec}")
    for layer in model.shape.layers:
        experts = model.experts(layer)
        _check_shapes(model.shape, experts)
        if not bool(experts.gate_up.isfinite().all() & experts.down.isfinite().all()):
            raise FindingError(f"layer {layer}: accepted as finite, but is not")


def _use_any(directory: Path) -> None:
    read_json(directory / "config.json")
    _check_inside(directory, "config.json")
    open_model(directory)
