"""Every architecture of the table, on a small random model of it, against transformers' own model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.families import FAMILIES, REFUSED, models_table, moe_shape
from builders import REPO
from families import CONFIGS, make_model, streamed_logits, to_float8, whole_logits
from offline_quant.config import QuantizeConfig
from offline_quant.dequantize import dequantize_checkpoint
from offline_quant.model_adapter import SourceModel, open_model
from offline_quant.pipeline import quantize_model

TEXT = "She opened the door, and there stood her brother with the lamp in his hand. " * 40


@pytest.fixture
def calib(tmp_path: Path) -> str:
    path = tmp_path / "calib.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def quick(calib: str) -> QuantizeConfig:
    return QuantizeConfig(bits=4.5, calib=calib, calib_samples=4, calib_length=64, refine=0)


def test_every_family_is_tried() -> None:
    assert CONFIGS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_family_is_read_quantized_and_dequantized(architecture: str, tmp_path: Path, calib: str) -> None:
    model = make_model(architecture, tmp_path / "model")
    source = SourceModel(model)
    layers = source.shape.layers
    assert torch.allclose(streamed_logits(source), whole_logits(model), atol=2e-4)
    outcome = quantize_model(str(model), tmp_path / "q", quick(calib))
    assert len(outcome.report["layers"]) == len(layers)
    assert all(0 < row["output_error"] < 0.02 for row in outcome.report["layers"])
    dequantize_checkpoint(tmp_path / "q", tmp_path / "d", torch.float32)
    assert torch.allclose(streamed_logits(open_model(tmp_path / "q")), whole_logits(tmp_path / "d"), atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_source_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model("MixtralForCausalLM", tmp_path / "model", dtype)
    assert torch.allclose(streamed_logits(SourceModel(model)), whole_logits(model), atol=2e-4)


def test_float8_sources_are_read_as_what_they_stand_for(tmp_path: Path, calib: str) -> None:
    model = make_model("DeepseekV3ForCausalLM", tmp_path / "model")
    plain = make_model("DeepseekV3ForCausalLM", tmp_path / "plain")
    meaning = to_float8(model)
    save_file(load_file(plain / "model.safetensors") | meaning, plain / "model.safetensors", metadata={"format": "pt"})
    source = SourceModel(model)
    assert not [name for name in source.tensors if name.endswith("_scale_inv")]
    assert all(torch.equal(source.tensors.get(name), value) for name, value in meaning.items())
    quantize_model(str(model), tmp_path / "q", quick(calib))
    quantize_model(str(plain), tmp_path / "q2", quick(calib))
    assert (tmp_path / "q" / "model.safetensors").read_bytes() == (tmp_path / "q2" / "model.safetensors").read_bytes()
    config, other = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("q", "q2"))
    assert config == other


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"), "up_proj.weight is float8_e4m3fn"),
        (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"), "has no float8 matrix"),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.3.up_proj.weight_scale_inv": torch.ones(2, 2)}),
            r"is float32\[2, 2\], but .* of \[96, 64\] needs \[3, 2\]",
        ),
    ],
    ids=["no scale", "no weight", "scale of another shape"],
)
def test_broken_float8_is_refused(damage, said: str, tmp_path: Path) -> None:
    model = make_model("DeepseekV3ForCausalLM", tmp_path / "model")
    to_float8(model)
    tensors = load_file(model / "model.safetensors")
    damage(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BitsmoeError, match=said):
        SourceModel(model)


def test_float8_without_blocks_is_refused(tmp_path: Path) -> None:
    model = make_model("DeepseekV3ForCausalLM", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitsmoeError, match="weight_block_size None"):
        SourceModel(model)


def test_the_number_of_experts_may_have_another_familys_name() -> None:
    """As transformers 5 saves Qwen3-MoE; two names must agree."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu", "hidden_size": 8,
        "num_hidden_layers": 1, "vocab_size": 9, "moe_intermediate_size": 4, "num_local_experts": 6,
    }  # fmt: skip
    assert moe_shape(config, "here").num_experts == 6
    with pytest.raises(BitsmoeError, match="num_local_experts is 6, but num_experts 7"):
        moe_shape(config | {"num_experts": 7}, "here")


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_cannot_be_quantized_says_why(architecture: str) -> None:
    with pytest.raises(BitsmoeError, match=REFUSED[architecture]):
        moe_shape({"architectures": [architecture], "num_local_experts": 8}, "here")


def test_moe_layers_at_every_other_place_are_refused() -> None:
    config = {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_act": "silu", "hidden_size": 8,
        "num_hidden_layers": 4, "vocab_size": 9, "moe_intermediate_size": 4, "n_routed_experts": 6, "moe_layer_freq": 2,
    }  # fmt: skip
    with pytest.raises(BitsmoeError, match="moe_layer_freq is 2, but only 1 is supported"):
        moe_shape(config, "here")


def test_the_readme_has_the_table() -> None:
    """`python -m bitsmoe_kernels.format.families` prints it."""
    assert models_table() in (REPO / "README.md").read_text(encoding="utf-8")
