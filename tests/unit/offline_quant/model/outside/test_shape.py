"""Models outside the table: each is read right, or refused with the check that it failed. None is read wrong."""

import json
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu
from transformers import AutoConfig, core_model_loading
from transformers.activations import ACT2FN
from transformers.core_model_loading import WeightConverter
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from typer.testing import CliRunner

import outside
from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.safetensors_io import INDEX_FILE
from bitsmoe_kernels.models import families as table
from bitsmoe_kernels.models.families import FAMILIES, language_config
from families import (
    calibration_perplexity,
    family_cases,
    make_model,
    streamed_logits,
    to_float8,
    to_mixed_codes,
    whole_logits,
)
from offline_quant.checkpoint.dequantize import dequantize_checkpoint
from offline_quant.cli.commands import app
from offline_quant.config import QuantizeConfig
from offline_quant.model.outside import shape as derived
from offline_quant.model.probe import probe
from offline_quant.model.quantized import open_model
from offline_quant.model.source import SourceModel
from offline_quant.pipeline.quantize import quantize_model
from offline_quant.report.inspect import inspect_directory
from outside import ODD, OUTSIDE, make_outside, own_logits

RIGHT = (
    "Mistral4ForCausalLM", "Mistral3ForConditionalGeneration", "MiniMaxM3VLForCausalLM",
    "LlavaForConditionalGeneration", "InternVLForConditionalGeneration", "Lfm2VlForConditionalGeneration",
    "Qwen3OmniMoeThinkerForConditionalGeneration", "HYV4ForCausalLM",
)  # fmt: skip
REFUSED = {
    "InklingForCausalLM": ("experts", "shared_experts: it is not of the common kind"),
    "ZayaForCausalLM": ("decoder", "weights outside its modules: input_hidden_states_bias"),
    "AriaTextForCausalLM": ("experts", "is_transposed is True and is_concatenated True"),
    "DogeForCausalLM": ("experts", "no module with gate_up_proj"),
    "JetMoeForCausalLM": ("experts", "no module with gate_up_proj"),
    "DbrxForCausalLM": ("config.json", "num_hidden_layers is None"),
    "LongcatFlashForCausalLM": ("config.json", "num_hidden_layers is None"),
}
OTHER_NAMES = {"PhiMoEForCausalLM", "KimiK25ForConditionalGeneration"}
"""Of the table: published under another name than transformers' class has."""
OWN_DECODER = {"Llama4ForCausalLM", "Llama4ForConditionalGeneration"}
"""Of the table: transformers names no decoder."""


def nightly(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.nightly)


@pytest.fixture
def calib(tmp_path: Path) -> str:
    path = tmp_path / "calib.txt"
    path.write_text("She opened the door, and there stood her brother with the lamp in his hand. " * 40)
    return str(path)


@pytest.fixture(autouse=True)
def nothing_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is refused here fails a check, and not a list."""
    monkeypatch.setattr(table, "REFUSED", {})
    yield
    outside.CHANGES.clear()
    outside.convert_as()


def test_none_of_them_is_in_the_table() -> None:
    assert OUTSIDE.keys() == {*RIGHT, *REFUSED}
    assert not OUTSIDE.keys() & table._BY_NAME.keys()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", family_cases(FAMILIES))
def test_rows_of_the_table_can_be_derived(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family without its row. What is derived reads the same weights, names and shapes."""
    model = make_model(architecture, tmp_path / "model")
    want, row = whole_logits(model), SourceModel(model).shape
    known = {name: family for name, family in table._BY_NAME.items() if family.architecture != architecture}
    monkeypatch.setattr(table, "_BY_NAME", known)
    if architecture in OWN_DECODER:
        with pytest.raises(BitsmoeError, match=r"fails the check of its decoder"):
            SourceModel(model)
        return
    if architecture in OTHER_NAMES:
        with pytest.raises(BitsmoeError, match=r"fails the check of its class .*\n.*transformers builds"):
            SourceModel(model)
        return
    source = SourceModel(model)
    assert source.shape.family.tested == "derived"
    for name in ("layers", "num_experts", "hidden_size", "intermediate_size", "hidden_act"):
        assert getattr(source.shape, name) == getattr(row, name)
    for layer in row.layers:
        assert source.shape.prefix(layer) == row.prefix(layer)
        assert source.shape.family.top_k(language_config(source.config)) == 2
    assert torch.allclose(streamed_logits(source), want, atol=2e-4)


