"""Files written by format versions 1 to 3 stay readable, and are still what the writer makes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitsmoe_kernels.format.checkpoint import Checkpoint
from bitsmoe_kernels.format.packing import pack_codes, unpack_codes
from bitsmoe_kernels.format.safetensors_io import INDEX_FILE
from bitsmoe_kernels.format.schema import PARTS, least_version
from bitsmoe_kernels.reference import LayerWeights
from builders import ALL_BITS, REPO
from tests.golden import make_v1, make_v2, make_v3

V1, V2, V3 = (REPO / "tests" / "golden" / version for version in ("v1", "v2", "v3"))
BLOCK_SIZES = [16, 32]


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("golden", [V1, V2, V3], ids=["v1", "v2", "v3"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_reads_exactly(golden: Path, block_size: int) -> None:
    checkpoint = Checkpoint(golden / f"block{block_size}")
    checkpoint.check()
    expected = load_file(golden / f"block{block_size}.expected.safetensors")
    biased = (golden, block_size) in ((V2, 16), (V3, 16))
    names = ("up", "down") if golden == V3 else ("gate", "up", "down")
    assert len(expected) == (2 if biased else 1) * len(names) * len(checkpoint.config.layers)
    for prefix, layer in checkpoint.config.layers.items():
        weights = LayerWeights(layer, block_size, checkpoint.layer_tensors(prefix))
        for expert in range(layer.num_experts):
            for name, got in zip(names, weights.expert_weights(expert), strict=True):
                assert torch.equal(got, expected[f"{prefix}.{name}"][expert])
        found = weights.biases(range(layer.num_experts))
        assert (found is not None) == biased
        if found is not None:
            gate_up = torch.cat([expected[f"{prefix}.{name}.bias"] for name in names[:-1]], 1)
            assert torch.equal(found[0], gate_up)
            assert torch.equal(found[1], expected[f"{prefix}.down.bias"])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_schema_comes_back_as_it_was_written(block_size: int) -> None:
    checkpoint = Checkpoint(V1 / f"block{block_size}")
    assert checkpoint.config.dump() == checkpoint.model_config["quantization_config"]


def test_writes_the_same_bytes(tmp_path: Path) -> None:
    make_v1.write(tmp_path, 16)
    make_v1.write(tmp_path, 32)
    ours, golden = files(tmp_path), files(V1)
    assert ours.keys() == golden.keys()
    assert [name for name in golden if ours[name] != golden[name]] == []


def test_version_2(tmp_path: Path) -> None:
    """A layer names its activation, and projections may have biases."""
    make_v2.write(tmp_path)
    assert files(tmp_path) == files(V2)
    for block_size, act in ((16, "swigluoai"), (32, "gelu_pytorch_tanh")):
        config = Checkpoint(V2 / f"block{block_size}").config
        assert config.format_version == least_version(config.layers.values()) == 2
        assert {layer.hidden_act for layer in config.layers.values()} == {act}
        assert {p.bias for layer in config.layers.values() for p in layer.projections.values()} == {block_size == 16}
        assert config.dump() == Checkpoint(V2 / f"block{block_size}").model_config["quantization_config"]


def test_version_3(tmp_path: Path) -> None:
    """Experts may have no gate."""
    make_v3.write(tmp_path)
    assert files(tmp_path) == files(V3)
    for block_size in BLOCK_SIZES:
        config = Checkpoint(V3 / f"block{block_size}").config
        assert config.format_version == least_version(config.layers.values()) == 3
        assert {(layer.hidden_act, *layer.projections) for layer in config.layers.values()} == {("relu2", "up", "down")}
        assert config.dump() == Checkpoint(V3 / f"block{block_size}").model_config["quantization_config"]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_packs_the_same_words(block_size: int) -> None:
    checkpoint = Checkpoint(V1 / f"block{block_size}")
    for prefix, layer in checkpoint.config.layers.items():
        tensors = checkpoint.layer_tensors(prefix)
        for name in layer.projections:
            words, bits = tensors[f"{name}_codes"], tensors[f"{name}_bits"]
            C, row = layer.components(name), 0
            for widths in bits:
                part = words[row : (row := row + int(widths.sum()))]
                assert torch.equal(pack_codes(unpack_codes(part, widths, C, block_size), widths, block_size), part)


def test_every_feature_of_the_format_is_in_the_files() -> None:
    parts: set[str] = set()
    widths: set[int] = set()
    choices: set[object] = set()
    for block_size in BLOCK_SIZES:
        checkpoint = Checkpoint(V1 / f"block{block_size}")
        for prefix, layer in checkpoint.config.layers.items():
            for name, tensor in checkpoint.layer_tensors(prefix).items():
                parts |= {part for part in PARTS if name.endswith(f"_{part}")}
                if name.endswith("_bits"):
                    widths |= set(tensor.flatten().tolist())
            for name, p in layer.projections.items():
                assert layer.components(name) % block_size  # a partial last block
                choices |= {name, p.component_axis, p.order, p.basis and p.basis.bits}
                choices |= {p.kept_dtype} if p.kept_experts else set()
    assert parts == set(PARTS) - {"shift"}  # of version 2
    assert widths == set(ALL_BITS)
    assert choices == {
        "gate_up", "gate", "up", "down", "input", "output", "none", "shared", "expert", None, 8, 16,
        "bfloat16", "float16",
    }  # fmt: skip
    assert (V1 / "block16" / INDEX_FILE).is_file()
    assert not (V1 / "block32" / INDEX_FILE).exists()
    assert sum(map(len, files(V1).values())) < 100_000
