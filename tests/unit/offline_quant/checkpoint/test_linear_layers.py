"""Linear layers outside the experts at 8 and 4 bits, against compressed-tensors' reader and transformers' models."""

import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from typer.testing import CliRunner
from vllm.model_executor.kernels.linear import MPLinearLayerConfig
from vllm.scalar_type import scalar_types

from bitsmoe_kernels import format as format_package
from bitsmoe_kernels.errors import BitsmoeError, FormatError
from bitsmoe_kernels.format.checkpoint import Checkpoint
from bitsmoe_kernels.format.linear_layers import (
    _IN_LAYER,
    DenseConfig,
    DenseWeights,
    dense_linears,
    dequantize,
    pack,
    plain_specs,
    unpack,
)
from bitsmoe_kernels.format.schema import TensorSpec
from bitsmoe_kernels.models.families import FAMILIES
from bitsmoe_vllm import startup
from bitsmoe_vllm.config import BitsmoeConfig
from bitsmoe_vllm.linear_kernel import DequantizedLinearKernel
from builders import store_dense, vllm_config, write_tiny_qwen3_moe
from families import calibration_perplexity, make_model, streamed_logits, whole_logits
from offline_quant.checkpoint.dequantize import dequantize_checkpoint
from offline_quant.checkpoint.linear_layers import dense_plan, quantize_matrix
from offline_quant.cli.commands import app
from offline_quant.config import QuantizeConfig
from offline_quant.evaluation.evaluate import evaluate
from offline_quant.model.quantized import QuantizedModel, open_model
from offline_quant.model.source import SourceModel
from offline_quant.pipeline.quantize import quantize_model

SPEC = (Path(format_package.__file__).parent / "SPEC.md").read_text(encoding="utf-8")
TEXT = "She opened the door, and there stood her brother with the lamp in his hand. " * 60
BITS = (4, 8)
Q_PROJ, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def fenced(language: str) -> list[str]:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", SPEC, re.M | re.S)
    return found.splitlines()


def scheme(form: DenseWeights) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=form.model_dump(mode="json"))


# ---- words and matrices ----


@given(bits=st.sampled_from(BITS), rows=st.integers(1, 5), words=st.integers(1, 5), seed=st.integers(0, 99))
def test_words_are_those_of_compressed_tensors(bits: Any, rows: int, words: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, words * 32 // bits), generator=gen, dtype=torch.int8)
    codes[0, :2] = torch.tensor([-half, half - 1])
    packed = pack(codes, bits)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack(packed, bits), codes)
    assert torch.equal(unpack(packed, bits), unpack_from_int32(packed, bits, codes.shape))


def test_the_words_of_the_specification() -> None:
    for line in fenced("dense-words"):
        bits, codes, word = re.fullmatch(r"(\d) bits: (.*) -> ([0-9A-F]{8})", line).groups()
        row = torch.tensor([list(map(int, codes.split()))], dtype=torch.int8)
        assert f"{int(pack(row, int(bits))) & 0xFFFFFFFF:08X}" == word


def test_the_layers_of_the_specification() -> None:
    assert [tuple(line.split()) for line in fenced("dense-layers")] == [linear.names for linear in _IN_LAYER]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [128, None])
def test_a_matrix_is_what_compressed_tensors_makes_of_it(bits: Any, group: int | None) -> None:
    weight = torch.randn(24, 384, generator=torch.Generator().manual_seed(bits)) * 0.05
    form = DenseWeights(num_bits=bits, strategy="group" if group else "channel", group_size=group)
    codes, scale = quantize_matrix(weight, bits, group)
    assert {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in [("weight_scale", scale)]} == {
        "weight_scale": form.tensor_specs(24, 384)["weight_scale"]
    }
    stored = {
        "weight_packed": pack(codes, bits),
        "weight_scale": scale.float(),
        "weight_shape": torch.tensor([24, 384]),
    }
    theirs = PackedQuantizationCompressor.decompress(dict(stored), scheme(form))["weight"]
    assert torch.equal(dequantize(stored["weight_packed"], scale, form.num_bits), theirs)


# ---- scales ----


