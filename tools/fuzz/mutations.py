"""Ways to damage a checkpoint, by structure: fields of headers, of the index and of config.json, values, files.

A mutation takes a random generator and the checkpoint's files and changes them in place; it returns what it did. One
that finds nothing to work on returns None. All randomness comes from the generator, so a case is its seed and number.
"""

import json
import math
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.safetensors_io import INDEX_FILE
from bitsmoe_kernels.format.schema import CheckpointConfig

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Link:
    """A symbolic link instead of a file."""

    target: str


@dataclass(frozen=True)
class Special:
    """Something else instead of a file."""

    kind: str  # "directory" or "fifo"


Entry = bytes | Link | Special
Files = dict[str, Entry]
Mutation = Callable[[random.Random, Files], str | None]
ShardMutation = Callable[[random.Random, Files, str, dict[str, Any], bytes], str | None]
"""One that is given a file's name, header and data."""

MUTATIONS: dict[str, tuple[int, Mutation]] = {}
"""Name -> (weight, function)."""

SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip
INTEGERS = (
    0, 1, 2, 3, 7, 8, 15, 16, 17, 32, 255, 256, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1,
    2**63, 2**64 - 1, 2**64, 10**40, 10**400, 10**4000,
)  # fmt: skip
TEXTS = (
    "", "x", "bitsmoe", "F32", "F4", "F8_E8M0", "model.safetensors", "../x", "\0", "\ud800", "\x1b[31m", "é" * 40,
    "a" * 5000, "16", "input", "expert", "model.layers.0.mlp.experts",
)  # fmt: skip
FILE_NAMES = (
    "../outside.safetensors", "../outside", "/etc/hostname", "/dev/zero", "", ".", "..", "./model.safetensors",
    "sub/x.safetensors", "config.json", INDEX_FILE, "a\0b.safetensors", "\ud800.safetensors", "a" * 300, "a" * 5000,
    "\\x", "~", "model.safetensors/", "//", "nul",
)  # fmt: skip


def mutation(weight: int) -> Callable[[Mutation], Mutation]:
    """Register one under its function's name."""

    def register(function: Mutation) -> Mutation:
        MUTATIONS[function.__name__] = (weight, function)
        return function

    return register


def shard_mutation(weight: int) -> Callable[[ShardMutation], Mutation]:
    """The same for one that works on a random shard that can still be read."""

    def register(function: ShardMutation) -> Mutation:
        @wraps(function)
        def pick(rng: random.Random, files: Files) -> str | None:
            picked = _shard(rng, files)
            return None if picked is None else function(rng, files, *picked)

        return mutation(weight)(pick)

    return register


def mutate(rng: random.Random, files: Files) -> list[tuple[str, str]]:
    """Damage a checkpoint in one to three ways; returns (mutation, what it did) of each."""
    names, weights = list(MUTATIONS), [weight for weight, _ in MUTATIONS.values()]
    done: list[tuple[str, str]] = []
    wanted = rng.choices((1, 2, 3), (6, 2, 1))[0]
    while len(done) < wanted:
        name = rng.choices(names, weights)[0]
        if (what := MUTATIONS[name][1](rng, files)) is not None:
            done.append((name, what))
    return done


# safetensors files: 8 bytes of header length, JSON header, data.


def split(raw: Entry) -> tuple[dict[str, Any], bytes] | None:
    """Header and data; None where an earlier mutation left no such file."""
    if not isinstance(raw, bytes):
        return None
    try:
        (length,) = struct.unpack_from("<Q", raw)
        header = json.loads(raw[8 : 8 + length])
        return (header, raw[8 + length :]) if isinstance(header, dict) and length <= len(raw) else None
    except (struct.error, ValueError, OverflowError, RecursionError):
        return None


