"""Every architecture of the table, on a small random model of it, against transformers' own model."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.checkpoint import Checkpoint
from bitsmoe_kernels.format.linear_layers import DenseBits
from bitsmoe_kernels.models.families import FAMILIES, REFUSED, models_table, moe_shape, stored_prefix
from builders import REPO
from families import (
    CONFIGS,
    IDS,
    calibration_perplexity,
    family_cases,
    make_model,
    streamed_logits,
    to_float8,
    to_mixed_codes,
    to_mxfp4,
    to_packed,
    whole_logits,
)
from offline_quant.checkpoint.dequantize import dequantize_checkpoint
from offline_quant.config import QuantizeConfig
from offline_quant.model.expert_inputs import called_for_all
from offline_quant.model.float8 import Float8Reader
from offline_quant.model.mxfp4 import Mxfp4Reader
from offline_quant.model.quantized import open_model
from offline_quant.model.source import SourceModel
from offline_quant.model.streaming import StreamedModel
from offline_quant.pipeline.quantize import quantize_model
from offline_quant.report.inspect import parallel_sizes_of

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


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_family_is_read(architecture: str, tmp_path: Path) -> None:
    model = make_model(architecture, tmp_path / "model")
    assert torch.allclose(streamed_logits(SourceModel(model)), whole_logits(model), atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", family_cases(FAMILIES))
def test_a_family_is_quantized_and_dequantized(architecture: str, tmp_path: Path, calib: str) -> None:
    model = make_model(architecture, tmp_path / "model")
    report = quantize_model(str(model), tmp_path / "q", quick(calib)).report
    assert len(report.layers) == len(SourceModel(model).shape.layers)
    assert all(0 < row.output_error < 0.02 for row in report.layers)
    # Hidden states of the calibration, which passed through layers in parts, are those of the quantized model.
    assert report.sanity.perplexity_quantized == pytest.approx(calibration_perplexity(tmp_path / "q", calib), rel=1e-4)
    dequantize_checkpoint(tmp_path / "q", tmp_path / "d", torch.float32)
    assert torch.allclose(streamed_logits(open_model(tmp_path / "q")), whole_logits(tmp_path / "d"), atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "factor"),
    [
        pytest.param("GraniteMoeForCausalLM", 0.4, marks=pytest.mark.nightly),
        ("AfmoeForCausalLM", None),
        pytest.param("MixtralForCausalLM", 1, marks=pytest.mark.nightly),
        ("GptOssForCausalLM", 1),
        pytest.param("Llama4ForCausalLM", 1, marks=pytest.mark.nightly),
        pytest.param("MiniMaxM3SparseForConditionalGeneration", 2, marks=pytest.mark.nightly),
    ],
)
def test_layers_that_do_not_just_add_the_output_of_their_experts(
    architecture: str, factor: float | None, tmp_path: Path, calib: str
) -> None:
    """Granite and MiniMax-M3 scale it, Trinity norms it. Tuning aims at what experts put out, before that."""
    model = make_model(architecture, tmp_path / "model")
    streamed = StreamedModel(SourceModel(model))
    for index in streamed.shape.layers:
        with streamed.layer(index):
            assert streamed.expert_factor(index) == (factor if factor is None else pytest.approx(factor, rel=1e-6))
    outcomes = [
        quantize_model(
            str(model), tmp_path / str(i), quick(calib).model_copy(update={"bits": 2.5, "calib_samples": 24} | options)
        )
        for i, options in enumerate(({}, {"fit": "layer"}, {"tune": True}))
    ]
    # The first layer has no errors of others to make up for.
    plain, fitted, tuned = (outcome.report.layers[0].output_error for outcome in outcomes)
    assert max(tuned, fitted) < plain
    for i, outcome in enumerate(outcomes[1:], 1):
        found = outcome.report.sanity.perplexity_quantized
        assert found == pytest.approx(calibration_perplexity(tmp_path / str(i), calib, 24), rel=1e-4)


LATENT: dict[str, Any] = {"moe_latent_size": 48}
"""As in Nemotron-3-Super: experts see 48 of 64 values."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"basis": "natural"},
        {"basis": "whitened", "budget": "model"},
        {"basis": "paper"},
        {"objective": "bt-moe"},
        {"objective": "alphaq"},
        {"bits": 2.5, "tune": True},
        {"bits": 2.5, "tune_model": True, "refine": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "more", [pytest.param({}, marks=pytest.mark.nightly, id="its own width"), pytest.param(LATENT, id="latent")]
)
def test_experts_without_a_gate(more: dict[str, Any], options: dict[str, Any], tmp_path: Path, calib: str) -> None:
    """Every form, objective and tuning takes two matrices, of the model's width or of another."""
    model = make_model("NemotronHForCausalLM", tmp_path / "model", **more)
    source, want = SourceModel(model), whole_logits(model)
    assert source.shape.hidden_size == more.get("moe_latent_size", 64)
    assert source.shape.num_weights == 2 * 2 * 8 * source.shape.hidden_size * 80
    assert torch.allclose(streamed_logits(source), want, atol=2e-4)
    report = quantize_model(
        str(model), tmp_path / "q", QuantizeConfig.model_validate(quick(calib).model_dump() | options)
    ).report
    assert report.sanity.perplexity_quantized == pytest.approx(calibration_perplexity(tmp_path / "q", calib), rel=1e-4)
    assert report.bpw <= options.get("bits", 4.5)
    dequantize_checkpoint(tmp_path / "q", tmp_path / "d", torch.float32)
    quantized = whole_logits(tmp_path / "d")
    assert torch.allclose(streamed_logits(open_model(tmp_path / "q")), quantized, atol=2e-4)
    assert all(0 < row.output_error < 0.02 for row in report.layers)
    assert float((quantized - want).std() / want.std()) > 1e-2  # experts matter to these logits, and errors show