def brute_force(x: Tensor, bits: int) -> Tensor:
    """Least squared error of each group [n, size] over a fine scan of scales in bfloat16."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    best = torch.full((len(x),), torch.inf)
    for factor in torch.linspace(0.3, 1.05, 1200):
        s = (x.abs().amax(1, keepdim=True) / high * factor).bfloat16().float()
        best = torch.minimum(best, (((x / s).round().clamp(low, high) * s - x) ** 2).sum(1))
    return best


@pytest.mark.parametrize(("bits", "slack"), [(4, 1.01), (8, 1.04)])
@pytest.mark.parametrize("tail", ["normal", "heavy"])
def test_scales_are_close_to_the_best(bits: Any, slack: float, tail: str) -> None:
    """In sum within `slack` of a fine scan, and better than no search."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    x = x if tail == "normal" else x.sign() * x.abs() ** 2
    codes, scale = quantize_matrix(x, bits, None)
    error = (codes * scale.float() - x).square().sum()
    assert error <= slack * brute_force(x, bits).sum()
    plain = x.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert error < ((x / plain).round() * plain - x).square().sum()


@pytest.mark.parametrize("bits", BITS)
def test_what_can_be_represented_is_kept(bits: Any) -> None:
    gen = torch.Generator().manual_seed(0)
    half = 1 << (bits - 1)
    codes = torch.randint(-half + 1, half, (8, 256), generator=gen, dtype=torch.int8)
    codes[:, ::128] = half - 1
    scale = torch.tensor([2.0**-k for k in range(16)]).view(8, 2).bfloat16()
    weight = codes * scale.float().repeat_interleave(128, 1)
    assert torch.equal(dequantize(pack(codes, bits), scale, bits), weight)
    found, scales = quantize_matrix(weight, bits, 128)
    assert torch.equal(found, codes)
    assert torch.equal(scales, scale)


FORMS = {bits: DenseWeights(num_bits=bits, strategy="group", group_size=128) for bits in BITS}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_zeros_outliers_and_tiny_numbers(bits: Any, dtype: torch.dtype) -> None:
    weight = torch.zeros(4, 256, dtype=dtype)
    weight[1] = 1e-7
    weight[2, 3] = 60_000.0
    weight[3] = 0.01
    weight[3, 130] = -5.0
    codes, scale = quantize_matrix(weight, bits, 128)
    assert bool((scale > 0).all())
    assert bool(scale.isfinite().all())
    back = dequantize(pack(codes, bits), scale, bits)
    assert not back[0].any()
    assert torch.allclose(back[1], weight[1].float(), rtol=0.01, atol=0)
    assert back[2, 3] == pytest.approx(60_000, rel=0.07 if bits == 4 else 0.01)
    assert torch.allclose(back[3, :128], weight[3, :128].float(), rtol=0.01)


# ---- which layers ----


OWN_NAMES = ("DeepseekV4ForCausalLM", "NemotronHForCausalLM")
"""Architectures whose files call every linear layer otherwise: `--dense-bits` is refused."""


@pytest.mark.parametrize("architecture", OWN_NAMES)
def test_linear_layers_of_other_names_are_refused(architecture: str, tmp_path: Path) -> None:
    source = SourceModel(make_model(architecture, tmp_path / "model"))
    with pytest.raises(BitsmoeError, match=r"--dense-bits 4: .* has no linear layers of known names"):
        dense_plan(source, 4)


