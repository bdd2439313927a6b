"""safetensors files: shards, index, damage."""

import json
import os
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.safetensors_io import (
    INDEX_FILE,
    SINGLE_FILE,
    ShardReader,
    ShardWriter,
    largest_shard,
    read_index,
    read_json,
)
from bitsmoe_kernels.format.schema import TensorSpec


def tensors() -> dict[str, Tensor]:
    """Ten tensors of 400 bytes and some odd ones: a scalar, nothing, other dtypes."""
    gen = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {f"t{i}": torch.randn(10, 10, generator=gen) for i in range(10)}
    made |= {
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "none": torch.empty(0, 7, dtype=torch.int16),
        "half": torch.randn(3, generator=gen).half(),
        "bytes": torch.arange(256).to(torch.uint8),
        "words": torch.tensor([-(2**15), 2**15 - 1], dtype=torch.int16),
        "longs": torch.tensor([2**40]),
        "bool": torch.tensor([True, False]),
        "f8": torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
    }
    return made


def write(directory: Path, max_shard_bytes: int = 10**9) -> dict[str, Tensor]:
    directory.mkdir(exist_ok=True)
    made = tensors()
    writer = ShardWriter(directory, max_shard_bytes)
    for name, tensor in made.items():
        writer.add(name, tensor)
    writer.finish()
    assert writer.total_bytes == sum(t.nbytes for t in made.values())
    return made


def error(directory: Path) -> str:
    with pytest.raises(BitsmoeError) as e:
        ShardReader(directory)
    assert str(directory) in str(e.value)
    return str(e.value)


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


@pytest.mark.parametrize(("max_shard_bytes", "files"), [(10**9, 1), (1000, 6), (400, 11), (1, 18)])
def test_round_trip(tmp_path: Path, max_shard_bytes: int, files: int) -> None:
    made = write(tmp_path, max_shard_bytes)
    if files == 1:
        assert names(tmp_path) == [SINGLE_FILE]
    else:
        shards = [f"model-{i:05d}-of-{files:05d}.safetensors" for i in range(1, files + 1)]
        assert names(tmp_path) == sorted([*shards, INDEX_FILE])
        index = json.loads((tmp_path / INDEX_FILE).read_text())
        assert set(index["weight_map"]) == set(made)
        assert set(index["weight_map"].values()) == set(shards)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in made.values())
    reader = ShardReader(tmp_path)
    assert set(reader) == set(made)
    assert "t0" in reader
    assert "t10" not in reader
    for name, tensor in made.items():
        assert reader.specs[name] == TensorSpec(tensor.dtype, tuple(tensor.shape))
        got = reader.get(name)
        assert got.dtype == tensor.dtype
        assert torch.equal(got.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_shards_stay_below_the_limit(tmp_path: Path) -> None:
    write(tmp_path, 1000)
    for path in tmp_path.glob("*.safetensors"):
        reader = json.loads(path.read_bytes()[8 : 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]])
        data = sum(v["data_offsets"][1] - v["data_offsets"][0] for k, v in reader.items() if k != "__metadata__")
        assert data <= 1000


def test_nothing_to_write_is_an_empty_file(tmp_path: Path) -> None:
    ShardWriter(tmp_path).finish()
    assert names(tmp_path) == [SINGLE_FILE]
    assert list(ShardReader(tmp_path)) == []


def test_final_names_appear_at_the_end_only(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, max_shard_bytes=1)
    for name in ("a", "b", "c"):
        writer.add(name, torch.zeros(2))
    assert all(name.endswith(".tmp") for name in names(tmp_path))
    assert names(tmp_path)
    writer.finish()
    assert not any(name.endswith(".tmp") for name in names(tmp_path))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux, which lists mapped files")