def test_experts_called_with_all_tokens() -> None:
    """As Llama 4 calls them: zeros where a token does not go to an expert, and gradients reach what is weighed."""
    E, T, H = 3, 4, 5
    generator = torch.Generator().manual_seed(0)
    x, ids = torch.randn(T, H, generator=generator), torch.tensor([2, 0, 2, 1])
    weights, gain = torch.rand(T, 1, generator=generator).requires_grad_(), torch.tensor([2.0, 3.0, 5.0])
    routed = torch.zeros(E, T, 1).index_put((ids, torch.arange(T)), weights)

    def experts(x: torch.Tensor, ids: torch.Tensor, of_one: torch.Tensor) -> torch.Tensor:
        assert of_one.eq(1).all()
        return gain[ids] * x.square()

    found = called_for_all(experts, E)((x * routed).view(-1, H)).view(E, T, H)
    want = gain[ids][:, None] * (x * weights).square()
    assert torch.equal(found.sum(0), want)
    assert torch.equal(found.ne(0).any(-1), routed[..., 0] != 0)
    assert torch.equal(*(torch.autograd.grad(y.sum(), weights)[0] for y in (found, want)))
    config = {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "num_experts_per_tok": 2}
    sizes = {"num_local_experts": 8, "intermediate_size": 4, "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 9}
    with pytest.raises(BitsmoeError, match="num_experts_per_tok is 2, but only 1 is supported"):
        moe_shape(config | sizes | {"hidden_act": "silu"}, "here")


def test_layers_listed_by_letters(tmp_path: Path) -> None:
    """As Nemotron-3 is published. transformers saves words, and no number of layers."""
    model = make_model("NemotronHForCausalLM", tmp_path / "model", **LATENT)
    want, config = streamed_logits(SourceModel(model)), json.loads((model / "config.json").read_text())
    assert "num_hidden_layers" not in config
    del config["layers_block_type"]
    with pytest.raises(BitsmoeError, match="layers_block_type and hybrid_override_pattern are missing"):
        moe_shape(config | {"num_hidden_layers": 5}, "here")
    config["hybrid_override_pattern"] = "ME*-E"
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    source = SourceModel(model)
    assert source.shape.layers == (1, 4)
    assert torch.equal(streamed_logits(source), want)
    with pytest.raises(BitsmoeError, match=r"hybrid_override_pattern is 'ME\*-E', but must list a kind .* 6 layers"):
        moe_shape(config | {"num_hidden_layers": 6}, "here")
    with pytest.raises(BitsmoeError, match=r"mlp_hidden_act is 'silu', but only 'relu2' is supported"):
        moe_shape(config | {"mlp_hidden_act": "silu"}, "here")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["GraniteMoeForCausalLM", "Cohere2MoeForCausalLM", "PhiMoEForCausalLM"])
def test_heads_that_scale_or_have_a_bias(architecture: str, tmp_path: Path) -> None:
    """Some rows of the head give what all give; the model in memory is transformers' own."""
    model = make_model(architecture, tmp_path / "model")
    streamed = StreamedModel(SourceModel(model))
    states = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    whole = streamed.head(states)
    assert torch.equal(torch.cat([part(states) for part in streamed.head_parts(1000)], -1), whole)
    bias = streamed.head.bias
    assert (bias is not None) == (architecture == "PhiMoEForCausalLM")
    plain = states @ streamed.head.weight.T + (0 if bias is None else bias)
    scale = {"GraniteMoeForCausalLM": 0.5, "Cohere2MoeForCausalLM": 0.25, "PhiMoEForCausalLM": 1.0}[architecture]
    assert torch.allclose(whole, plain * scale, rtol=1e-6, atol=1e-6)
    want = whole_logits(model)
    with torch.no_grad():
        assert torch.allclose(streamed.materialize()(input_ids=IDS).logits, want, atol=2e-4)


def test_interleaved_experts_in_memory(tmp_path: Path) -> None:
    """Their biases too are where transformers' module has them."""
    model = make_model("GptOssForCausalLM", tmp_path / "model")
    whole = StreamedModel(SourceModel(model)).materialize()
    with torch.no_grad():
        assert torch.allclose(whole(input_ids=IDS).logits, whole_logits(model), atol=2e-4)