@pytest.mark.parametrize(
    "architecture", [name for name, family in FAMILIES.items() if not family.text and name not in OWN_NAMES]
)
def test_every_linear_layer_but_the_named_exceptions(architecture: str, tmp_path: Path) -> None:
    """By the modules of transformers' own model. Engines compute together what has one input."""
    model = make_model(architecture, tmp_path / "model")
    source = SourceModel(model)
    with torch.device("meta"):
        modules = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    kept = (
        r"\.(kv_b_proj|in_proj_(ba|a|b)|shared_expert_gate|gate|gate\.wg|router|router\.proj|g_proj|indexer\.\w+|experts"
        r"|conv\.\w+|mamba\.\w+|self_attn\.gate_proj|forget_gate\.\w+|g_[ab]_proj|b_proj|\w+_layernorm\.mlp\.\w+"
        r"|self_attn\.(output_gate|qkv_proj)|shared_mlp\.(input|output)_linear|feed_forward\.shared_expert\.\w+)$"
    )
    expected = {
        FAMILIES[architecture].stored_name(name)
        for name, module in modules.named_modules()
        if isinstance(module, nn.Linear) and not re.search(kept, name)
    } - ({"lm_head"} if architecture == "Qwen3NextForCausalLM" else set())
    linears = list(dense_linears(source.config, source.tensors.specs))
    found = [name for linear in linears for name in linear.names]
    assert sorted(found) == sorted(expected)
    for linear in linears:
        assert len({source.tensors.specs[f"{name}.weight"].shape[1] for name in linear.names}) == 1


def test_a_tied_head_and_layers_beyond_the_last_stay() -> None:
    names = {f"model.layers.{i}.self_attn.o_proj.weight": None for i in range(3)} | {"lm_head.weight": None}
    config: dict[str, Any] = {"num_hidden_layers": 2}
    assert [n for linear in dense_linears(config, names) for n in linear.names] == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
        "lm_head",
    ]
    assert all(linear.names != ("lm_head",) for linear in dense_linears(config | {"tie_word_embeddings": True}, names))
    with pytest.raises(BitsmoeError, match="num_hidden_layers is None"):
        list(dense_linears({}, names))


# ---- a model through the commands ----


