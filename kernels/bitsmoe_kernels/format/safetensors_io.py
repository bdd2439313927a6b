"""safetensors checkpoints in Hugging Face layout: one file, or shards with `model.safetensors.index.json`."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError, fault_list
from bitsmoe_kernels.format.schema import TensorSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAPPED_BYTES = 1 << 28
"""Files are mapped anew once this much was read: what was read counts as this process's memory until then."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


MAX_STRIDE, MAX_DIMENSIONS = 2**63 - 1, 64
"""What torch can compute with. A shape with a 0 in it may claim any size, one of ones any number of dimensions."""
MAX_DEPTH = 100
"""Of values within values in JSON."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        BitsmoeError: no such file (see `file_fault`), or no JSON object in it.
    """
    try:
        if fault := file_fault(path.parent, path.name):
            raise OSError(fault)
        data = json.loads(path.read_text(encoding="utf-8"))
        # A lone half of a surrogate pair, which JSON can name, fits no file name and no terminal.
        json.dumps(data, ensure_ascii=False).encode()
    except (OSError, ValueError) as e:
        raise BitsmoeError(f"{path}: cannot be read as JSON ({e})") from None
    except RecursionError:
        raise BitsmoeError(f"{path}: cannot be read as JSON (values within values, too deep)") from None
    if not isinstance(data, dict):
        raise BitsmoeError(f"{path}: holds {type(data).__name__}, expected a JSON object")
    if _depth(data) > MAX_DEPTH:
        raise BitsmoeError(f"{path}: holds values within values more than {MAX_DEPTH} deep, which no config does")
    return data


def _depth(data: Any) -> int:
    """Levels of a JSON value, without recursion; not counted far beyond `MAX_DEPTH`."""
    level, depth = [data], 0
    while level and depth <= MAX_DEPTH:
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level, depth = [value for values in inner for value in values], depth + 1
    return depth


def file_fault(directory: Path, name: str) -> str | None:
    """Why a file of a checkpoint must not be read; None if it may.

    A link that leads out of the directory is refused: whoever made the directory would choose what of this machine is
    read, and perhaps published with the result. The Hub's cache, which consists of such links, is an exception.

    Args:
        directory: the checkpoint.
        name: of a file in it.
    """
    try:
        real, here = (directory / name).resolve(strict=True), directory.resolve()
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, RuntimeError, ValueError) as e:  # links in a circle, names no file system takes
        return f"{name!r:.80} cannot be opened ({type(e).__name__})"
    if not real.is_file():
        return f"{name} is no regular file"
    cache = [here.parent.parent / "blobs"] if here.parent.name == "snapshots" else []
    if not any(real.is_relative_to(place) for place in (here, *cache)):
        return f"{name} is a link to {real}, outside the checkpoint: put the file itself there"
    return None