@pytest.mark.slow
def test_stacked_files_in_both_orientations(tmp_path: Path, calib: str) -> None:
    """Qwen3-VL is published transposed; what transformers saves is not. 96 channels of experts, hidden size 64."""
    model = make_model("Qwen3VLMoeForConditionalGeneration", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    want = whole_logits(model)
    stacked = [name for name in tensors if ".experts." in name]
    assert tensors[stacked[0]].shape != tensors[stacked[0]].mT.shape
    turned = tensors | {name: tensors[name].mT.contiguous() for name in stacked}
    save_file(turned, model / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(whole_logits(model), want)
    assert torch.allclose(streamed_logits(SourceModel(model)), want, atol=2e-4)
    quantize_model(str(model), tmp_path / "q", quick(calib))
    dequantize_checkpoint(tmp_path / "q", tmp_path / "d", torch.float32)
    written = load_file(tmp_path / "d" / "model.safetensors")
    assert {name: written[name].shape for name in stacked} == {name: turned[name].shape for name in stacked}
    del turned[stacked[0]]
    save_file(turned, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BitsmoeError, match=f"tensor {stacked[0]} is missing"):
        SourceModel(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_source_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model("MixtralForCausalLM", tmp_path / "model", dtype)
    assert torch.allclose(streamed_logits(SourceModel(model)), whole_logits(model), atol=2e-4)


def published(
    architecture: str, folder: Path, store: Callable[[Path], dict[str, torch.Tensor]]
) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A model whose weights `store` keeps in another form, the same in bfloat16, and what its weights stand for."""
    model, plain = (make_model(architecture, folder / name) for name in ("model", "plain"))
    meaning, file = store(model), plain / "model.safetensors"
    save_file(load_file(file) | meaning, file, metadata={"format": "pt"})
    return model, plain, meaning


def assert_same_result(model: Path, plain: Path, folder: Path, calib: str) -> None:
    """Quantized, both are the same, byte for byte and with one config.json."""
    for source, name in ((model, "q"), (plain, "q2")):
        quantize_model(str(source), folder / name, quick(calib))
    assert (folder / "q" / "model.safetensors").read_bytes() == (folder / "q2" / "model.safetensors").read_bytes()
    config, other = (json.loads((folder / d / "config.json").read_text()) for d in ("q", "q2"))
    assert config == other


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "scales"),
    [
        ("DeepseekV3ForCausalLM", torch.float32),
        ("MiniMaxM2ForCausalLM", torch.float32),
        ("Qwen3_5MoeForConditionalGeneration", torch.bfloat16),
    ],
)
def test_float8_sources_are_read_as_what_they_stand_for(
    architecture: str, scales: torch.dtype, tmp_path: Path, calib: str
) -> None:
    model, plain, meaning = published(architecture, tmp_path, lambda model: to_float8(model, scales=scales))
    source = SourceModel(model)
    assert not [name for name in source.tensors if name.endswith("_scale_inv")]
    assert all(torch.equal(source.tensors.get(name), value) for name, value in meaning.items())
    assert_same_result(model, plain, tmp_path, calib)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "bits", "group"),
    [("KimiK25ForConditionalGeneration", 4, 32), ("DeepseekV3ForCausalLM", 8, 16)],
)
def test_packed_integers_are_read_as_what_they_stand_for(
    architecture: str, bits: DenseBits, group: int, tmp_path: Path, calib: str
) -> None:
    """compressed-tensors' own reader gives the same values; the result is that of the dequantized model."""
    model, plain, meaning = published(architecture, tmp_path, lambda model: to_packed(model, bits, group))
    source, stored = SourceModel(model), load_file(model / "model.safetensors")
    assert source.tensors.specs == SourceModel(plain).tensors.specs
    for name, value in meaning.items():
        assert torch.equal(source.tensors.get(name), value)
        codes = unpack_from_int32(stored[f"{name}_packed"], bits, torch.Size(stored[f"{name}_shape"].tolist()))
        scale = stored[f"{name}_scale"].float().repeat_interleave(group, 1)
        assert torch.equal((codes.float() * scale).bfloat16(), value)
    assert_same_result(model, plain, tmp_path, calib)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'.* only symmetric pack-quantized"),
        ({"config_groups": {}}, "only symmetric pack-quantized"),
        ({"config_groups": {"a": {"weights": {"num_bits": 4, "type": "int", "symmetric": False}}}}, "only symmetric"),
        ({"quant_method": "awq"}, "is already quantized \\('awq'\\)"),
        ({"quant_method": ["fp8"]}, r"is already quantized \(\['fp8'\]\)"),
    ],
)
def test_other_quantizations_are_refused(changed: dict[str, object], said: str, tmp_path: Path) -> None:
    model = make_model("KimiK25ForConditionalGeneration", tmp_path / "model")
    to_packed(model)
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["quantization_config"] |= changed
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitsmoeError, match=said):
        SourceModel(model)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t, n: t.pop(f"{n}_scale"), "has no .*weight_scale"),
        (lambda t, n: t.pop(f"{n}_shape"), "has no .*weight_shape"),
        (lambda t, n: t.update({f"{n}_scale": torch.ones(96, 7)}), "does not divide 96 x 64 codes"),
        (lambda t, n: t.update({f"{n}_packed": torch.ones(96, 8)}), "must be an int32 matrix"),
        (lambda t, n: t.update({f"{n}_shape": torch.tensor([96, 63])}), r"weight_shape says \[96, 63\], the codes"),
    ],
    ids=["no scale", "no shape", "scale of another shape", "codes of another dtype", "another shape"],
)
def test_broken_packed_integers_are_refused(damage, said: str, tmp_path: Path) -> None:
    model = make_model("DeepseekV3ForCausalLM", tmp_path / "model")
    to_packed(model)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors = load_file(model / "model.safetensors")
    damage(tensors, name)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BitsmoeError, match=said):
        SourceModel(model).tensors.get(name)


