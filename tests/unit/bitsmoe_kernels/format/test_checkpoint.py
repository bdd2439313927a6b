"""A checkpoint directory as a whole, and the faults a user meets when opening one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError, FormatError
from bitsmoe_kernels.format.checkpoint import Checkpoint, is_bitsmoe
from bitsmoe_kernels.format.safetensors_io import INDEX_FILE, SINGLE_FILE, ShardReader, ShardWriter
from builders import FORMS, TINY_MOE, MadeLayer, build_form, write_checkpoint, write_tiny_qwen3_moe
from offline_quant.model.quantized import QuantizedModel, open_model

A, B = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def made() -> dict[str, MadeLayer]:
    return {A: build_form("extras"), B: build_form("left", seed=1)}


@pytest.fixture
def directory(tmp_path: Path, made: dict[str, MadeLayer]) -> Path:
    write_checkpoint(tmp_path, made, other_tensors={"model.norm.weight": torch.ones(40)}, model_config={"a": 1})
    return tmp_path


def edit_config(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((directory / "config.json").read_text())
    change(data)
    (directory / "config.json").write_text(json.dumps(data))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    reader = ShardReader(directory)
    tensors = {name: reader.get(name).clone() for name in reader}
    change(tensors)
    writer = ShardWriter(directory)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()


def faults(directory: Path) -> list[str]:
    with pytest.raises(FormatError) as e:
        Checkpoint(directory).check()
    assert str(directory) in str(e.value)
    return e.value.faults


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000, 1])
def test_reads_what_was_written(tmp_path: Path, made: dict[str, MadeLayer], max_shard_bytes: int) -> None:
    config = write_checkpoint(tmp_path, made, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / INDEX_FILE).exists() == (max_shard_bytes < 10**9)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check()
    assert checkpoint.bit_faults() == []
    assert checkpoint.config == config
    for prefix, layer in made.items():
        tensors = checkpoint.layer_tensors(prefix)
        assert list(tensors) == list(layer.layer.tensor_specs(16))
        for name, tensor in layer.tensors.items():
            assert torch.equal(tensors[name], tensor)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block_size", [16, 32])
def test_whole_tiny_checkpoints(tmp_path: Path, form: str, block_size: int) -> None:
    layers = write_tiny_qwen3_moe(tmp_path / "new" / "dir", form=form, block_size=block_size)
    checkpoint = Checkpoint(tmp_path / "new" / "dir")
    checkpoint.check()
    assert is_bitsmoe(checkpoint.model_config)
    assert list(checkpoint.config.layers) == list(layers)
    assert (tmp_path / "new" / "dir" / "tokenizer.json").read_bytes() == (TINY_MOE / "tokenizer.json").read_bytes()


def test_tensors_around_the_experts_are_those_of_the_example(tmp_path: Path) -> None:
    """The random checkpoint has the names and ranks that a real one of this architecture has."""
    write_tiny_qwen3_moe(tmp_path, num_layers=4)

    def others(directory: Path) -> dict[str, int]:
        reader = ShardReader(directory)
        return {name: len(reader.specs[name].shape) for name in reader if ".experts." not in name}

    assert others(tmp_path) == others(TINY_MOE)


@pytest.mark.parametrize("value", [None, {}, "bitsmoe", {"quant_method": "gptq"}, {"format_version": 1}])
def test_not_a_bitsmoe_checkpoint(directory: Path, value: Any) -> None:
    edit_config(directory, lambda data: data.update(quantization_config=value))
    with pytest.raises(BitsmoeError, match=r"config\.json: quant_method is .*, expected 'bitsmoe'") as e:
        Checkpoint(directory)
    assert not isinstance(e.value, FormatError)
    assert not is_bitsmoe(json.loads((directory / "config.json").read_text()))


def test_an_ordinary_checkpoint() -> None:
    assert not is_bitsmoe({})
    with pytest.raises(BitsmoeError, match="make a checkpoint with `bitsmoe quantize`"):
        Checkpoint(TINY_MOE)


def test_no_config_at_all(tmp_path: Path) -> None:
    with pytest.raises(BitsmoeError, match=r"config\.json"):
        Checkpoint(tmp_path)


def test_a_wrong_version(directory: Path) -> None:
    edit_config(directory, lambda data: data["quantization_config"].update(format_version=4, surprise=1))
    (fault,) = faults(directory)
    assert "format_version is 4" in fault


def test_schema_faults_come_before_tensors_are_looked_at(directory: Path) -> None:
    edit_config(directory, lambda data: data["quantization_config"].update(surprise=1, block_size=5))
    (directory / SINGLE_FILE).unlink()
    assert len(faults(directory)) == 2


def test_header_faults_of_all_layers_at_once(directory: Path) -> None:
    def change(t: dict[str, Tensor]) -> None:
        del t[f"{A}.gate_up_bits"]
        t[f"{A}.down_codes"] = t[f"{A}.down_codes"].int()
        t[f"{B}.down_order"] = t[f"{B}.down_order"][:, 1:]
        t[f"{B}.up_kept"] = torch.zeros(1)

    edit_tensors(directory, change)
    text = "\n".join(found := faults(directory))
    assert len(found) == 4
    for name in (f"{A}.gate_up_bits is missing", f"{A}.down_codes is int32[", f"{B}.down_order is uint8[4, 55]"):
        assert name in text
    assert f"{B}.up_kept is not part of the schema" in text


def test_value_faults_of_all_layers_at_once(directory: Path) -> None:
    def change(t: dict[str, Tensor]) -> None:
        t[f"{A}.gate_up_bits"][0, 0] ^= 1
        t[f"{A}.down_kept"][0, 0, 0] = float("nan")
        t[f"{B}.down_order"][2, 0] = t[f"{B}.down_order"][2, 1]
        t[f"{B}.gate_bits"][1, 1] ^= 128

    edit_tensors(directory, change)
    text = "\n".join(faults(directory))
    for name in (f"{A}.gate_up_bits: ", f"{A}.down_kept: ", f"{B}.down_order: ", f"{B}.gate_bits: "):
        assert name in text
    bits = "\n".join(Checkpoint(directory).bit_faults())
    assert f"{A}.gate_up_bits: " in bits
    assert f"{B}.gate_bits: " in bits
    assert "down" not in bits


def test_missing_and_damaged_files(tmp_path: Path, made: dict[str, MadeLayer]) -> None:
    write_checkpoint(tmp_path, made, max_shard_bytes=20_000)
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(BitsmoeError) as e:
        Checkpoint(tmp_path)
    assert f"{first.name} is missing" in str(e.value)
    assert f"{second.name} (" in str(e.value)


def test_every_damaged_header_byte_raises_nothing_but_our_error(directory: Path, tmp_path_factory: Any) -> None:
    """Flip each byte of the safetensors header in turn: a clear error, or a header that still says the same."""
    raw = (directory / SINGLE_FILE).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    scratch = tmp_path_factory.mktemp("damaged")
    shutil.copy(directory / "config.json", scratch)
    refused = 0
    positions = range(0, 8 + size, 7)
    for at in positions:
        (scratch / SINGLE_FILE).write_bytes(raw[:at] + bytes([raw[at] ^ 0x15]) + raw[at + 1 :])
        try:
            Checkpoint(scratch)
        except BitsmoeError:
            refused += 1
    assert refused > 0.9 * len(positions)


def test_experts_stored_twice_are_not_dequantized(tmp_path: Path) -> None:
    """Quantized and whole: the copy of the whole one would take the place of what was dequantized, or not."""
    write_tiny_qwen3_moe(tmp_path)
    name = f"{A}.1.up_proj.weight"
    edit_tensors(tmp_path, lambda t: t.update({name: torch.zeros(40, 64)}))
    Checkpoint(tmp_path).check()
    with pytest.raises(FormatError, match=f"tensor {name} belongs to experts, but is not part of the schema"):
        QuantizedModel(tmp_path)


@pytest.mark.parametrize("quantized", [True, False])
def test_side_files_that_lead_elsewhere(quantized: bool, tmp_path: Path) -> None:
    """They would be copied into the result, and perhaps published with it."""
    directory = tmp_path / "model"
    if quantized:
        write_tiny_qwen3_moe(directory)
    else:
        shutil.copytree(TINY_MOE, directory)
    (tmp_path / "secret").write_text("secret")
    for name in ("merges.txt", "tokenizer.json"):
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to("../secret")
    with pytest.raises(BitsmoeError, match=r"merges\.txt is a link to .*secret(.|\n)*tokenizer\.json is a link"):
        open_model(directory)
