"""`bitsmoe probe`: what config.json and the index of the weights say."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.safetensors_io import INDEX_FILE
from builders import TINY_MOE
from families import make_model, to_mxfp4, to_packed
from offline_quant.cli.commands import app
from offline_quant.model.probe import Probe, probe

SMALL = "Glm4MoeLiteForCausalLM"


def without_weights(model: Path, directory: Path, **changes: Any) -> Path:
    """config.json and an index of a model of one file."""
    directory.mkdir()
    config = json.loads((model / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    weight_map = dict.fromkeys(load_file(model / "model.safetensors"), "model-00001-of-00001.safetensors")
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_a_model_without_its_weights(tmp_path: Path) -> None:
    directory = without_weights(make_model(SMALL, tmp_path / "model"), tmp_path / "bare")
    expected = Probe(SMALL, "GLM-4.7-Flash", "tokens", 3, 2, 8, 64, 96, 3 * 2 * 8 * 64 * 96, True)
    assert probe(str(directory)) == expected


def test_stacked_experts(tmp_path: Path) -> None:
    directory = without_weights(make_model(SMALL, tmp_path / "model"), tmp_path / "bare")
    index = json.loads((directory / INDEX_FILE).read_text())
    others = {name: file for name, file in index["weight_map"].items() if ".experts." not in name}
    stacked = {f"model.layers.{i}.mlp.experts.{n}_proj": "x" for i in (1, 2) for n in ("gate_up", "down")}
    index["weight_map"] = others | stacked
    (directory / INDEX_FILE).write_text(json.dumps(index))
    assert probe(str(directory)).index


def test_names_that_the_index_lacks(tmp_path: Path) -> None:
    directory = without_weights(make_model(SMALL, tmp_path / "model"), tmp_path / "bare")
    index = (directory / INDEX_FILE).read_text()
    (directory / INDEX_FILE).write_text(index.replace(".gate_proj", ".w1"))
    with pytest.raises(BitsmoeError, match=r"index\.json: does not name the tensors") as e:
        probe(str(directory))
    assert [f"layers.{i}.mlp.experts.0.gate_proj.weight is missing" in str(e.value) for i in (0, 1, 2)] == [
        False, True, True,
    ]  # fmt: skip
    assert "tensor model.layers.0.mlp.gate_proj.weight is missing" in str(e.value)  # of the dense layer


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.gate.weight"])
def test_a_tensor_outside_the_experts_that_the_index_lacks(name: str, tmp_path: Path) -> None:
    directory = without_weights(make_model(SMALL, tmp_path / "model"), tmp_path / "bare")
    index = json.loads((directory / INDEX_FILE).read_text())
    del index["weight_map"][name]
    (directory / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(BitsmoeError, match=f"tensor {name} is missing"):
        probe(str(directory))


@pytest.mark.parametrize("index", [{}, {"weight_map": [1]}, {"weight_map": {"a": "../b.safetensors"}}])
def test_an_index_that_is_none(index: dict[str, Any], tmp_path: Path) -> None:
    directory = without_weights(make_model(SMALL, tmp_path / "model"), tmp_path / "bare")
    (directory / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(BitsmoeError, match=r"index\.json: (has no `weight_map`|names files outside)"):
        probe(str(directory))


def test_a_model_that_vllm_cannot_serve(tmp_path: Path) -> None:
    """It can be quantized, and probe says what for."""
    model = make_model("DeepseekV4ForCausalLM", tmp_path / "model")
    assert "takes no expert tensors" in str(probe(str(model)).unserved)
    printed = CliRunner().invoke(app, ["probe", str(model)]).output
    assert "vLLM is not known to serve the result: vLLM's loader of it takes no expert tensors" in printed


def test_packed_and_stacked_codes_are_named_otherwise(tmp_path: Path) -> None:
    for architecture, coded in (("KimiK25ForConditionalGeneration", to_packed), ("GptOssForCausalLM", to_mxfp4)):
        model = make_model(architecture, tmp_path / architecture)
        coded(model)
        assert probe(str(without_weights(model, tmp_path / f"{architecture}-bare"))).index


def test_experts_that_transformers_builds_elsewhere(tmp_path: Path) -> None:
    model = make_model(SMALL, tmp_path / "model")
    changes = {"mlp_layer_types": None, "first_k_dense_replace": 2}
    with pytest.raises(BitsmoeError, match=r"transformers builds other experts"):
        probe(str(without_weights(model, tmp_path / "bare", **changes)))


def test_an_architecture_outside_the_table(tmp_path: Path) -> None:
    bare = without_weights(
        make_model(SMALL, tmp_path / "model"), tmp_path / "bare", architectures=["NewMoeForCausalLM"]
    )
    with pytest.raises(BitsmoeError, match=r"NewMoeForCausalLM.* is not supported"):
        probe(str(bare))


def test_a_quantized_model(tmp_path: Path) -> None:
    model = make_model(SMALL, tmp_path / "model")
    with pytest.raises(BitsmoeError, match="already quantized"):
        probe(str(without_weights(model, tmp_path / "bare", quantization_config={"quant_method": "gptq"})))


def test_a_quantized_language_model(tmp_path: Path) -> None:
    model = make_model("Qwen3_5MoeForConditionalGeneration", tmp_path / "model")
    text = json.loads((model / "config.json").read_text())["text_config"] | {
        "quantization_config": {"quant_method": "x"}
    }
    assert probe(str(without_weights(model, tmp_path / "whole"))).num_experts == 8
    with pytest.raises(BitsmoeError, match="is already quantized"):
        probe(str(without_weights(model, tmp_path / "bare", text_config=text)))


def test_the_command() -> None:
    result = CliRunner(env={"COLUMNS": "40"}).invoke(app, ["probe", str(TINY_MOE)])
    assert result.exit_code == 0
    assert f"{TINY_MOE}: Qwen3MoeForCausalLM (Qwen3-MoE), can be quantized\n" in result.output
    assert "No index of the weights" in result.output
    found = json.loads(CliRunner().invoke(app, ["probe", str(TINY_MOE), "--json"]).output)
    assert (found["num_experts"], found["tested"], found["index"]) == (16, "tokens", False)