@pytest.mark.slow
def test_mxfp4_sources_are_read_as_what_they_stand_for(tmp_path: Path, calib: str) -> None:
    """transformers' own reader gives the same values; the result is that of the dequantized model."""
    model, plain, meaning = published("GptOssForCausalLM", tmp_path, to_mxfp4)
    source, stored = SourceModel(model), load_file(model / "model.safetensors")
    assert source.tensors.specs == SourceModel(plain).tensors.specs
    for name, value in meaning.items():
        assert torch.equal(source.tensors.get(name), value)
        assert torch.equal(source.tensors.rows(name, slice(2, 5)), value[2:5])
        theirs = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert torch.equal(theirs, value)
    assert torch.equal(source.tensors.rows("model.norm.weight", slice(3)), stored["model.norm.weight"][:3])
    assert_same_result(model, plain, tmp_path, calib)


@pytest.mark.slow
def test_experts_in_mxfp4_beside_float8(tmp_path: Path, calib: str, capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSeek-V4 as it is published: scales are powers of two, and called after the module."""
    model, plain, meaning = published("DeepseekV4ForCausalLM", tmp_path, to_mixed_codes)
    source, stored = SourceModel(model), load_file(model / "model.safetensors")
    assert source.tensors.specs.keys() == load_file(plain / "model.safetensors").keys()
    for name, value in meaning.items():
        scale = stored[name.removesuffix("weight") + "scale"]
        assert torch.equal(source.tensors.get(name), value)
        assert source.tensors.specs[name].shape == value.shape
        if ".experts." in name:
            assert torch.equal(Fp8Dequantize(None)._dequantize_one(stored[name], scale, torch.bfloat16), value)
    assert_same_result(model, plain, tmp_path, calib)
    assert "vLLM is not known to serve the result: vLLM's loader" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, w, s: t.pop(s), "is int8"),
        (
            lambda t, w, s: t.update({s: t[s][:, :1].contiguous()}),
            r"MXFP4 of \[96, 64\], needs float8_e8m0fnu\[96, 2\]",
        ),
        (lambda t, w, s: t.update({s: t[s].float()}), r"is float32\[96, 2\], but"),
        (lambda t, w, s: t.update({w: t[w][:, :24].contiguous()}), r"MXFP4 of \[96, 48\], needs"),
        (lambda t, w, s: t.pop("layers.1.attn.wkv.scale"), r"wkv\.weight is float8_e4m3fn\[64, 64\], without"),
    ],
    ids=["no scale", "scale of another shape", "scale of another dtype", "codes of another shape", "no float8 scale"],
)
def test_broken_mxfp4_beside_float8_is_refused(change, said: str, tmp_path: Path) -> None:
    model = make_model("DeepseekV4ForCausalLM", tmp_path / "model")
    to_mixed_codes(model)
    tensors = load_file(model / "model.safetensors")
    change(tensors, "layers.1.ffn.experts.3.w1.weight", "layers.1.ffn.experts.3.w1.scale")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BitsmoeError, match=said):
        SourceModel(model)


def test_experts_of_token_ids_stay_whole_numbers(tmp_path: Path) -> None:
    """The first layers of DeepSeek-V4 look the experts of a token up."""
    model = make_model("DeepseekV4ForCausalLM", tmp_path / "model")
    streamed = StreamedModel(SourceModel(model))
    with streamed.layer(0) as module:
        assert module.mlp.gate.tid2eid.dtype == torch.int64
        assert module.mlp.is_hash


def test_every_code_of_mxfp4(tmp_path: Path) -> None:
    """All bytes and exponents but that of infinity, against transformers' reader."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(255, 2, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8).view(255, 1, 1).repeat(1, 2, 16)
    save_file({"w_blocks": blocks, "w_scales": scales}, tmp_path / "model.safetensors")
    found = Mxfp4Reader(tmp_path, {}).get("w")
    assert found.shape == (255, 512, 2)
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t, n: t.pop(f"{n}_scales"), "gate_up_proj_scales is missing"),
        (lambda t, n: t.pop(f"{n}_blocks"), "gate_up_proj is missing"),
        (lambda t, n: t.update({f"{n}_scales": torch.ones(8, 192, 3, dtype=torch.uint8)}), r"uint8 \[8, 192, 2\]"),
        (lambda t, n: t.update({f"{n}_blocks": torch.ones(8, 192, 2, 16)}), "must be uint8"),
        (lambda t, n: t.pop(f"{n}_bias"), "gate_up_proj_bias is missing"),
        (lambda t, n: t.update({f"{n}_bias": torch.ones(8, 96)}), r"gate_up_proj_bias has shape \[8, 96\]"),
    ],
    ids=["no scales", "no codes", "scales of another shape", "codes of another dtype", "no bias", "another bias"],
)
def test_broken_mxfp4_is_refused(damage, said: str, tmp_path: Path) -> None:
    model = make_model("GptOssForCausalLM", tmp_path / "model")
    to_mxfp4(model)
    tensors = load_file(model / "model.safetensors")
    damage(tensors, "model.layers.1.mlp.experts.gate_up_proj")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BitsmoeError, match=said):
        SourceModel(model)