def turned_files(directory: Path) -> None:
    """Stacked matrices as Qwen3-VL is published."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    turned = {n: t.mT.contiguous() if ".experts." in n else t for n, t in tensors.items()}
    save_file(turned, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("architecture", "published"),
    [
        ("DeepseekV4ForCausalLM", to_mixed_codes),
        ("DeepseekV3ForCausalLM", to_float8),
        ("Qwen3VLMoeForConditionalGeneration", turned_files),
    ],
)
def test_published_forms(
    architecture: str, published: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is derived reads the same as the row."""
    model = make_model(architecture, tmp_path / "model")
    published(model)
    row = SourceModel(model)
    monkeypatch.setattr(table, "_BY_NAME", {})
    found = SourceModel(model)
    assert found.shape.family.tested == "derived"
    for layer in row.shape.layers:
        assert torch.equal(found.experts(layer).gate_up, row.experts(layer).gate_up)
        assert torch.equal(found.experts(layer).down, row.experts(layer).down)
    assert torch.equal(streamed_logits(found), streamed_logits(row))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [ODD, *RIGHT[:2], *(nightly(name) for name in RIGHT[2:])])
def test_a_model_is_quantized(
    architecture: str, tmp_path: Path, calib: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_outside(architecture, tmp_path / "model")
    assert torch.allclose(streamed_logits(SourceModel(model)), own_logits(model), atol=2e-4)
    config = QuantizeConfig(bits=4.5, calib=calib, calib_samples=4, calib_length=64, refine=0)
    report = quantize_model(str(model), tmp_path / "q", config).report
    said = " ".join(capsys.readouterr().err.split())
    assert said.count(f"nobody has tested {architecture}; ") == 1
    assert "not known to serve" in said
    assert "not known to serve" in (tmp_path / "q" / "README.md").read_text()
    assert all(0 < row.output_error < 0.02 for row in report.layers)
    assert report.sanity.perplexity_quantized == pytest.approx(calibration_perplexity(tmp_path / "q", calib), rel=1e-4)
    assert len(inspect_directory(tmp_path / "q").layers) == len(report.layers)
    dequantize_checkpoint(tmp_path / "q", tmp_path / "d", torch.float32)
    want = own_logits(tmp_path / "d")
    assert torch.allclose(streamed_logits(open_model(tmp_path / "q")), want, atol=2e-4)
    assert torch.allclose(streamed_logits(open_model(tmp_path / "d")), want, atol=2e-4)
    assert not torch.allclose(own_logits(model), want, atol=2e-2)


@pytest.mark.parametrize("architecture", REFUSED)
def test_a_model_is_refused_with_the_check_that_it_failed(architecture: str, tmp_path: Path) -> None:
    model = make_outside(architecture, tmp_path / "model")
    check, said = REFUSED[architecture]
    with pytest.raises(BitsmoeError, match=rf"outside the table, and fails the check of its {check}\b") as e:
        SourceModel(model)
    assert said in str(e.value)


def with_fewer_experts(model: Any) -> None:
    """The second layer has 5 of 8, and its router."""
    fewer = deepcopy(model.config)
    fewer.num_local_experts = 5
    model.model.layers[1].mlp = type(model.model.layers[1].mlp)(fewer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"budget": "model", "basis": "whitened"}, {"bits": 2.5, "tune": True}, {"bits": 2.5, "tune_model": True}],
    ids=str,
)
def test_layers_with_unequal_numbers_of_experts(options: dict[str, Any], tmp_path: Path, calib: str) -> None:
    outside.CHANGES.append(with_fewer_experts)
    model = make_outside(ODD, tmp_path / "model")
    source = SourceModel(model)
    assert [source.shape.of_layer(i).num_experts for i in source.shape.layers] == [8, 5, 8]
    assert source.shape.num_weights == 3 * (8 + 5 + 8) * 64 * 96
    assert torch.allclose(streamed_logits(source), own_logits(model), atol=2e-4)
    given = {"bits": 4.5, "calib": calib, "calib_samples": 4, "calib_length": 64, "refine": 0} | options
    report = quantize_model(str(model), tmp_path / "q", QuantizeConfig.model_validate(given)).report
    assert report.bpw <= given["bits"]
    assert report.sanity.perplexity_quantized == pytest.approx(calibration_perplexity(tmp_path / "q", calib), rel=1e-4)
    assert [layer.num_experts for layer in inspect_directory(tmp_path / "q").layers] == [8, 5, 8]
    dequantize_checkpoint(tmp_path / "q", tmp_path / "d", torch.float32)
    want = own_logits(tmp_path / "d")
    assert torch.allclose(streamed_logits(open_model(tmp_path / "q")), want, atol=2e-4)
    assert torch.allclose(streamed_logits(open_model(tmp_path / "d")), want, atol=2e-4)