def test_a_file_that_was_copied_from_is_not_kept_mapped(tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    save_file(tensors(), source)

    def mapped() -> bool:
        return str(source) in Path("/proc/self/maps").read_text()

    def held() -> Iterator[tuple[str, Tensor]]:
        with safe_open(str(source), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name)
                assert mapped()

    writer = ShardWriter(tmp_path)
    writer.add_all(held())
    assert not mapped()
    writer.finish()
    assert sorted(load_file(tmp_path / SINGLE_FILE)) == sorted(tensors())


def test_a_shard_is_on_disk_and_let_go_when_it_is_said_to_be_written(tmp_path: Path) -> None:
    added: list[weakref.ref[Tensor]] = []
    seen: list[tuple[int, int]] = []

    def written() -> None:
        seen.append((len(list(tmp_path.iterdir())), sum(ref() is not None for ref in added)))

    writer = ShardWriter(tmp_path, 800, written)
    for i in range(5):
        writer.add(f"t{i}", torch.zeros(100))
        added.append(weakref.ref(writer._pending[f"t{i}"]))
    writer.finish()
    assert seen == [(1, 0), (2, 0), (3, 0)]


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    writer = ShardWriter(tmp_path)
    writer.add("transposed", base.T)
    writer.add("columns", base[:, 1:3])
    writer.add("rows", base[1:3])
    writer.add("grad", base.clone().requires_grad_())
    writer.finish()
    reader = ShardReader(tmp_path)
    assert torch.equal(reader.get("transposed"), base.T)
    assert torch.equal(reader.get("columns"), base[:, 1:3])
    assert torch.equal(reader.get("rows"), base[1:3])
    assert torch.equal(reader.get("grad"), base)


def test_tensors_are_copied_when_added(tmp_path: Path) -> None:
    buffer = torch.zeros(3)
    writer = ShardWriter(tmp_path)
    for i in range(3):
        buffer.fill_(i)
        writer.add(f"t{i}", buffer)
    buffer.fill_(float("nan"))
    writer.finish()
    reader = ShardReader(tmp_path)
    assert [reader.get(f"t{i}").tolist() for i in range(3)] == [[0.0] * 3, [1.0] * 3, [2.0] * 3]


def test_same_tensors_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a", 1000)
    write(tmp_path / "b", 1000)
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file(tmp_path: Path, keep: int) -> None:
    write(tmp_path)
    raw = (tmp_path / SINGLE_FILE).read_bytes()[:keep]
    (tmp_path / SINGLE_FILE).write_bytes(raw)
    message = error(tmp_path)
    assert f"{SINGLE_FILE} ({len(raw)} bytes) is truncated or damaged" in message


def test_all_damage_at_once(tmp_path: Path) -> None:
    write(tmp_path, 1000)
    first, second, third, fourth = sorted(tmp_path.glob("*.safetensors"))[:4]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-5])
    third.write_bytes(b"")
    fourth.unlink()
    message = error(tmp_path)
    assert f"{first.name} is missing, though {INDEX_FILE} names it" in message
    assert f"{second.name} (" in message
    assert f"{third.name} (0 bytes)" in message
    assert f"{fourth.name} is missing" in message
    assert message.count("\n") == 4


def test_an_index_that_does_not_agree(tmp_path: Path) -> None:
    write(tmp_path, 1000)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"] |= {"ghost": files[0], "t0": files[-1]}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    message = error(tmp_path)
    assert f"{files[0]} does not hold tensor ghost" in message
    assert f"{files[-1]} does not hold tensor t0" in message


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", ""])
def test_an_index_must_stay_inside(tmp_path: Path, file: str) -> None:
    directory = tmp_path / "checkpoint"
    write(directory, 1000)
    save_file({"t0": torch.zeros(1)}, tmp_path / "model.safetensors")
    index = json.loads((directory / INDEX_FILE).read_text())
    index["weight_map"]["t0"] = file
    (directory / INDEX_FILE).write_text(json.dumps(index))
    assert f"names files outside the checkpoint: [{file!r}]" in error(directory)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": null}'])