def test_float8_without_blocks_is_refused(tmp_path: Path) -> None:
    model = make_model("DeepseekV3ForCausalLM", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitsmoeError, match="weight_block_size None"):
        SourceModel(model)


@pytest.mark.parametrize("quantization", ["fp8", ["fp8"], 8, True])
def test_a_quantization_config_that_is_none(quantization: object, tmp_path: Path) -> None:
    model = make_model("OlmoeForCausalLM", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": quantization}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitsmoeError, match="is already quantized"):
        SourceModel(model)


@pytest.mark.parametrize("block", [[64, 64], [2**70, 64], [2**40, 2**40]])
def test_float8_blocks_larger_than_the_matrix(block: list[int], tmp_path: Path) -> None:
    """One factor for all: nothing of the block's size may be made."""
    weight = torch.arange(6.0).view(2, 3)
    tensors = {"w": weight.to(torch.float8_e4m3fn), "w_scale_inv": torch.full((1, 1), 0.5)}
    tensors |= {"empty": torch.empty(0, 3).to(torch.float8_e4m3fn), "empty_scale_inv": torch.empty(0, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    reader = Float8Reader(tmp_path, {"weight_block_size": block})
    assert torch.equal(reader.get("w"), (weight / 2).bfloat16())
    assert reader.get("empty").shape == (0, 3)


@pytest.mark.parametrize(("value", "fine"), [(448.0, True), (float("nan"), False)])
def test_float8_outside_the_experts_is_looked_at(value: float, fine: bool, tmp_path: Path) -> None:
    model = make_model("OlmoeForCausalLM", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = torch.full((64,), value).to(torch.float8_e4m3fn)
    save_file(tensors, model / "model.safetensors")
    source = SourceModel(model)
    if fine:
        source.check_finite(lambda names, _: names)
    else:
        with pytest.raises(BitsmoeError, match=r"model\.norm\.weight: 64 of 64 values are NaN"):
            source.check_finite(lambda names, _: names)


DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_act": "silu", "hidden_size": 8,
    "num_hidden_layers": 2, "vocab_size": 9, "moe_intermediate_size": 4, "n_routed_experts": 6,
}  # fmt: skip
QWEN = DEEPSEEK | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (QWEN | {"mlp_only_layers": 3}, "mlp_only_layers is 3, but must be a list of layer numbers"),
        (QWEN | {"mlp_only_layers": [[0]]}, "mlp_only_layers is .*list of layer numbers"),
        (QWEN | {"mlp_only_layers": "0"}, "mlp_only_layers is '0', but must be a list"),
        (QWEN | {"decoder_sparse_step": 0}, "decoder_sparse_step is 0, but must be a whole number above 0"),
        (QWEN | {"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, but must be .* at most 10000"),
        (QWEN | {"n_routed_experts": 2**31}, "n_routed_experts is 2147483648, but must be a whole number"),
        (QWEN | {"hidden_size": True}, "hidden_size is True, but must be a whole number"),
        (DEEPSEEK | {"first_k_dense_replace": "1"}, "first_k_dense_replace is '1', but must be a whole number, 0 or"),
        (DEEPSEEK | {"first_k_dense_replace": -1}, "first_k_dense_replace is -1, but must be"),
        (DEEPSEEK | {"first_k_dense_replace": 2}, "no Mixture-of-Experts layers"),
        (
            DEEPSEEK | {"mlp_layer_types": ["sparse"]},
            r"mlp_layer_types is \['sparse'\], but must list .* each of 2 layers",
        ),
        (DEEPSEEK | {"mlp_layer_types": ["dense", "moe"]}, "mlp_layer_types is .* but must list 'dense' or 'sparse'"),
        (DEEPSEEK | {"mlp_layer_types": 2}, "mlp_layer_types is 2, but must list"),
        (
            DEEPSEEK | {"mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": 0},
            "first_k_dense_replace is 0, but mlp_layer_types lists other layers",
        ),
        (DEEPSEEK | {"mlp_layer_types": ["dense", "dense"]}, "no Mixture-of-Experts layers"),
        (DEEPSEEK | {"num_dense_layers": "2"}, "num_dense_layers is '2', but must be a whole number, 0 or more"),
        (DEEPSEEK | {"moe_layer_end_index": -2}, "moe_layer_end_index is -2, but must be a whole number, -1 or more"),
        (DEEPSEEK | {"num_experts_per_tok": [2, 3]}, r"num_experts_per_tok is \[2, 3\], but must be a whole number"),
        (DEEPSEEK | {"moe_layer_freq": [1, 0]}, "moe_layer_freq is .*, but only 1 is supported"),
        (DEEPSEEK | {"indexer_types": ["full", "shared"]}, "indexer_types lists layers that share the indexer"),
        (DEEPSEEK | {"routed_scaling_factor": 0}, "routed_scaling_factor is 0, but must be a number above 0"),
        (DEEPSEEK | {"architectures": ["x" * 10**5]}, "architecture .{200} is not supported"),
    ],
)
def test_a_config_that_cannot_be_right(config: dict[str, object], said: str) -> None:
    with pytest.raises(BitsmoeError, match=said):
        moe_shape(config, "here")


@pytest.mark.parametrize(
    ("architecture", "config", "layers"),
    [
        ("DeepseekV3ForCausalLM", {"mlp_layer_types": ["sparse", "dense", "sparse", "dense"]}, (0, 2)),
        ("DeepseekV3ForCausalLM", {"mlp_layer_types": None, "first_k_dense_replace": 3}, (3,)),
        ("LagunaForCausalLM", {}, (1, 2, 3)),
        ("LagunaForCausalLM", {"first_k_dense_replace": None}, (1, 2, 3)),
        ("HunYuanMoEV1ForCausalLM", {"moe_topk": [2, 2, 2, 2]}, (0, 1, 2, 3)),
        ("Lfm2MoeForCausalLM", {"num_dense_layers": 2}, (2, 3)),
        ("Lfm2MoeForCausalLM", {"num_dense_layers": 0}, (0, 1, 2, 3)),
        ("JambaForCausalLM", {}, (1, 3)),
        ("JambaForCausalLM", {"expert_layer_period": 4, "expert_layer_offset": 2}, (2,)),
        ("ExaoneMoeForCausalLM", {"architectures": ["ExaoneMoEForCausalLM"]}, (1, 2, 3)),
        ("MiMoV2FlashForCausalLM", {"moe_layer_freq": [0, 1, 1, 1]}, (1, 2, 3)),
        ("HunYuanMoEV1ForCausalLM", {"routed_scaling_factor": False, "n_group": False}, (0, 1, 2, 3)),
        ("Ernie4_5_MoeForCausalLM", {}, (1, 2, 3)),
        ("Ernie4_5_MoeForCausalLM", {"moe_layer_start_index": 0, "moe_layer_end_index": 2}, (0, 1, 2)),
        ("Ernie4_5_MoeForCausalLM", {"moe_layer_interval": 2}, (1, 3)),
        ("Llama4ForCausalLM", {"interleave_moe_layer_step": 2}, (1, 3)),
        ("Llama4ForCausalLM", {"interleave_moe_layer_step": 1, "moe_layers": [0, 3]}, (0, 3)),
    ],
)
def test_layers_with_experts(architecture: str, config: dict[str, object], layers: tuple[int, ...]) -> None:
    family = FAMILIES[architecture]
    sizes = {family.num_experts_key: 8, family.intermediate_size_key: 4}
    base = DEEPSEEK | {"architectures": [architecture], "model_type": family.model_type, "num_hidden_layers": 4}
    del base["n_routed_experts"]
    assert moe_shape(base | sizes | config, "here").layers == layers


SHARED = {
    "num_hidden_layers": 5, "index_topk": 24, "index_topk_freq": 2, "index_skip_topk_offset": 3,
    "indexer_types": ["full", "full", "full", "shared", "full"],
}  # fmt: skip
"""As GLM-5.2 is published, with an indexer that chooses all tokens of a window."""


@pytest.mark.slow
def test_layers_that_share_an_indexer(tmp_path: Path, calib: str) -> None:
    model = make_model("GlmMoeDsaForCausalLM", tmp_path / "model", **SHARED)
    names = load_file(model / "model.safetensors")
    assert [f"model.layers.{i}.self_attn.indexer.wk.weight" in names for i in range(5)] == [True] * 3 + [False, True]
    assert torch.allclose(streamed_logits(SourceModel(model)), whole_logits(model), atol=2e-4)
    config = QuantizeConfig(bits=2.5, calib=calib, calib_samples=4, calib_length=24, refine=0)
    quantize_model(str(model), tmp_path / "q", config)
    dequantize_checkpoint(tmp_path / "q", tmp_path / "plain", torch.float32)
    assert torch.allclose(streamed_logits(open_model(tmp_path / "q")), whole_logits(tmp_path / "plain"), atol=2e-4)
    with pytest.raises(BitsmoeError, match=r"windows may have at most index_topk tokens, 24, not 25; .*--calib-length"):
        quantize_model(str(model), tmp_path / "r", config.model_copy(update={"calib_length": 25}))
    with pytest.raises(BitsmoeError, match="24, not 25"):
        StreamedModel(SourceModel(model)).embed(torch.zeros(1, 25, dtype=torch.int64))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"index_topk_freq": 1}, r"indexer_types is .*, but index_topk_freq and index_skip_topk_offset, which vLLM"),
        ({"index_topk_pattern": "FFFFF"}, r"indexer_types is .*, but index_topk_pattern, which vLLM reads"),
        ({"index_topk_pattern": "FFXFF"}, "index_topk_pattern is 'FFXFF', but must be a letter F or S for each of 5"),
        ({"index_topk_freq": "2"}, "index_topk_freq and index_skip_topk_offset are '2' and 3"),
        ({"index_topk_pattern": "SFFSF", "indexer_types": None}, "the first layer has no indexer to share"),
        ({"indexer_types": None}, None),
        ({"indexer_types": None, "index_topk_pattern": "FSSSF"}, None),
    ],
)
def test_keys_of_shared_indexers_must_agree(changes: dict[str, object], said: str | None) -> None:
    config: dict[str, Any] = {
        "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "hidden_act": "silu", "vocab_size": 9,
        "hidden_size": 8, "moe_intermediate_size": 4, "n_routed_experts": 6, **SHARED, **changes,
    }  # fmt: skip
    if said is None:
        assert moe_shape(config, "here").layers == (0, 1, 2, 3, 4)
        return
    with pytest.raises(BitsmoeError, match=said):
        moe_shape(config, "here")