def scaled(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = outside.ScaledExperts


def scaled_in_fast_code(model: Any) -> None:
    class Fast(MixtralExperts):
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            return 0.5 * MixtralExperts._apply_gate(self, gate_up)

    for layer in model.model.layers:
        layer.mlp.experts.__class__ = Fast


class Clamped(torch.nn.Module):
    """silu with a limit that no row knows."""

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        return silu(gate.clamp(max=50))


def acting(act: torch.nn.Module, layers: slice = slice(None)) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in model.model.layers[layers]:
            layer.mlp.experts.act_fn = act

    return change


def with_more_weights(model: Any) -> None:
    model.model.layers[1].mlp.experts.gain = torch.nn.Parameter(torch.ones(8))


def calls_otherwise(model: Any) -> None:
    block = type(model.model.layers[0].mlp)

    class Named(block):  # type: ignore[misc, valid-type]
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            _, weights, ids = self.gate(hidden.flatten(0, 1))
            return self.experts(hidden.flatten(0, 1), top_k_weights=weights, top_k_index=ids).view_as(hidden)

    model.model.layers[0].mlp.__class__ = Named


def routes_beyond(model: Any) -> None:
    class Beyond(type(model.model.layers[0].mlp.gate)):  # type: ignore[misc]
        def forward(self, hidden: torch.Tensor) -> Any:
            logits, weights, ids = super().forward(hidden)
            return logits, weights, ids.clone().fill_(self.num_experts)

    model.model.layers[1].mlp.gate.__class__ = Beyond


def remembers(model: Any) -> None:
    """A layer adds what an earlier one saw."""
    first, last = model.model.layers[0], model.model.layers[2]
    seen: list[torch.Tensor] = []
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    last.register_forward_hook(lambda module, args, out: out + seen[-1].mean())


def leaves_experts_out(model: Any) -> None:
    class Dense(type(model.model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    model.model.layers[1].mlp.__class__ = Dense


def swapped(entries: list[Any]) -> None:
    """Files call up what is the gate."""
    for i, entry in enumerate(entries):
        if isinstance(entry, WeightConverter) and len(entry.source_patterns) == 2:
            entries[i] = WeightConverter(entry.source_patterns[::-1], entry.target_patterns, entry.operations)


def turned(entries: list[Any]) -> None:
    """Matrices of experts are stacked along another axis."""
    for entry in entries:
        if isinstance(entry, WeightConverter):
            entry.operations[0].dim = 1


@pytest.mark.parametrize(
    ("change", "check", "said"),
    [
        (scaled, "formula", "layers.0.mlp.experts does not compute"),
        (scaled_in_fast_code, "formula", "layers.0.mlp.experts does not compute"),
        (acting(ACT2FN["gelu_pytorch_tanh"]), "formula", "computes gelu_pytorch_tanh, config.json says 'silu'"),
        (acting(ACT2FN["gelu_pytorch_tanh"], slice(1, 2)), "formula", "layers.1.mlp.experts does not compute"),
        (acting(ACT2FN["relu"]), "formula", "layers.0.mlp.experts does not compute"),
        (acting(ACT2FN["gelu"]), "formula", "layers.0.mlp.experts does not compute"),
        (acting(Clamped()), "formula", "layers.0.mlp.experts does not compute"),
        (with_more_weights, "experts", "it holds down_proj, gain, gate_up_proj"),
        (calls_otherwise, "forward pass", "experts are not called with"),
        (routes_beyond, "forward pass", "routed to experts that are not there"),
        (remembers, "forward pass", "decoder layer 2 differs"),
        (leaves_experts_out, "forward pass", r"experts of layers [1] are not called"),
    ],
    ids=lambda case: getattr(case, "__name__", None),
)
def test_a_class_that_computes_otherwise(change: Callable[[Any], None], check: str, said: str, tmp_path: Path) -> None:
    model = make_outside(ODD, tmp_path / "model")
    assert SourceModel(model).shape.family.tested == "derived"
    outside.CHANGES.append(change)
    with pytest.raises(BitsmoeError, match=rf"fails the check of its {check}\b") as e:
        SourceModel(model)
    assert said in str(e.value)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("layers.1.block_sparse_moe.experts.3.w2.weight", "experts.3.w2.weight is missing"),
        ("layers.1.block_sparse_moe.experts.0.w2.weight", "no stored tensor becomes down_proj"),
        ("layers.1.block_sparse_moe.experts.0.w1.weight", "are not gate, up and down of one expert"),
        ("layers.2.block_sparse_moe.gate.weight", "mlp.gate.weight is missing"),
        ("norm.weight", "model.norm.weight is missing"),
    ],
)
def test_files_that_lack_tensors(missing: str, said: str, tmp_path: Path, calib: str) -> None:
    model = make_outside(ODD, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors[f"model.{missing}"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BitsmoeError) as e:
        quantize_model(str(model), tmp_path / "q", QuantizeConfig(bits=2.5, calib=calib))
    assert said.replace("\n", " ") in str(e.value)


def test_names_are_transformers_own(tmp_path: Path) -> None:
    """Which matrix is the gate is not told by its name."""
    outside.convert_as(swapped)
    model = make_outside(ODD, tmp_path / "model")
    source = SourceModel(model)
    assert source.shape.family.projections == ("w3", "w1", "w2")
    assert torch.allclose(streamed_logits(source), own_logits(model), atol=2e-4)


def test_matrices_that_are_stacked_otherwise(tmp_path: Path) -> None:
    model = make_outside(ODD, tmp_path / "model")
    outside.convert_as(turned)
    with pytest.raises(BitsmoeError, match=r"does not make gate_up_proj of gate, up and down"):
        SourceModel(model)


def test_another_version_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_outside(ODD, tmp_path / "model")
    monkeypatch.setattr(core_model_loading, "rename_source_key", lambda name: name)
    with pytest.raises(BitsmoeError, match=r"its names .*\n.*does not say how it converts them \(.*positional"):
        SourceModel(model)


def test_a_class_without_conversion(tmp_path: Path) -> None:
    """transformers converts no names of classes that are not its own; such files hold what modules hold."""
    outside.convert_as(list.clear)
    model = make_outside(ODD, tmp_path / "model")
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(model / "model.safetensors")
    assert torch.allclose(streamed_logits(SourceModel(model)), own_logits(model), atol=2e-4)


def test_the_forward_pass_is_a_check_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_outside(ODD, tmp_path / "model")
    monkeypatch.setattr(derived, "tried_activation", lambda skeleton, shape: "gelu_pytorch_tanh")
    with pytest.raises(BitsmoeError, match=r"forward pass .*\n.*decoder layer 2 differs from transformers'"):
        SourceModel(model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["NewForCausalLM"]}, "builds OddForCausalLM from config.json, which names 'NewForCausalLM'"),
        ({"architectures": []}, "transformers builds OddForCausalLM from config.json, which has no architectures"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
        ({"num_local_experts": 1 << 20}, "num_local_experts is 1048576"),
        ({"num_attention_heads": [2, 2, 2]}, "num_attention_heads is [2, 2, 2]"),
        ({"max_position_embeddings": 1e30}, "max_position_embeddings is 1e+30"),
        ({"hidden_size": 1 << 20, "intermediate_size": 1 << 20}, "larger than any that is tried"),
        ({"num_attention_heads": 3}, "fails the check of its forward pass"),
        ({"num_experts_per_tok": 9}, "forward pass"),
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": "mystery"}, "has no class for model_type 'mystery', and code of a model's repository"),
        ({"model_type": "clip"}, "no language model of model_type 'clip'"),
    ],
)
def test_config_json_of_another_model(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = make_outside(ODD, tmp_path / "model")
    written = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(written))
    with pytest.raises(BitsmoeError) as e:
        SourceModel(model)
    assert said in str(e.value)