def umask() -> int:
    """The process's file mode creation mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_index(directory: Path) -> dict[str, str] | None:
    """Tensor name -> file from the index of a sharded checkpoint; None without an index.

    Raises:
        BitsmoeError: not such a mapping, or one that leads out of the directory.
    """
    index = directory / INDEX_FILE
    if not os.path.lexists(index):
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise BitsmoeError(f"{index}: has no `weight_map` from tensor names to files")
    outside = sorted({f for f in weight_map.values() if os.path.basename(f) != f or f in ("", ".", "..")})
    if outside:
        raise BitsmoeError(f"{index}: names files outside the checkpoint: {[f[:80] for f in outside[:3]]}")
    return weight_map


class ShardReader:
    """Tensors of a checkpoint directory, memory-mapped and read one at a time.

    Opening reads all headers and reports all missing or damaged files at once.

    Raises:
        BitsmoeError: lists every fault.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        weight_map, faults = read_index(directory), []
        if weight_map is None and not (directory / SINGLE_FILE).exists():
            raise BitsmoeError(f"{directory}: holds neither {SINGLE_FILE} nor {INDEX_FILE} (only safetensors are read)")
        files = [SINGLE_FILE] if weight_map is None else sorted(set(weight_map.values()))
        self.specs: dict[str, TensorSpec] = {}
        self._file_of: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        self._mapped = 0
        for file in files:
            if fault := file_fault(directory, file):
                named = f", though {INDEX_FILE} names it: download it again" if fault.endswith("missing") else ""
                faults.append(fault + named)
                continue
            try:
                handle = safe_open(str(directory / file), framework="pt")
                for name in handle.keys():  # noqa: SIM118 - not a dict
                    view = handle.get_slice(name)
                    dtype = _DTYPES.get(view.get_dtype())
                    if dtype is None:
                        faults.append(f"{file}: tensor {name} has dtype {view.get_dtype()}, which is not supported")
                        continue
                    shape = view.get_shape()
                    if len(shape) > MAX_DIMENSIONS or math.prod(max(d, 1) for d in shape) > MAX_STRIDE:
                        faults.append(f"{file}: tensor {name} has shape {shape}, more than torch can hold")
                        continue
                    if name in self._file_of:
                        faults.append(f"tensor {name} is in {self._file_of[name]} and in {file}")
                    self.specs[name] = TensorSpec(dtype, tuple(shape))
                    self._file_of[name] = file
                self._open[file] = handle
            except (SafetensorError, OSError) as e:
                size = (directory / file).stat().st_size
                faults.append(f"{file} ({size} bytes) is truncated or damaged ({e}): download it again")
        if not faults:
            for name, file in (weight_map or {}).items():
                if self._file_of.get(name) != file:
                    faults.append(f"{file} does not hold tensor {name}, though {INDEX_FILE} says so")
        if faults:
            raise BitsmoeError(fault_list(f"{directory}: the checkpoint is not complete", faults, shown=20))

    @property
    def files(self) -> list[str]:
        """Names of the safetensors files."""
        return sorted(set(self._file_of.values()))

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU, in its stored dtype."""
        if self._mapped > MAPPED_BYTES:
            self._open.clear()
            self._mapped = 0
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = safe_open(str(self.directory / file), framework="pt")
        tensor = self._open[file].get_tensor(name)
        self._mapped += tensor.nbytes
        return tensor

    def rows(self, name: str, part: slice) -> Tensor:
        """Some rows of a tensor, as `get` gives all of them."""
        return self.get(name)[part]


class ShardWriter:
    """Writes tensors into shards of bounded size; `finish` names them and writes the index.

    Files appear under their final names in `finish` only; the caller owns the directory and removes it on failure.

    Args:
        directory: an existing directory.
        max_shard_bytes: a shard is written once it holds this much.
        written: called after every shard, whose tensors are let go by then.
    """

    def __init__(self, directory: Path, max_shard_bytes: int = 5 * 1000**3, written: Callable[[], None] = lambda: None):
        self.directory = directory
        self.max_shard_bytes = max_shard_bytes
        self._written = written
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor; it is copied to the CPU."""
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        # A copy even if it is there already: the caller may reuse its buffer, and safetensors refuses shared memory.
        tensor = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def add_all(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Add several; holds none of them when it returns: the last one would keep a whole file mapped."""
        for name, tensor in tensors:
            self.add(name, tensor)

    def _flush(self) -> None:
        path = self.directory / f"shard-{len(self._shards)}.tmp"
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(0o666 & ~umask())  # safetensors makes files only their owner can read
        self._shards.append((path, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0
        self._written()

    def finish(self) -> None:
        """Write what is pending, give the shards their names, write the index when there is more than one."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._shards[0][0].rename(self.directory / SINGLE_FILE)
            return
        weight_map = {}
        for i, (path, names) in enumerate(self._shards, 1):
            file = f"model-{i:05d}-of-{count:05d}.safetensors"
            path.rename(self.directory / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def largest_shard(sizes: list[int], max_shard_bytes: int) -> int:
    """Bytes of the largest shard that `ShardWriter` makes of tensors of these sizes, added one after another."""
    largest = pending = 0
    for size in sizes:
        pending = size if pending + size > max_shard_bytes else pending + size
        largest = max(largest, pending)
    return largest