def test_experts_that_transformers_builds_elsewhere_are_refused(tmp_path: Path) -> None:
    """transformers knows `mlp_layer_types` alone here, and takes the first layer only for dense without it."""
    model = make_model("Glm4MoeLiteForCausalLM", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"first_k_dense_replace": 2}
    del config["mlp_layer_types"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitsmoeError, match=r"(?s)other experts.*decoder layer 1\.mlp\.experts: .*no experts was read"):
        StreamedModel(SourceModel(model))


@pytest.mark.slow
def test_the_language_model_of_several_parts(tmp_path: Path, calib: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Experts stacked as on the Hub; the other parts are copied, and config.json keeps what it says of them."""
    model = make_model("Qwen3_5MoeForConditionalGeneration", tmp_path / "model")
    source, tensors = SourceModel(model), load_file(model / "model.safetensors")
    tensors["mtp.fc.weight"] = torch.ones(2, 2, dtype=torch.bfloat16)
    for layer in source.shape.layers:
        experts = source.experts(layer)
        gate_up, down = experts.gate_up.bfloat16(), experts.down.bfloat16()
        for e in range(source.shape.num_experts):
            for name in source.shape.expert_names(layer, e):
                del tensors[name]
        prefix = source.shape.prefix(layer)
        tensors |= {f"{prefix}.gate_up_proj": gate_up, f"{prefix}.down_proj": down}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert torch.allclose(streamed_logits(SourceModel(model)), whole_logits(model), atol=2e-4)
    with pytest.raises(BitsmoeError, match=r"--dense-bits 4: .* a model of several parts"):
        quantize_model(str(model), tmp_path / "q", quick(calib).model_copy(update={"dense_bits": 4}))
    quantize_model(str(model), tmp_path / "q", quick(calib))
    assert "not part of the model" not in "".join(capsys.readouterr())
    written = load_file(tmp_path / "q" / "model.safetensors")
    others = {name for name in tensors if name.startswith(("model.visual.", "mtp."))}
    assert len(others) > 10
    assert parallel_sizes_of(Checkpoint(tmp_path / "q")).tensor == (1, 2)
    assert all(torch.equal(written[name], tensors[name]) for name in others)
    config, before = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("q", "model"))
    assert {key: config[key] for key in before} == before
    assert set(config["quantization_config"]["layers"]) == {
        f"model.language_model.layers.{i}.mlp.experts" for i in range(4)
    }


def test_a_model_of_several_parts_that_does_not_describe_its_language_model() -> None:
    config = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "num_experts": 8}
    for part in ({}, {"text_config": None}, {"text_config": [8]}):
        with pytest.raises(BitsmoeError, match=r"config\.json lacks text_config, which describes"):
            moe_shape(config | part, "here")
    with pytest.raises(BitsmoeError, match=r"text_config of config\.json lacks \['num_experts', 'moe_inter"):
        moe_shape(config | {"text_config": {"hidden_size": 8}}, "here")


def test_the_model_type_of_a_language_part_may_be_another(tmp_path: Path) -> None:
    """As in MiniMax-M3: transformers passes over what text_config says of it."""
    model = make_model("MiniMaxM3SparseForConditionalGeneration", tmp_path / "model")
    want = streamed_logits(SourceModel(model))
    config = json.loads((model / "config.json").read_text())
    for said in ({"model_type": "mixtral"}, {}):
        del config["text_config"]["model_type"]
        config["text_config"] |= said
        (model / "config.json").write_text(json.dumps(config))
        assert torch.equal(streamed_logits(SourceModel(model)), want)
    config["text_config"]["swiglu_limit"] = 6.0
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitsmoeError, match=r"swiglu_limit is 6\.0, but only 7\.0 is supported"):
        SourceModel(model)


@pytest.mark.parametrize("hidden_act", ["swigluoai", "silu_clamp10"])
def test_a_name_of_the_format_is_none_of_config_json(hidden_act: str, tmp_path: Path) -> None:
    model = make_model("Qwen3MoeForCausalLM", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"hidden_act": hidden_act}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitsmoeError, match=f"hidden_act is '{hidden_act}', but only 'silu' or 'gelu_pytorch_tanh' is"):
        SourceModel(model)


def test_layers_of_mimo_must_be_those_that_transformers_builds() -> None:
    config = DEEPSEEK | {"architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash"}
    with pytest.raises(BitsmoeError, match=r"moe_layer_freq lists other layers than \(1,\)"):
        moe_shape(config | {"moe_layer_freq": [1, 1]}, "here")


def test_names_that_vllm_gives_experts() -> None:
    stored = ["model.layers.0.block_sparse_moe.experts", "model.layers.1.mlp.experts"]
    assert stored_prefix("model.layers.0.mlp.experts", stored) == stored[0]
    assert stored_prefix("model.layers.1.mlp.experts", stored) == stored[1]
    assert stored_prefix("model.layers.2.mlp.experts", stored) == "model.layers.2.mlp.experts"


def test_null_means_left_out() -> None:
    nothing = {"mlp_only_layers": None, "decoder_sparse_step": None, "first_k_dense_replace": None}
    assert moe_shape(QWEN | nothing, "here").layers == (0, 1)
    assert moe_shape(DEEPSEEK | nothing, "here").layers == (0, 1)


def test_more_experts_than_any_file_holds(tmp_path: Path) -> None:
    """config.json is not believed: no list of all that is missing, layers times experts long."""
    config = QWEN | {"num_hidden_layers": 10_000, "n_routed_experts": 2**31 - 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    with pytest.raises(BitsmoeError, match=r"layers\.0\.mlp\.experts\.0\.gate_proj\.weight is missing"):
        SourceModel(tmp_path)


def test_the_number_of_experts_may_have_another_familys_name() -> None:
    """As transformers 5 saves Qwen3-MoE; two names must agree."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu", "hidden_size": 8,
        "num_hidden_layers": 1, "vocab_size": 9, "moe_intermediate_size": 4, "num_local_experts": 6,
    }  # fmt: skip
    assert moe_shape(config, "here").num_experts == 6
    with pytest.raises(BitsmoeError, match="num_local_experts is 6, but num_experts 7"):
        moe_shape(config | {"num_experts": 7}, "here")