def test_quantize_names_the_check_before_it_looks_for_a_tokenizer(tmp_path: Path, calib: str) -> None:
    model = make_outside(ODD, tmp_path / "model")
    written = json.loads((model / "config.json").read_text()) | {"model_type": "mystery"}
    (model / "config.json").write_text(json.dumps(written))
    (model / "tokenizer.json").unlink()
    said = "fails the check of its class (passed before it: config.json):\n  - transformers "
    with pytest.raises(BitsmoeError, match=re.escape(said)) as e:
        quantize_model(str(model), tmp_path / "q", QuantizeConfig(bits=2.5, calib=calib))
    assert "tokenizer" not in str(e.value)
    assert not (tmp_path / "q").exists()


def test_probe_says_what_was_derived(tmp_path: Path) -> None:
    """From the index alone, and from the file where there is none."""
    model = make_outside("InternVLForConditionalGeneration", tmp_path / "model")
    whole = probe(str(model))
    assert (whole.tested, whole.models, whole.index) == ("derived", "outside the table", False)
    assert whole.derived is not None
    assert "experts at language_model.model.layers.0.mlp.experts, stored as gate_proj, up_proj" in whole.derived
    printed = CliRunner().invoke(app, ["probe", str(model)]).output
    assert "InternVLForConditionalGeneration (outside the table), can be quantized" in printed
    assert "Tested on small random models: by nobody; not known to serve" in printed
    assert f"Derived from transformers and checked: {whole.derived}" in printed
    names = dict.fromkeys(load_file(model / "model.safetensors"), "x")
    (model / "model.safetensors").unlink()
    with pytest.raises(BitsmoeError):
        probe(str(model))
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    found = probe(str(model))
    assert (found.derived, found.num_experts, found.index) == (whole.derived, 8, True)
    del names["language_model.model.layers.1.mlp.experts.5.up_proj.weight"]
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(BitsmoeError, match=r"experts\.5\.up_proj\.weight is missing"):
        probe(str(model))


def test_the_table_comes_first(tmp_path: Path) -> None:
    model = make_model("MixtralForCausalLM", tmp_path / "model")
    assert AutoConfig.from_pretrained(model).model_type == "mixtral"
    source = SourceModel(model)
    assert source.shape.family is FAMILIES["MixtralForCausalLM"]
    assert derived.untested(source.shape, "x") is None
    assert probe(str(model)).derived is None