def succeed(*args: object) -> str:
    """Run a command; returns its standard output, lines unwrapped."""
    done = CliRunner().invoke(app, list(map(str, args)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return " ".join(done.stdout.split())


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With shared experts, a dense first layer and matrices of latent attention."""
    return make_model("DeepseekV2ForCausalLM", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module", params=BITS)
def quantized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path, calib: Path
) -> Path:
    out = tmp_path_factory.mktemp("q") / f"at{request.param}"
    options = ("--calib", calib, "--calib-samples", 4, "--calib-length", 64, "--refine", 0)
    printed = succeed("quantize", model, "--bits", 4.5, "--dense-bits", request.param, "--out", out, *options)
    assert f"linear layers outside the experts at {request.param} bits" in printed
    return out


@pytest.mark.slow
def test_the_quantized_model_is_its_dequantized_one(quantized: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    dequantize_checkpoint(quantized, plain, torch.float32)
    assert torch.allclose(streamed_logits(open_model(quantized)), whole_logits(plain), atol=2e-4)


@pytest.mark.slow
def test_each_matrix_is_what_compressed_tensors_reads(quantized: Path, model: Path, tmp_path: Path) -> None:
    """Everything else is the original's, bit for bit."""
    dequantize_checkpoint(quantized, tmp_path / "plain", torch.float32)
    plain, before, stored = (load_file(d / "model.safetensors") for d in (tmp_path / "plain", model, quantized))
    dense = Checkpoint(quantized).dense()
    bits = 4 if quantized.name == "at4" else 8
    assert {form.num_bits for form in dense.matrices.values()} == {bits}
    assert "model.layers.0.self_attn.kv_b_proj" not in dense.matrices
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if ".experts." in name:
            continue
        if (form := dense.matrices.get(module)) is None:
            assert torch.equal(stored[name], tensor)
            continue
        assert name not in stored
        parts = {key.rpartition(".")[2]: value for key, value in stored.items() if key.startswith(f"{module}.")}
        assert {k: TensorSpec(t.dtype, tuple(t.shape)) for k, t in parts.items()} == form.tensor_specs(*tensor.shape)
        parts["weight_scale"] = parts["weight_scale"].float()
        assert torch.equal(PackedQuantizationCompressor.decompress(parts, scheme(form))["weight"], plain[name])
        error = (plain[name] - tensor.float()).norm() / tensor.float().norm()
        assert error < (0.12 if bits == 4 else 0.007)


@pytest.mark.slow
def test_inspect_and_report_count_the_bytes_of_the_files(quantized: Path) -> None:
    data = json.loads(succeed("inspect", quantized, "--json"))
    stored = load_file(quantized / "model.safetensors")
    figures = data["dense_layers"]
    matrices = {name.rpartition(".")[0] for name in stored if name.endswith("weight_packed")}
    size = sum(t.nbytes for name, t in stored.items() if name.rpartition(".")[0] in matrices)
    weights = sum(int(stored[f"{name}.weight_shape"].prod()) for name in matrices)
    bits = 4 if quantized.name == "at4" else 8
    assert figures == {
        "bits": [bits], "matrices": len(matrices), "weights": weights, "bytes": size,
        "bits_per_weight": 8 * size / weights,
    }  # fmt: skip
    assert bits < figures["bits_per_weight"] < bits + 0.3
    assert data["expert_bytes"] + figures["bytes"] + data["other_bytes"] == sum(t.nbytes for t in stored.values())
    assert data["bpw"] <= 4.5  # of the experts alone
    report = json.loads((quantized / "bitsmoe_report.json").read_text())
    assert report["dense_layers"] == figures
    assert f"at {bits} bits: {size / 1e6:.2f} MB" in (quantized / "report.html").read_text()
    assert f"{figures['bits_per_weight']:.4f} bits per weight with scales" in succeed("inspect", quantized)


@pytest.mark.slow
def test_what_stays_at_16_bits_is_named(tmp_path: Path, calib: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_model("GraniteMoeSharedForCausalLM", tmp_path / "granite")
    config = QuantizeConfig(bits=4.5, calib=str(calib), calib_samples=4, calib_length=64, refine=0, dense_bits=8)
    quantize_model(str(source), tmp_path / "q", config)
    said = " ".join("".join(capsys.readouterr()).split())
    assert "--dense-bits 8 leaves these at 16 bits in every layer: block_sparse_moe.router.layer, " in said
    assert "shared_mlp.input_linear, shared_mlp.output_linear" in said
    assert "self_attn" not in said


@pytest.mark.slow
def test_evaluation_and_the_sanity_gate_see_the_rounding(quantized: Path, model: Path, calib: Path) -> None:
    """The gate's two perplexities are those of the model before and of the checkpoint as it was written."""
    report = json.loads((quantized / "bitsmoe_report.json").read_text())["sanity"]
    assert report["perplexity_original"] == pytest.approx(calibration_perplexity(model, calib), rel=1e-4)
    assert report["perplexity_quantized"] == pytest.approx(calibration_perplexity(quantized, calib), rel=1e-4)
    found = evaluate(quantized, calib, model)
    assert found.bpw <= 4.5
    assert 0 < found.kl < (0.5 if quantized.name == "at4" else 0.1)


@pytest.mark.slow
def test_without_the_option_nothing_changes(model: Path, calib: Path, tmp_path: Path) -> None:
    config = QuantizeConfig(bits=4.5, calib=str(calib), calib_samples=4, calib_length=64, refine=0)
    outcome = quantize_model(str(model), tmp_path / "q", config)
    assert outcome.report.dense_layers is None
    checkpoint = Checkpoint(tmp_path / "q")
    assert checkpoint.dense() is None
    assert checkpoint.config.linear_quantization is None
    assert not [name for name in checkpoint.tensors if name.endswith("weight_packed")]
    assert json.loads(succeed("inspect", tmp_path / "q", "--json"))["dense_layers"] is None


@pytest.mark.parametrize("bits", [5, 2, 0])
def test_other_widths_are_refused(bits: int, model: Path, tmp_path: Path) -> None:
    with pytest.raises(BitsmoeError, match=f"--dense-bits {bits}: Input should be 4, 8 or 16"):
        succeed("quantize", model, "--bits", 4.5, "--dense-bits", bits, "--out", tmp_path / "q")


def test_shapes_that_cannot_be_packed_are_refused_before_any_work(tmp_path: Path) -> None:
    specs = {
        "model.layers.0.self_attn.o_proj.weight": TensorSpec(torch.bfloat16, (64, 36)),
        "model.layers.0.mlp.down_proj.weight": TensorSpec(torch.bfloat16, (64, 70)),
        "model.layers.0.self_attn.q_proj.weight": TensorSpec(torch.bfloat16, (64, 64)),
    }
    shape, config = SimpleNamespace(family=FAMILIES["Qwen3MoeForCausalLM"]), {"num_hidden_layers": 1}
    source: Any = SimpleNamespace(config=config, shape=shape, tensors=SimpleNamespace(specs=specs), directory=tmp_path)
    with pytest.raises(BitsmoeError) as caught:
        dense_plan(source, 4)
    assert "--dense-bits 4: cannot store, so use --dense-bits 16" in str(caught.value)
    assert "o_proj.weight is bfloat16[64, 36]; a matrix with a multiple of 8 columns is needed" in str(caught.value)
    assert "down_proj.weight" in str(caught.value)
    assert "q_proj" not in str(caught.value)
    with pytest.raises(BitsmoeError, match="down_proj") as caught:
        dense_plan(source, 8)
    assert "o_proj" not in str(caught.value)  # 36 columns are 9 words of 4
    assert dense_plan(source, 16) is None
    source.tensors = SimpleNamespace(specs={})
    with pytest.raises(BitsmoeError, match="no linear layers of known names outside its routed experts"):
        dense_plan(source, 4)


# ---- what a reader refuses ----


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A Qwen3-MoE whose layers outside the experts have 4 bits; hidden size 256, so that groups are there."""
    directory = tmp_path / "checkpoint"
    write_tiny_qwen3_moe(directory, hidden_size=256)
    store_dense(directory, 4)
    return directory


def change_tensors(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def change_linear(directory: Path, change: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"]["linear_quantization"])
    (directory / "config.json").write_text(json.dumps(config))


def readers(directory: Path) -> list[Any]:
    """All that open a checkpoint, as functions."""
    hf_config = AutoConfig.from_pretrained(directory)
    return [
        lambda: QuantizedModel(directory),
        lambda: Checkpoint(directory).plain_tensors(),
        lambda: startup.check_checkpoint(directory, hf_config),
    ]


def test_a_sound_checkpoint_is_read(checkpoint: Path, tmp_path: Path) -> None:
    for read in readers(checkpoint):
        read()
    write_tiny_qwen3_moe(tmp_path / "other", hidden_size=256)
    meaning = store_dense(tmp_path / "other", 8)
    tensors = QuantizedModel(tmp_path / "other").tensors
    assert len(meaning) == 8
    for name, weight in meaning.items():
        assert torch.equal(tensors.get(name), weight)


def set_weight(key: str, value: Any) -> Any:
    def change(linear: dict[str, Any]) -> None:
        linear["config_groups"]["group"]["weights"][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q: q.update(quant_method="gptq"), "linear_quantization.quant_method: .*'gptq'"),
        (lambda q: q.pop("format"), "linear_quantization.format: Field required"),
        (lambda q: q.update(format="int-quantized"), "linear_quantization.format: .*'int-quantized'"),
        (lambda q: q.update(ignore=["lm_head"]), "linear_quantization.ignore: Extra inputs"),
        (lambda q: q.update(config_groups={}), "linear_quantization.config_groups: "),
        (set_weight("num_bits", 3), "weights.num_bits: .*3"),
        (set_weight("num_bits", 4.0), "weights.num_bits: must be an integer"),
        (set_weight("group_size", 64), "group_size is 64, but strategy 'group' goes with 128"),
        (set_weight("strategy", "tensor"), "weights.strategy: .*'tensor'"),
        (set_weight("symmetric", False), "weights.symmetric: .*False"),
        (set_weight("zero_point", True), "weights.zero_point: Extra inputs"),
        (lambda q: q["config_groups"]["group"].update(targets=[]), "targets: "),
        (
            lambda q: q["config_groups"]["group"].update(targets=[*q["config_groups"]["group"]["targets"], Q_PROJ]),
            f"targets named twice: {Q_PROJ}",
        ),
        (
            lambda q: q["config_groups"]["group"]["targets"].remove(Q_PROJ),
            f"tensor {Q_PROJ}.weight_packed is there, though linear_quantization does not name {Q_PROJ}",
        ),
        (
            lambda q: q["config_groups"]["group"]["targets"].append(DOWN),
            f"tensor {DOWN}.weight_packed is missing, though linear_quantization names {DOWN}",
        ),
        (
            lambda q: q["config_groups"]["group"]["targets"].append("re:.*o_proj"),
            "tensor re:.*o_proj.weight_packed is missing",
        ),
    ],
)
def test_a_linear_quantization_that_does_not_fit_is_refused(change: Any, said: str, checkpoint: Path) -> None:
    change_linear(checkpoint, change)
    for read in readers(checkpoint):
        with pytest.raises(FormatError) as caught:
            read()
        text = re.sub(r"\s+", " ", str(caught.value))
        assert re.search(re.escape(said) if "re:" in said else said, text), text


def drop_scale(t: dict[str, Tensor]) -> None:
    del t[f"{Q_PROJ}.weight_scale"]


def leave_weight(t: dict[str, Tensor]) -> None:
    t[f"{Q_PROJ}.weight"] = torch.zeros(64, 256)


def half_scales(t: dict[str, Tensor]) -> None:
    t[f"{Q_PROJ}.weight_scale"] = t[f"{Q_PROJ}.weight_scale"].half()


def cut_scales(t: dict[str, Tensor]) -> None:
    t[f"{Q_PROJ}.weight_scale"] = t[f"{Q_PROJ}.weight_scale"][:, :1].contiguous()


def cut_words(t: dict[str, Tensor]) -> None:
    t[f"{Q_PROJ}.weight_packed"] = t[f"{Q_PROJ}.weight_packed"][:, :-1].contiguous()


def flat_words(t: dict[str, Tensor]) -> None:
    t[f"{Q_PROJ}.weight_packed"] = t[f"{Q_PROJ}.weight_packed"].flatten()


def fewer_groups(t: dict[str, Tensor]) -> None:
    """A sound matrix, but not of the model's size."""
    t[f"{Q_PROJ}.weight_packed"] = t[f"{Q_PROJ}.weight_packed"][:, :16].contiguous()
    cut_scales(t)
    t[f"{Q_PROJ}.weight_shape"][1] = 128


def other_shape(t: dict[str, Tensor]) -> None:
    t[f"{Q_PROJ}.weight_shape"] = torch.tensor([64, 255])


def infinite_scale(t: dict[str, Tensor]) -> None:
    t[f"{Q_PROJ}.weight_scale"][3, 1] = torch.inf


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (drop_scale, f"tensor {Q_PROJ}.weight_scale is missing"),
        (leave_weight, f"tensor {Q_PROJ}.weight is there, though linear_quantization says that {Q_PROJ} is quantized"),
        (half_scales, "weight_scale is float16[64, 2], but bfloat16[64, 2] goes with weight_packed int32[64, 32]"),
        (cut_scales, "weight_scale is bfloat16[64, 1], but bfloat16[64, 2] goes with weight_packed int32[64, 32]"),
        (cut_words, "weight_packed is int32[64, 31]: 248 columns in groups of 128"),
        (flat_words, "weight_packed is int32[2048], but"),
        (fewer_groups, f"{Q_PROJ}.weight is float32[64, 128], but the model needs shape [64, 256]"),
        (other_shape, f"tensor {Q_PROJ}.weight_shape says [64, 255], but the matrix is [64, 256]"),
        (infinite_scale, f"tensor {Q_PROJ}.weight_scale has values that are not finite"),
    ],
)
def test_damaged_tensors_are_refused(damage: Any, said: str, checkpoint: Path, calib: Path) -> None:
    """By `bitsmoe eval`, and by the server where it can tell before it loads."""
    change_tensors(checkpoint, damage)
    with pytest.raises(BitsmoeError, match=re.escape(said)):
        evaluate(checkpoint, calib)
    if damage not in (other_shape, infinite_scale):
        with pytest.raises(FormatError, match=re.escape(said)):
            startup.check_checkpoint(checkpoint, AutoConfig.from_pretrained(checkpoint))


def test_layers_computed_as_one_must_be_stored_alike_and_nothing_else_stored() -> None:
    def config(*targets: str) -> DenseConfig:
        group = {"targets": targets, "weights": {"num_bits": 8, "strategy": "channel"}}
        return DenseConfig.parse(
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": group}}, "here"
        )

    attention = "model.layers.0.self_attn"
    specs = {f"{attention}.{n}_proj.weight": TensorSpec(torch.bfloat16, (8, 16)) for n in "qkv"}
    q = {f"{attention}.q_proj.{part}": spec for part, spec in FORMS_CHANNEL.tensor_specs(8, 16).items()}
    gate = {f"model.layers.0.mlp.gate.{part}": spec for part, spec in FORMS_CHANNEL.tensor_specs(8, 16).items()}
    del specs[f"{attention}.q_proj.weight"]
    _, faults = plain_specs(
        config(f"{attention}.q_proj", "model.layers.0.mlp.gate"), {"num_hidden_layers": 1}, specs | q | gate
    )
    assert faults == [
        f"linear_quantization: {attention}.q_proj, {attention}.k_proj, {attention}.v_proj are computed as one, so must "
        "be stored alike",
        "linear_quantization: model.layers.0.mlp.gate is no linear layer that can be quantized",
    ]


FORMS_CHANNEL = DenseWeights(num_bits=8, strategy="channel")


# ---- the server, before it starts a worker ----


TEXT_CONFIG = PretrainedConfig(hidden_act="silu", num_attention_heads=2, num_hidden_layers=2)


@pytest.fixture
def only_vllm_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM has its kernel for 4 bits, whatever this processor is, and ours takes nothing: as on a GPU."""
    monkeypatch.setattr(DequantizedLinearKernel, "can_implement", lambda _: (False, "left out"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
def test_they_are_served_on_a_cpu(dtype: torch.dtype, bits: int, tmp_path: Path) -> None:
    write_tiny_qwen3_moe(tmp_path / "model")
    store_dense(tmp_path / "model", bits)
    config = vllm_config(dtype)
    startup.check_options(Checkpoint(tmp_path / "model").config, TEXT_CONFIG, config)
    startup.check_checkpoint(tmp_path / "model", AutoConfig.from_pretrained(tmp_path / "model"), config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns"), [(24, 384), (5, 40)])
def test_what_vllm_has_no_kernel_for_is_dequantized(
    rows: int, columns: int, bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both widths without vLLM's function, as in its library for AVX2; and what is left of them with it."""
    fields = {"full_weight_shape": (columns, rows), "partition_weight_shape": (columns, rows), "act_type": dtype}
    weight_type = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}[bits]
    described = MPLinearLayerConfig(**fields, weight_type=weight_type, group_size=-1, zero_points=False)
    functions = SimpleNamespace(cpu_gemm_wna16=None)
    monkeypatch.setattr(torch.ops, "_C", functions)
    takes_it = bits == 4 and columns % 32 == 0 and rows % 32 == 0
    assert DequantizedLinearKernel.can_implement(described)[0] is not takes_it
    del functions.cpu_gemm_wna16
    assert DequantizedLinearKernel.can_implement(described)[0]
    g = torch.Generator().manual_seed(rows)
    weight, x = torch.randn(rows, columns, generator=g), torch.randn(3, columns, generator=g).to(dtype)
    codes, scale = quantize_matrix(weight, bits, 128 if columns % 128 == 0 else None)
    layer = nn.Module()
    layer.weight_packed = nn.Parameter(pack(codes, bits), requires_grad=False)
    layer.weight_scale = nn.Parameter(scale.to(dtype), requires_grad=False)
    kernel = DequantizedLinearKernel(described, "weight_packed", "weight_scale")
    kernel.process_weights_after_loading(layer)
    exact = (codes.view(*scale.shape, -1).double() * scale.to(dtype).double()[..., None]).view(weight.shape)
    bias = torch.randn(rows, generator=g).to(dtype)
    found, wanted = kernel.apply_weights(layer, x, bias).double(), x.double() @ exact.T + bias.double()
    assert float((found - wanted).norm() / wanted.norm()) < 4 * torch.finfo(dtype).eps