@pytest.mark.slow
def test_model_types_of_published_files(tmp_path: Path, calib: str) -> None:
    """Moonshot's files say `kimi_k2` where transformers has `deepseek_v3`; the result keeps what they say."""
    for architecture in ("DeepseekV3ForCausalLM", "KimiK25ForConditionalGeneration"):
        model = make_model(architecture, tmp_path / architecture)
        want = whole_logits(model)
        config = json.loads((model / "config.json").read_text())
        config.get("text_config", config)["model_type"] = "kimi_k2"
        (model / "config.json").write_text(json.dumps(config))
        assert torch.allclose(streamed_logits(SourceModel(model)), want, atol=2e-4)
        quantize_model(str(model), tmp_path / f"{architecture}-q", quick(calib))
        written = json.loads((tmp_path / f"{architecture}-q" / "config.json").read_text())
        assert written.get("text_config", written)["model_type"] == "kimi_k2"


@pytest.mark.parametrize(
    ("architecture", "changed", "said"),
    [
        ("AfmoeForCausalLM", {"score_func": "softmax"}, "score_func is 'softmax', but only 'sigmoid'"),
        ("AfmoeForCausalLM", {"num_dense_layers": ...}, r"lacks \['num_dense_layers'\]"),
        ("KimiLinearForCausalLM", {"moe_router_activation_func": "softmax"}, "only 'sigmoid' is supported"),
        ("KimiLinearForCausalLM", {"num_experts_per_token": 9999}, "num_experts_per_token is 9999"),
        ("Gemma4ForCausalLM", {"use_bidirectional_attention": "all"}, "only None or 'vision' is supported"),
        ("Gemma4ForCausalLM", {"top_k_experts": ...}, r"lacks \['top_k_experts'\]"),
        ("Gemma4ForCausalLM", {"hidden_size_per_layer_input": ...}, r"lacks \['hidden_size_per_layer_input'\]"),
        ("Gemma4ForCausalLM", {"num_experts": None, "enable_moe_block": False}, "not a Mixture-of-Experts model"),
        ("GraniteMoeHybridForCausalLM", {"num_local_experts": 0}, "not a Mixture-of-Experts model"),
    ],
)
def test_keys_that_others_read_are_checked(
    architecture: str, changed: dict[str, object], said: str, tmp_path: Path
) -> None:
    """Of vLLM or transformers; `...` takes the key away."""
    config = json.loads((make_model(architecture, tmp_path) / "config.json").read_text()) | changed
    config = {key: value for key, value in config.items() if value is not ...}
    with pytest.raises(BitsmoeError, match=said):
        moe_shape(config, "here")


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_cannot_be_quantized_says_why(architecture: str) -> None:
    with pytest.raises(BitsmoeError, match=re.escape(REFUSED[architecture])):
        moe_shape({"architectures": [architecture]}, "here")