def test_an_index_without_a_weight_map(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_FILE).write_text(text)
    assert "has no `weight_map`" in error(tmp_path)


def test_a_directory_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert f"holds neither {SINGLE_FILE} nor {INDEX_FILE}" in error(tmp_path)


def test_an_unsupported_dtype_is_named(tmp_path: Path) -> None:
    header = {"odd": {"dtype": "C64", "shape": [2], "data_offsets": [0, 16]}}
    raw = json.dumps(header).encode()
    (tmp_path / SINGLE_FILE).write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(16))
    assert "tensor odd has dtype C64, which is not supported" in error(tmp_path)


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff\xfe{}", b'"x"', b"null"])
def test_json_that_is_no_object(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    with pytest.raises(BitsmoeError, match=r"config\.json"):
        read_json(path)


def test_json_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BitsmoeError, match=r"config\.json: cannot be read as JSON"):
        read_json(tmp_path / "config.json")
    with pytest.raises(BitsmoeError, match="cannot be read as JSON"):
        read_json(tmp_path)


def write_raw(directory: Path, header: dict[str, object], data: bytes = b"") -> None:
    raw = json.dumps(header).encode()
    (directory / SINGLE_FILE).write_bytes(struct.pack("<Q", len(raw)) + raw + data)


@pytest.mark.parametrize("shape", [[0, 2**63], [2**64 - 1, 0], [0, 2**32, 2**31], [1] * 65])
def test_a_shape_torch_cannot_hold(tmp_path: Path, shape: list[int]) -> None:
    size = 0 if 0 in shape else 4
    write_raw(tmp_path, {"odd": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}, b"\0" * size)
    assert "tensor odd has shape [" in error(tmp_path)
    assert "more than torch can hold" in error(tmp_path)


@pytest.mark.parametrize("shape", [[0, 2**63 - 1], [1] * 64])
def test_the_largest_shape_torch_can_hold(tmp_path: Path, shape: list[int]) -> None:
    size = 0 if 0 in shape else 4
    write_raw(tmp_path, {"odd": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}, b"\0" * size)
    assert list(ShardReader(tmp_path).get("odd").isfinite().shape) == shape


OFFSETS = [
    (0, 8, 4), (4, 8, 4), (2**63, 2**63 + 4, 4), (2**64 - 4, 0, 4), (0, 4, 8), (4, 0, 4), (-4, 0, 4), (0, 2**64 + 4, 4),
]  # fmt: skip