@pytest.mark.slow
@pytest.mark.usefixtures("only_vllm_kernels")
def test_eight_bits_without_a_kernel_and_float32_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BitsmoeError, match=r"at 4 bits .*: serve with --dtype bfloat16, not float32"):
        startup.check_options(Checkpoint(checkpoint).config, TEXT_CONFIG, vllm_config(torch.float32))
    write_tiny_qwen3_moe(tmp_path / "eight")
    store_dense(tmp_path / "eight", 8)
    with pytest.raises(BitsmoeError, match=r"at 8 bits .* no kernel on this platform: serve on a GPU, or .* 16 or 4 "):
        startup.check_options(Checkpoint(tmp_path / "eight").config, TEXT_CONFIG, vllm_config())


@pytest.mark.usefixtures("only_vllm_kernels")
@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        (1, None),
        # o_proj has 64 inputs and a scale for each row; q, k, v have 64 + 32 + 32 outputs, one KV head for both ranks.
        (2, None),
        (4, r"o_proj and 1 more: .*Input size \(16\)"),
    ],
)
def test_parts_that_no_kernel_takes_are_refused(ranks: int, said: str | None, checkpoint: Path) -> None:
    config = vllm_config(tensor_parallel_size=ranks)
    hf_config = AutoConfig.from_pretrained(checkpoint)
    if said is None:
        startup.check_checkpoint(checkpoint, hf_config, config)
        return
    with pytest.raises(BitsmoeError, match=said) as caught:
        startup.check_checkpoint(checkpoint, hf_config, config)
    assert "serve with fewer tensor-parallel ranks, or quantize with --dense-bits 16" in str(caught.value)