@pytest.mark.slow
def test_every_other_architecture_of_transformers_is_refused_by_name() -> None:
    """Those whose default config names experts; none is taken for another."""
    known, seen = {family.model_type for family in FAMILIES.values()}, []
    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    for model_type, architecture in named.items():
        if model_type in known or not isinstance(architecture, str):
            continue
        try:
            config = json.loads(AutoConfig.for_model(model_type, architectures=[architecture]).to_json_string(False))
        except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError):  # needs more than its defaults
            continue
        if "expert" not in json.dumps(config):
            continue
        with pytest.raises(BitsmoeError, match=f"{architecture}'.* is not"):
            moe_shape(config, "here")
        seen.append(model_type)
    assert len(seen) > 15


def test_moe_layers_at_every_other_place_are_refused() -> None:
    config = {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_act": "silu", "hidden_size": 8,
        "num_hidden_layers": 4, "vocab_size": 9, "moe_intermediate_size": 4, "n_routed_experts": 6, "moe_layer_freq": 2,
    }  # fmt: skip
    with pytest.raises(BitsmoeError, match="moe_layer_freq is 2, but only 1 is supported"):
        moe_shape(config, "here")


def test_the_docs_have_the_table() -> None:
    """`python -m bitsmoe_kernels.models.families` prints it."""
    assert models_table() in (REPO / "docs" / "quantizing.md").read_text(encoding="utf-8")