@pytest.mark.parametrize(("begin", "end", "length"), OFFSETS)
def test_offsets_beyond_the_file(tmp_path: Path, begin: int, end: int, length: int) -> None:
    write_raw(tmp_path, {"x": {"dtype": "F32", "shape": [1], "data_offsets": [begin, end]}}, b"\0" * length)
    assert "is truncated or damaged" in error(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    write(tmp_path, 1000)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    save_file({"t0": torch.zeros(1), "t1": torch.zeros(2), "t2": torch.zeros(3)}, second)
    assert f"tensor t0 is in {first.name} and in {second.name}" in error(tmp_path)


def test_links_out_of_the_checkpoint(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    write(directory)
    outside = tmp_path / "private.safetensors"
    (directory / SINGLE_FILE).rename(outside)
    (directory / SINGLE_FILE).symlink_to("../private.safetensors")
    assert f"{SINGLE_FILE} is a link to {outside}, outside the checkpoint: put the file itself there" in error(
        directory
    )
    (directory / "config.json").symlink_to("../private.json")
    (tmp_path / "private.json").write_text("{}")
    with pytest.raises(BitsmoeError, match=r"config\.json is a link to .*private\.json, outside"):
        read_json(directory / "config.json")


def test_links_within_the_checkpoint_and_to_it(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    made = write(directory)
    (directory / "data").mkdir()
    (directory / SINGLE_FILE).rename(directory / "data" / "weights")
    (directory / SINGLE_FILE).symlink_to("data/weights")
    (tmp_path / "name").symlink_to(directory)
    assert torch.equal(ShardReader(tmp_path / "name").get("t0"), made["t0"])


def test_links_of_the_hub_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    made = write(snapshot)
    (repository / "blobs").mkdir()
    (snapshot / SINGLE_FILE).rename(repository / "blobs" / "f00d")
    (snapshot / SINGLE_FILE).symlink_to("../../blobs/f00d")
    assert torch.equal(ShardReader(snapshot).get("t0"), made["t0"])
    other = tmp_path / "models--a--c" / "blobs"
    other.mkdir(parents=True)
    (repository / "blobs" / "f00d").rename(other / "f00d")
    (snapshot / SINGLE_FILE).unlink()
    (snapshot / SINGLE_FILE).symlink_to("../../../models--a--c/blobs/f00d")
    assert "outside the checkpoint" in error(snapshot)


@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "circle"])
@pytest.mark.parametrize("name", [SINGLE_FILE, INDEX_FILE])
def test_what_is_no_regular_file(tmp_path: Path, kind: str, name: str) -> None:
    """Opening a pipe would wait for ever."""
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else name)
    said = "cannot be opened" if kind == "circle" else "is no regular file"
    if (kind, name) == ("circle", SINGLE_FILE):
        said = "holds neither"
    assert said in error(tmp_path)


def test_an_index_that_is_a_dangling_link(tmp_path: Path) -> None:
    """Not the same as none: its tensors might be in other files."""
    write(tmp_path)
    (tmp_path / INDEX_FILE).symlink_to("nowhere")
    with pytest.raises(BitsmoeError, match="is missing"):
        read_index(tmp_path)


@pytest.mark.parametrize("file", ["a\0b", "a" * 300, "a" * 5000])
def test_names_no_file_can_have(tmp_path: Path, file: str) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"t": file}}))
    assert "cannot be opened" in error(tmp_path)
    assert len(error(tmp_path)) < 1000


def test_far_too_many_missing_files(tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(3000)}}))
    assert "... and 2980 more" in error(tmp_path)
    assert len(error(tmp_path)) < 5000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "too deep"),
        ('{"a": ' + "[" * 200 + "]" * 200 + "}", "more than 100 deep"),
        ('{"a": {"\\ud800": 1}}', "surrogates not allowed"),
        ('{"a": "\\udfff"}', "surrogates not allowed"),
        ('{"a": ' + "9" * 5000 + "}", "integer"),
    ],
)
def test_json_no_reader_can_use(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(BitsmoeError, match=said):
        read_json(tmp_path / INDEX_FILE)


def test_json_as_deep_as_allowed(tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text('{"a": ' + "[" * 99 + "]" * 99 + ', "\\ud83d\\ude00": 1}')
    assert list(read_json(tmp_path / INDEX_FILE)) == ["a", "\N{GRINNING FACE}"]


def test_names_are_shown_as_a_terminal_can_take_them(tmp_path: Path) -> None:
    write_raw(tmp_path, {"\x1b[2J" + "n" * 5000: {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8))
    message = error(tmp_path)
    assert "tensor \\x1b[2Jnnn" in message
    assert len(message) < 1000


@pytest.mark.parametrize("sizes", [[40, 40, 40], [99], [150, 10], [10, 90, 1, 250, 20, 60], [60, 60, 60]])
def test_the_largest_shard_is_foreseen(sizes, tmp_path):
    writer = ShardWriter(tmp_path, 100)
    for i, size in enumerate(sizes):
        writer.add(str(i), torch.zeros(size, dtype=torch.uint8))
    writer.finish()
    held = [sum(t.nbytes for t in load_file(path).values()) for path in tmp_path.glob("*.safetensors")]
    assert largest_shard(sizes, 100) == max(held)