def join(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    """Inverse of `split`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _shard_names(files: Files) -> list[str]:
    return [n for n, f in files.items() if n.endswith(".safetensors") and isinstance(f, bytes)]


def _shard(rng: random.Random, files: Files) -> tuple[str, dict[str, Any], bytes] | None:
    """A random shard that can still be read, its header and its data."""
    for name in rng.sample(names := _shard_names(files), len(names)):
        if (parts := split(files[name])) and _tensor_names(parts[0]):
            return name, *parts
    return None


def _tensor_names(header: dict[str, Any]) -> list[str]:
    return [k for k, v in header.items() if k != "__metadata__" and isinstance(v, dict)]


def _tensors(header: dict[str, Any], data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> dtype, shape, bytes; of those tensors that still have them."""
    out = {}
    for name in _tensor_names(header):
        info = header[name]
        try:
            begin, end = info["data_offsets"]
            if all(type(d) is int for d in info["shape"]):
                out[name] = (str(info["dtype"]), list(info["shape"]), data[begin:end])
        except (KeyError, TypeError, ValueError):
            continue
    return out


def _laid_out(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A sound file of these tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    return join(header, b"".join(raw for _, _, raw in tensors.values()))


def _resized(raw: bytes, size: int, rng: random.Random) -> bytes:
    return (raw + rng.randbytes(max(0, size - len(raw))))[:size]


def _number(rng: random.Random) -> Any:
    n = rng.choice(INTEGERS)
    return rng.choice((n, n, n, -n, float(n) if n < 2**64 else 0.5, math.nan, math.inf, 1e308))


def _odd_value(rng: random.Random) -> Any:
    return rng.choice(
        (
            lambda: rng.choice((None, True, False)),
            lambda: _number(rng),
            lambda: rng.choice(INTEGERS),
            lambda: rng.choice(TEXTS),
            lambda: rng.choice(([], {}, [[]], [None], [0, 1, 1], [2, 1], {"a": {}})),
            lambda: nested(rng.choice((5, 60, 200, 900))),
        )
    )()


def nested(depth: int) -> Any:
    """Lists within lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@shard_mutation(6)
def header_length(rng: random.Random, files: Files, name: str, header: dict[str, Any], data: bytes) -> str | None:
    """The header's length says something else."""
    raw = join(header, data)
    (true,) = struct.unpack_from("<Q", raw)
    close = (true - 1, true + 1, true + 8, len(raw) - 8, len(raw) - 7, len(raw), 0, 1, 2, 8, 100_000_000, 100_000_001)
    far = (2**31 - 1, 2**31, 2**32, 2**32 + true, 2**53, 2**63 - 9, 2**63 - 8, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1)
    length = rng.choice(close + far + (rng.getrandbits(64),))
    files[name] = struct.pack("<Q", length % 2**64) + raw[8:]
    return f"{name}: {true} -> {length}"


@shard_mutation(10)
def tensor_dtype(rng: random.Random, files: Files, name: str, header: dict[str, Any], data: bytes) -> str | None:
    """Another dtype in the header, its data as it was or made to fit."""
    tensor = rng.choice(_tensor_names(header))
    if rng.random() < 0.5:
        tensors = _tensors(header, data)
        if tensor not in tensors:
            return None
        _, shape, raw = tensors[tensor]
        dtype = rng.choice(list(SIZES))
        size = SIZES[dtype] * math.prod(shape)
        if not 0 <= size < 10**6:
            return None
        tensors[tensor] = dtype, shape, _resized(raw, size, rng)
        files[name] = _laid_out(tensors)
        return f"{name}: {tensor} is {dtype}, data made to fit"
    header[tensor]["dtype"] = value = rng.choice((rng.choice(list(SIZES)), _odd_value(rng)))
    files[name] = join(header, data)
    return f"{name}: {tensor} has dtype {value!r:.60}"


@shard_mutation(12)
def tensor_shape(rng: random.Random, files: Files, name: str, header: dict[str, Any], data: bytes) -> str | None:
    """Another shape: dimensions changed, swapped, added, huge, negative, of wrong types."""
    tensor = rng.choice(_tensor_names(header))
    shape = header[tensor].get("shape")
    if not isinstance(shape, list):
        return None
    shape = list(shape)
    how = rng.randrange(9)
    at = rng.randrange(len(shape)) if shape else 0
    if how == 0 and shape:
        shape[at] = _number(rng)
    elif how == 1 and shape:
        shape[at] = _odd_value(rng)
    elif how == 2:
        shape.insert(at, rng.choice((0, 1, 2, 2**32, 2**63 - 1, 2**63)))
    elif how == 3 and shape:
        del shape[at]
    elif how == 4:
        rng.shuffle(shape)
    elif how == 5:  # products that overflow 64 bits, also to something small
        shape = rng.choice(([2**32, 2**32], [2**33, 2**31, 4], [2**63, 2], [2**64 - 1, 2**64 - 1], [3, 2**62, 4]))
    elif how == 6:  # no elements, yet sizes no library can hold
        shape = rng.choice(([0, 2**63], [0, 2**64 - 1], [2**62, 0], [0, 2**32, 2**31], [2**63 - 1, 0]))
        header[tensor]["data_offsets"] = rng.choice(([0, 0], [len(data), len(data)]))
    elif how == 7:
        shape = [1] * rng.choice((30, 64, 65, 200)) + shape
    else:
        shape = _odd_value(rng)
    header[tensor]["shape"] = shape
    files[name] = join(header, data)
    return f"{name}: {tensor} has shape {shape!r:.60}"


@shard_mutation(8)
def tensor_resized(rng: random.Random, files: Files, name: str, header: dict[str, Any], data: bytes) -> str | None:
    """Another shape with data to match: a sound file that the schema does not expect."""
    tensors = _tensors(header, data)
    if not tensors:
        return None
    tensor = rng.choice(list(tensors))
    dtype, shape, raw = tensors[tensor]
    shape = [max(0, d + rng.choice((-1, 0, 0, 1, 16))) if d < 10**4 else d for d in shape]
    if rng.random() < 0.2:
        shape = rng.choice(([], [0], [1], [0, 0], [2**62, 0], [0, 2**63 - 1], [0, 2**63]))
    size = SIZES.get(dtype, 1) * math.prod(shape)
    if not 0 <= size < 10**6:
        return None
    tensors[tensor] = dtype, shape, _resized(raw, size, rng)
    files[name] = _laid_out(tensors)
    return f"{name}: {tensor} resized to {shape}"


@shard_mutation(12)
def tensor_offsets(rng: random.Random, files: Files, name: str, header: dict[str, Any], data: bytes) -> str | None:
    """Data that begins or ends elsewhere: shifted, overlapping, reversed, beyond the file, of wrong types."""
    tensor = rng.choice(_tensor_names(header))
    info = header[tensor]
    begin, end = info.get("data_offsets", [0, 0]) if isinstance(info.get("data_offsets"), list) else (0, 0)
    if not (type(begin) is int and type(end) is int):
        return None
    far = rng.choice((len(data) + 1, len(data) + 4096, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -1, -4096))
    other = header[rng.choice(_tensor_names(header))].get("data_offsets")
    offsets = rng.choice(
        (
            [begin + 1, end + 1], [begin - 1, end - 1], [begin, end + rng.choice((1, 2, 4096))], [begin, end - 1],
            [end, begin], [begin, far], [far, far + end - begin], [far, far], [begin], [begin, end, end], None, "0",
            [float(begin), float(end)], [str(begin), str(end)], [begin, math.nan], [begin, None], other,
            [2**64 - (end - begin), 0], [begin - 2**64, end - 2**64], _odd_value(rng),
        )
    )  # fmt: skip
    info["data_offsets"] = offsets
    files[name] = join(header, data)
    return f"{name}: {tensor} at {offsets!r:.60}"


@shard_mutation(8)
def tensors_swapped(rng: random.Random, files: Files, name: str, header: dict[str, Any], data: bytes) -> str | None:
    """Two tensors change places: their entries, their names or their data."""
    names = _tensor_names(header)
    if len(names) < 2:
        return None
    a, b = rng.sample(names, 2)
    if rng.random() < 0.4:
        header[a], header[b] = header[b], header[a]
    else:
        key = rng.choice(("dtype", "shape", "data_offsets"))
        header[a][key], header[b][key] = header[b].get(key), header[a].get(key)
    files[name] = join(header, data)
    return f"{name}: {a} and {b}"


@shard_mutation(8)
def tensor_names(rng: random.Random, files: Files, name: str, header: dict[str, Any], data: bytes) -> str | None:
    """A tensor is missing, has another name, or is there twice, in one file or in two."""
    tensors = _tensors(header, data)
    if not tensors:
        return None
    tensor = rng.choice(list(tensors))
    how = rng.randrange(6)
    if how == 0:
        del tensors[tensor]
    elif how == 1:
        new = rng.choice(
            (
                tensor + "x", tensor[:-1], tensor.upper(), "", ".", "a" * 10_000, "\0", tensor + "_scale_inv",
                tensor.removesuffix("_scale_inv"), "__metadata__", tensor.replace(".0.", ".1."), "_scale_inv",
                "model.layers.0.mlp.experts.0.gate_proj.weight", "model.layers.0.mlp.experts.x_bits",
            )
        )  # fmt: skip
        tensors = {new if k == tensor else k: v for k, v in tensors.items()}
    elif how == 2:
        other = rng.choice(_shard_names(files))
        parts = split(files[other])
        if other == name or parts is None:
            return None
        files[other] = _laid_out(_tensors(*parts) | {tensor: tensors[tensor]})
        return f"{tensor} of {name} is in {other} too"
    elif how == 3:  # twice in one header, which JSON allows
        text = json.dumps(header)
        extra = json.dumps({tensor: rng.choice(list(header.values()))})[1:-1]
        text = rng.choice((f"{text[:-1]}, {extra}}}", f"{{{extra}, {text[1:]}"))
        files[name] = join(text.encode(), data)
        return f"{name}: {tensor} twice in the header"
    elif how == 4:
        new = rng.choice(
            ("extra", "model.layers.0.mlp.experts.gate_up_order", "model.layers.1.mlp.experts.7.w1.weight")
        )
        tensors[new] = tensors[tensor]
    else:
        tensors = {k: tensors[k] for k in rng.sample(list(tensors), len(tensors))}  # harmless
    files[name] = _laid_out(tensors)
    return f"{name}: {tensor}, way {how}"


@shard_mutation(6)
def header_text(rng: random.Random, files: Files, name: str, header: dict[str, Any], data: bytes) -> str | None:
    """The header as text: spaces, wrong types, NaN, deep nesting, no UTF-8, metadata."""
    text = json.dumps(header)
    metadata: Any = rng.choice((None, [], "x", {"a": 1}, {"a": None}, {"a": "b" * 10**5}, {"é": "\x00"}, nested(200)))
    made = rng.choice(
        (
            text + " " * rng.choice((1, 3, 8, 4096)), " " + text, "\ufeff" + text, text[:-1], text + "}",
            text + "\0" * 8,
            "", "{}", "[]", "null", "[" * 50_000, '{"a":' * 3_000, text.replace("[", "[NaN, ", 1),
            text.replace("}", ', "x": 1}', 1), text.replace('"dtype"', '"dtypf"', 1), text.replace('"', "'"),
            text.replace('"', '"\\ud800', 1), json.dumps(header | {"__metadata__": metadata}),
            text.replace("0", "00", 1), text.replace("[", "[1e400, ", 1), text.replace("[", "[" + "9" * 5000 + ", ", 1),
        )
    ).encode()  # fmt: skip
    if rng.random() < 0.15:
        at = rng.randrange(len(made) + 1)
        made = made[:at] + rng.choice((b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80")) + made[at:]
    files[name] = join(made, data)
    return f"{name}: {made[:40]!r}"


@mutation(14)
def tensor_values(rng: random.Random, files: Files) -> str | None:
    """Values the format forbids, or allows but nobody writes: bits, orders, ranks, scales, codes."""
    chosen = rng.choice(
        ("_bits", "_order", "_lowrank_rank", "_scale", "_codes", "_basis", "_kept", "weight", "_inv", "")
    )
    for name in rng.sample(names := _shard_names(files), len(names)):
        parts = split(files[name])
        tensors = _tensors(*parts) if parts else {}
        fitting = [k for k, (_, _, values) in tensors.items() if k.endswith(chosen) and values]
        if not fitting:
            continue
        tensor = rng.choice(fitting)
        dtype, shape, values = tensors[tensor]
        size = SIZES.get(dtype, 1)
        if len(values) % size:
            return None
        words = [values[i : i + size] for i in range(0, len(values), size)]
        what = _edit_words(rng, words, dtype, size)
        tensors[tensor] = dtype, shape, b"".join(words)
        files[name] = _laid_out(tensors)
        return f"{name}: {tensor} {what}"
    return None


def _edit_words(rng: random.Random, words: list[bytes], dtype: str, size: int) -> str:
    """Change some of a tensor's numbers."""
    a, b = rng.randrange(len(words)), rng.randrange(len(words))
    how = rng.randrange(6)
    if how == 0:
        words[a], words[b] = words[b], words[a]
    elif how == 1:
        words[a] = words[b]
    elif how == 2 and dtype[0] in "IU":  # one up and one down: the sum stays
        step = rng.choice((1, 1, 2, 8, 100))
        for at, d in ((a, step), (b, -step)):
            words[at] = ((int.from_bytes(words[at], "little") + d) % 2 ** (8 * size)).to_bytes(size, "little")
    elif how == 3:
        words[:] = [rng.choice((b"\0", b"\xff")) * size] * len(words)
    elif how == 4 and dtype[0] in "FB" and size >= 2:
        special = {"F16": "<e", "F32": "<f", "F64": "<d"}.get(dtype)
        value = rng.choice((math.nan, math.inf, -math.inf, 65504.0, -0.0, 6e-8))
        words[a] = struct.pack(special, value) if special else struct.pack("<f", value)[2:]
    else:
        odd = rng.choice((9, 16, 255, 127, 128, 1, rng.getrandbits(8)))
        words[a] = bytes([odd]) + rng.randbytes(size - 1) if rng.random() < 0.5 else bytes([odd]) * size
    return f"numbers {a} and {b}, way {how}"


# JSON files.


def _json(files: Files, name: str) -> dict[str, Any] | None:
    raw = files.get(name)
    try:
        data = json.loads(raw) if isinstance(raw, bytes) else None
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _nodes(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values below the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    out = []
    for key, value in items:
        out.append((*path, key))
        if len(path) < 20:
            out += _nodes(value, (*path, key))
    return out


def edit_json(rng: random.Random, tree: dict[str, Any]) -> str | None:
    """Change one place of a JSON object."""
    paths = _nodes(tree)
    if not paths:
        return None
    path = rng.choice(paths)
    parent: Any = tree
    for key in path[:-1]:
        parent = parent[key]
    last, value = path[-1], parent[path[-1]]
    how = rng.randrange(8)
    if how == 0:
        del parent[last]
    elif how == 1 and isinstance(parent, dict):
        parent[rng.choice((*TEXTS, f"{last}x", "experts"))] = parent.pop(last)
    elif how == 2:
        parent[last] = rng.choice(([value], {"a": value}, {str(last): value}, str(value)))
    elif how == 3 and type(value) in (int, float):
        parent[last] = rng.choice((value + 1, value - 1, -value, value * 2, float(value), str(value), value == 1))
    elif how == 4:
        other: Any = tree
        for key in rng.choice(paths):
            other = other[key]
        parent[last] = json.loads(json.dumps(other))
    elif how == 5 and isinstance(value, dict):
        value[rng.choice(("extra", "basis", "layers", "order", "kept_experts", "lowrank_total", "__class__"))] = (
            _odd_value(rng)
        )
    else:
        parent[last] = _odd_value(rng)
    return f"{'.'.join(map(str, path))} way {how}"


def settle(rng: random.Random, files: Files) -> bool:
    """Rebuild the bitsmoe tensors and `bpw` as a changed schema demands, so that deeper checks are reached."""
    config = _json(files, CONFIG_FILE)
    try:
        schema = CheckpointConfig.parse(config["quantization_config"]) if config else None
        specs = schema.tensor_specs() if schema else {}
    except (BitsmoeError, KeyError, AttributeError, TypeError):
        return False
    if not schema or not config or sum(spec.nbytes for spec in specs.values()) > 10**6:
        return False
    names = {
        "float16": "F16", "float32": "F32", "bfloat16": "BF16", "int8": "I8", "uint8": "U8", "int16": "I16",
        "int32": "I32",
    }  # fmt: skip
    for file in _shard_names(files):
        parts = split(files[file])
        if parts is None:
            return False
        tensors = _tensors(*parts)
        for name, (_, _, old) in tensors.items():
            if name in specs:
                spec = specs[name]
                dtype = names[str(spec.dtype).removeprefix("torch.")]
                tensors[name] = dtype, list(spec.shape), _resized(old, spec.nbytes, rng)
        files[file] = _laid_out(tensors)
    config["quantization_config"]["bpw"] = schema.all_in_bpw()
    files[CONFIG_FILE] = json.dumps(config).encode()
    return True


@mutation(22)
def config_values(rng: random.Random, files: Files) -> str | None:
    """One place of config.json changed, tensors perhaps made to fit."""
    if (config := _json(files, CONFIG_FILE)) is None:
        return None
    part = config.get("quantization_config")
    inner = isinstance(part, dict) and rng.random() < 0.75
    what = edit_json(rng, part if inner and isinstance(part, dict) else config)
    if what is None:
        return None
    try:
        files[CONFIG_FILE] = json.dumps(config).encode()
    except ValueError:  # integers beyond what Python turns into text
        return None
    if rng.random() < 0.6 and settle(rng, files):
        what += ", tensors made to fit"
    return f"quantization_config.{what}" if inner else what


@mutation(10)
def schema_values(rng: random.Random, files: Files) -> str | None:
    """One field of the schema to another valid value, tensors made to fit: only values can still be wrong."""
    if (config := _json(files, CONFIG_FILE)) is None:
        return None
    part = config.get("quantization_config")
    layers = part.get("layers") if isinstance(part, dict) else None
    if not isinstance(layers, dict) or not layers:
        return None
    layer = layers[rng.choice(list(layers))]
    projections = layer.get("projections") if isinstance(layer, dict) else None
    if not isinstance(projections, dict) or not projections:
        return None
    projection = projections[rng.choice(list(projections))]
    if not isinstance(projection, dict):
        return None
    count = rng.choice((0, 1, 2, 5, 16))
    key, value = rng.choice(
        (
            ("order", rng.choice(("none", "shared", "expert"))), ("basis", None), ("lowrank_total", count),
            ("basis", {"rank": count + 1, "bits": rng.choice((8, 16))}), ("code_rows", count),
            ("component_axis", rng.choice(("input", "output"))),
            ("kept_experts", rng.choice(([], [0], [0, 2], [1, 2]))),
            ("kept_dtype", "float16"), ("num_experts", count), ("hidden_size", count), ("intermediate_size", count),
            ("block_size", rng.choice((16, 32))),
        )
    )  # fmt: skip
    if key == "block_size" and isinstance(part, dict):
        part[key] = value
    else:
        (layer if key in layer else projection)[key] = value
    files[CONFIG_FILE] = json.dumps(config).encode()
    return f"{key} = {value}, tensors made to fit: {settle(rng, files)}"


@mutation(8)
def json_text(rng: random.Random, files: Files) -> str | None:
    """config.json or the index as text: keys twice, NaN, deep nesting, no UTF-8, cut off."""
    name = rng.choice((CONFIG_FILE, INDEX_FILE))
    raw = files.get(name)
    if not isinstance(raw, bytes) or not raw:
        return None
    at = rng.randrange(len(raw))
    how = rng.randrange(14)
    body = raw.strip()[1:-1]
    made = (
        lambda: raw[:at],
        lambda: b"",
        lambda: raw + b"x",
        lambda: b"\xef\xbb\xbf" + raw,
        lambda: raw.decode(errors="replace").encode("utf-16"),
        lambda: raw[:at] + rng.choice((b"\xff", b"\xed\xa0\x80", b"\0", b"\xc3")) + raw[at:],
        lambda: b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b", " + body + b"}",
        lambda: b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
        lambda: b'{"a": ' + b"9" * 5_000 + b", " + body + b"}",
        lambda: b'{"a": "\\ud800", "\\udc00": 1, ' + body + b"}",
        lambda: raw.replace(b": ", rng.choice((b": NaN, ", b": -Infinity, ")), 1),
        lambda: b"{" + body + b", " + body + b"}",
        lambda: b"{" + body + b', "weight_map": {}, "quantization_config": null, "num_experts": 2}',
        lambda: b"[" + raw + b"]",
    )[how]()
    files[name] = made
    return f"{name}, way {how}"


@mutation(10)
def index_files(rng: random.Random, files: Files) -> str | None:
    """The index names other files: outside, special, missing, far too many."""
    index = _json(files, INDEX_FILE)
    if index is None:  # the index of a checkpoint that had none
        if not (names := _shard_names(files)) or INDEX_FILE in files or (picked := _shard(rng, files)) is None:
            return None
        index = {"weight_map": dict.fromkeys(_tensor_names(picked[1]), names[0])}
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not weights:
        return None
    tensor = rng.choice(list(weights))
    how = rng.randrange(6)
    if how <= 1:
        weights[tensor] = rng.choice(FILE_NAMES)
    elif how == 2:
        weights[tensor] = rng.choice([v for v in weights.values() if isinstance(v, str)] or [""])
    elif how == 3:
        old, new = weights[tensor], rng.choice(FILE_NAMES)
        index["weight_map"] = {k: new if v == old else v for k, v in weights.items()}
    elif how == 4:
        weights |= {f"t{i}": f"model-{i}.safetensors" for i in range(rng.choice((1, 300)))}
    else:
        what = edit_json(rng, index)
        files[INDEX_FILE] = json.dumps(index).encode()
        return what
    files[INDEX_FILE] = json.dumps(index).encode()
    return f"{tensor}, way {how}: {weights[tensor]!r:.40}"


# Files as such.


@mutation(10)
def file_bytes(rng: random.Random, files: Files) -> str | None:
    """Cut off, too long, empty, random, zero, single bits."""
    name = rng.choice([n for n, f in files.items() if isinstance(f, bytes)] or [""])
    raw = files.get(name)
    if not isinstance(raw, bytes) or not raw:
        return None
    at = rng.randrange(len(raw))
    how = rng.randrange(10)
    if how == 0:
        raw = raw[:at]
    elif how == 1:
        raw = raw[: len(raw) - rng.choice((1, 2, 8, 4096))]
    elif how == 2:
        raw += rng.randbytes(rng.choice((1, 8, 4096)))
    elif how == 3:
        raw = rng.choice((b"", b"\0" * 8, b"\0" * 7, raw[:8], b"\xff" * 16))
    elif how == 4:
        raw = rng.randbytes(rng.choice((1, 9, 100, 10_000)))
    elif how == 5:
        raw = raw[:at] + rng.randbytes(rng.choice((1, 7, 64))) + raw[at:]
    elif how == 6:
        raw = raw[:at] + raw[at + rng.choice((1, 8, 512)) :]
    else:
        flipped = bytearray(raw)
        for _ in range(rng.choice((1, 1, 4, 64))):
            # Half of them where structure is.
            flipped[rng.randrange(len(raw) if rng.random() < 0.5 else min(len(raw), 2000))] ^= 1 << rng.randrange(8)
        raw = bytes(flipped)
    files[name] = raw
    return f"{name}, way {how}"


@mutation(6)
def file_kinds(rng: random.Random, files: Files) -> str | None:
    """Missing, swapped, a link (inside, outside, in a circle), a directory, a pipe."""
    name = rng.choice(list(files))
    others = [n for n in files if n != name]
    how = rng.randrange(8)
    if how == 0:
        del files[name]
    elif how == 1 and others:
        other = rng.choice(others)
        files[name], files[other] = files[other], files[name]
    elif how == 2:
        files[name] = Link(rng.choice(("../outside.safetensors", "../outside.json", "/etc/hostname", "/dev/zero")))
    elif how == 3:
        files[name] = Link(rng.choice(("nowhere", name, ".", "..")))
    elif how == 4 and others:
        files[name] = Link(rng.choice(others))
    elif how == 5:
        files[name] = Special("directory")
    elif how == 6:
        files[name] = Special("fifo")
    else:  # harmless: the file itself elsewhere in the directory
        files["moved"] = files[name]
        files[name] = Link("moved")
    entry = files.get(name)
    return f"{name}, way {how}: {'' if isinstance(entry, bytes) else entry}"


def write(files: Files, directory: Path) -> None:
    """Put a checkpoint's files into an existing empty directory."""
    for name, entry in files.items():
        path = directory / name
        if isinstance(entry, bytes):
            path.write_bytes(entry)
        elif isinstance(entry, Link):
            path.symlink_to(entry.target)
        elif entry.kind == "fifo":
            os.mkfifo(path)
        else:
            path.mkdir()