def test_a_group_of_columns_is_not_divided(checkpoint: Path, tmp_path: Path) -> None:
    dense = Checkpoint(checkpoint).dense()
    name = "model.layers.0.self_attn.o_proj"
    only = DenseConfig.parse(
        dense.dump() | {"config_groups": {"g": {"targets": [name], "weights": FORMS[4].model_dump()}}}, "here"
    )
    specs = {f"{name}.weight": TensorSpec(torch.float32, (256, 384))}
    config = {"num_hidden_layers": 1}
    startup.check_linear_kernels(only, config, specs, vllm_config(tensor_parallel_size=3))
    with pytest.raises(BitsmoeError, match=r"--tensor-parallel-size 2: 192 columns for a rank, in groups of 128"):
        startup.check_linear_kernels(only, config, specs, vllm_config(tensor_parallel_size=2))


def test_a_vocabulary_is_padded_and_shared_experts_may_be_whole() -> None:
    """As vLLM does: 100 rows become 128, of which a rank of two has 64."""
    names = ("lm_head", "model.layers.0.mlp.shared_expert.down_proj")
    group = {"targets": names, "weights": {"num_bits": 4, "strategy": "group", "group_size": 128}}
    dense = DenseConfig.parse(
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": group}}, "here"
    )
    specs = {
        f"{name}.weight": TensorSpec(torch.float32, (rows, 384)) for name, rows in zip(names, (100, 64), strict=True)
    }
    config = {"num_hidden_layers": 1}
    startup.check_linear_kernels(dense, config, specs, vllm_config())
    with pytest.raises(BitsmoeError, match=r"shared_expert\.down_proj: --tensor-parallel-size 2: 192 columns"):
        startup.check_linear_kernels(dense, config, specs, vllm_config(tensor_parallel_size=2))
    whole = vllm_config(tensor_parallel_size=2, enable_expert_parallel=True)
    startup.check_linear_kernels(dense, config, specs, whole)


def test_the_plugin_hands_linear_layers_to_vllm_and_survives_being_sent(checkpoint: Path) -> None:
    data = Checkpoint(checkpoint).config.dump()
    before = json.dumps(data)
    config = pickle.loads(pickle.dumps(BitsmoeConfig(data)))
    assert config.dense.get_name() == "compressed-tensors"
    assert set(config.dense.target_scheme_map) == set(Checkpoint(checkpoint).dense().matrices)
    assert json.dumps(data) == before
    assert BitsmoeConfig(data | {"linear_quantization": None}).dense is None
