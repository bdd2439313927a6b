"""What is wrong with a source model, or unusual about it, is found before its weights are read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitsmoe_kernels.errors import BitsmoeError
from families import make_model
from offline_quant.config import QuantizeConfig
from offline_quant.evaluation.evaluate import evaluate
from offline_quant.model.download import resolve_model
from offline_quant.model.quantized import open_model
from offline_quant.model.source import SourceModel
from offline_quant.model.streaming import StreamedModel
from offline_quant.pipeline.quantize import quantize_model

TEXT = "The old man looked at the sea, and the sea was grey and quiet as the morning came up behind the hills. " * 40
Change = Callable[[dict[str, Tensor]], dict[str, Tensor] | None]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = make_model(architecture, tmp_path_factory.mktemp(architecture) / "model")
        return made[architecture]

    return get


@pytest.fixture
def model(originals: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a random model that a test may change."""

    def copy(architecture: str = "Qwen3MoeForCausalLM", **config: Any) -> Path:
        directory = Path(shutil.copytree(originals(architecture), tmp_path / "model"))
        edit_config(directory, **config)
        return directory

    return copy


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, change: Change) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file({k: v.clone() for k, v in tensors.items()}, directory / "model.safetensors", metadata={"format": "pt"})


def quantize(directory: Path, monkeypatch: pytest.MonkeyPatch | None = None, **options: Any) -> Path:
    """Quantize with little text; with `monkeypatch`, reading the weights is an error of the test."""
    text, out = directory.with_name("text.txt"), directory.with_name("quantized")
    text.write_text(TEXT, encoding="utf-8")
    if monkeypatch is not None:
        monkeypatch.setattr(SourceModel, "check_finite", lambda *_: pytest.fail("weights were read"))
    given = {"bits": 3.0, "calib": str(text), "calib_samples": 4, "calib_length": 64} | options
    quantize_model(str(directory), out, QuantizeConfig(**given))
    return out


def refusal(directory: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    with pytest.raises(BitsmoeError) as error:
        quantize(directory, monkeypatch, **options)
    assert not directory.with_name("quantized").exists()
    return str(error.value)


@pytest.mark.parametrize("value", [9, 0, -1, None, "2", 2.0, True, [2]])
def test_experts_per_token_that_cannot_be(
    value: Any, model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal(model(num_experts_per_tok=value), monkeypatch)
    assert f"num_experts_per_tok is {value!r}, but must be a whole number from 1 to" in said


@pytest.mark.parametrize(
    ("architecture", "config", "said"),
    [
        ("Qwen3MoeForCausalLM", {"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ("Qwen3MoeForCausalLM", {"max_position_embeddings": "512"}, "max_position_embeddings is '512'"),
        ("DeepseekV3ForCausalLM", {"n_group": 3}, "n_group is 3, which does not divide"),
        ("DeepseekV3ForCausalLM", {"topk_group": 9}, "topk_group is 9, more than n_group, 4"),
        ("DeepseekV3ForCausalLM", {"routed_scaling_factor": 1e30}, "routed_scaling_factor is 1e+30"),
        ("DeepseekV2ForCausalLM", {"topk_method": "x"}, "the model that config.json describes cannot be computed"),
        ("Qwen3MoeForCausalLM", {"pad_token_id": 99999}, "transformers cannot build the model"),
        ("Qwen3MoeForCausalLM", {"attn_implementation": "flash_attention_2"}, "transformers cannot build the model"),
        ("DeepseekV3ForCausalLM", {"model_type": "kimi_k3"}, "this model is not supported"),
        ("DeepseekV3ForCausalLM", {"moe_layer_freq": 2}, "this model is not supported"),
        ("Qwen3MoeForCausalLM", {"hidden_act": "gelu"}, "this model is not supported"),
    ],
)
def test_a_config_is_said_to_be_wrong_or_not_supported(
    architecture: str,
    config: dict[str, Any],
    said: str,
    model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    message = refusal(model(architecture, **config), monkeypatch)
    assert said in message
    assert ("cannot be right" in message) == (" is " in said and "this model" not in said)


def test_all_faults_are_said_at_once(model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each: device, text, tokenizer, experts. A user mends them in one go."""
    directory = model()
    (directory / "tokenizer.json").write_text("{")
    edit_tensors(
        directory, lambda t: {k: v for k, v in t.items() if k != "model.layers.1.mlp.experts.3.up_proj.weight"}
    )
    said = refusal(directory, monkeypatch, device="cuda:7", calib=str(directory / "no.txt"))
    for words in ("--device cuda:7", "no.txt: no such file", "no tokenizer can be loaded", "experts.3.up_proj.weight"):
        assert words in said, said


def test_a_tokenizer_of_another_model(model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ids go beyond the vocabulary: the text shows it, before the weights are read."""
    directory = model(vocab_size=64)

    def cut(tensors: dict[str, Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:64]

    edit_tensors(directory, cut)
    assert "but the model's vocab_size is 64" in refusal(directory, monkeypatch)


def test_experts_of_unequal_number(model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = model()
    gone = [f"model.layers.1.mlp.experts.{e}." for e in (6, 7)]
    edit_tensors(directory, lambda t: {k: v for k, v in t.items() if not k.startswith(tuple(gone))})
    said = refusal(directory, monkeypatch)
    assert "model.layers.1.mlp.experts: 6 experts are stored, config.json says 8" in said
    assert "it knows one number for all layers" in said


def test_more_experts_than_config_json_says(model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As pruning leaves it where the tensors stay; a router of eight does not fit either."""
    directory = model()
    edit_config(directory, num_experts=6, num_local_experts=6)
    assert "model.layers.0.mlp.experts: 8 experts are stored, config.json says 6" in refusal(directory, monkeypatch)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "language_model."])
def test_names_behind_a_prefix(prefix: str, model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = model()
    edit_tensors(directory, lambda t: {prefix + k: v for k, v in t.items()})
    said = refusal(directory, monkeypatch)
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    assert f"tensor {prefix}{name} should be called {name}" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
def test_names_with_a_wrapper_inside(wrapper: str, model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = model()
    edit_tensors(directory, lambda t: {k.replace(".mlp.", f".{wrapper}.mlp."): v for k, v in t.items()})
    name = "model.layers.0.{}mlp.experts.0.gate_proj.weight"
    said = refusal(directory, monkeypatch)
    assert f"tensor {name.format(f'{wrapper}.')} should be called {name.format('')}" in said


def test_an_adapter_that_is_not_merged(model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, name = model(), "model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_tensors(directory, lambda t: t.update({name: torch.ones(8, 64)}))
    assert f"tensor {name} belongs to a LoRA adapter: merge it" in refusal(directory, monkeypatch)


def test_a_name_too_long_for_what_is_made_beside_it(model: Callable[..., Path]) -> None:
    config = QuantizeConfig(bits=3.0, calib="self")
    directory = model()
    with pytest.raises(BitsmoeError, match="its last part has 250 bytes; use at most"):
        quantize_model(str(directory), directory.with_name("q" * 250), config)


def test_names_without_their_prefix(model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = model()
    edit_tensors(directory, lambda t: {k.removeprefix("model."): v for k, v in t.items()})
    name = "layers.0.mlp.experts.0.gate_proj.weight"
    assert f"tensor {name} should be called model.{name}" in refusal(directory, monkeypatch)


@pytest.mark.parametrize("name", ["0.gate_proj.bias", "0.gate_proj.weight_scale", "correction"])
def test_tensors_of_experts_that_are_no_matrix_of_theirs(
    name: str, model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = model()
    name = f"model.layers.1.mlp.experts.{name}"
    edit_tensors(directory, lambda t: t.update({name: torch.zeros(96)}))
    assert f"tensor {name} belongs to experts, but is no gate, up or down matrix" in refusal(directory, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
@pytest.mark.parametrize("part", ["self_attn.q_proj.weight", "mlp.gate.weight", "input_layernorm.weight"])
def test_codes_in_the_place_of_weights(
    dtype: torch.dtype, part: str, model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.json says nothing of a quantization, yet attention, say, is stored in codes."""
    directory, name = model(), f"model.layers.0.{part}"
    edit_tensors(directory, lambda t: t.update({name: t[name].float().round().to(dtype)}))
    said = refusal(directory, monkeypatch)
    assert f"tensor {name} is {str(dtype).removeprefix('torch.')}" in said
    assert "codes of some quantization" in said


@pytest.mark.parametrize("part", ["weight_scale", "qweight", "scales", "weight_zero_point", "g_idx", "weight_packed"])
def test_what_lies_beside_codes(part: str, model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, name = model(), f"model.layers.0.self_attn.q_proj.{part}"
    edit_tensors(directory, lambda t: t.update({name: torch.ones(1)}))
    assert f"tensor {name} lies beside model.layers.0.self_attn.q_proj" in refusal(directory, monkeypatch)


def test_codes_in_a_layer_that_is_copied(model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, name = model(), "model.layers.3.mlp.experts.0.gate_proj.weight"
    edit_tensors(directory, lambda t: t.update({name: torch.ones(96, 64, dtype=torch.int8)}))
    assert f"tensor {name} is int8[96, 64]: codes" in refusal(directory, monkeypatch)


@pytest.mark.slow
def test_tensors_that_are_passed_over_are_named(model: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A bias that config.json rules out: transformers and vLLM do not read it, so it is no fault; but it is said."""
    directory, name = model(), "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(
        directory, lambda t: t.update({name: torch.ones(64), "model.layers.0.self_attn.rotary.inv": torch.ones(2)})
    )
    quantize(directory)
    said = " ".join(capsys.readouterr().err.split())
    assert "stored, but not part of the model that config.json describes" in said
    assert name in said
    assert "passed over, as transformers and vLLM do" in said


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["other", "same", "none"])
def test_a_stored_head_counts_whatever_config_json_says_of_tying(stored: str, model: Callable[..., Path]) -> None:
    directory = model(tie_word_embeddings=True)

    def head(tensors: dict[str, Tensor]) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        del tensors["lm_head.weight"]
        if stored != "none":
            tensors["lm_head.weight"] = embedding.flip(0) if stored == "other" else embedding

    edit_tensors(directory, head)
    text = directory.with_name("text.txt")
    text.write_text(TEXT, encoding="utf-8")
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"])[:512][None]
    with torch.no_grad():
        logp = plain(ids).logits[:, :-1].log_softmax(-1)
    expected = float((-logp.gather(-1, ids[:, 1:, None])).mean().exp())
    assert evaluate(directory, text).perplexity == pytest.approx(expected, rel=1e-4)
    whole = StreamedModel(open_model(directory)).materialize()
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits[:, :-1].log_softmax(-1), logp, atol=1e-4, rtol=1e-4)


def test_a_tied_head_of_another_shape(model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = model(tie_word_embeddings=True)
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:-1]}))
    assert "tensor lm_head.weight is bfloat16[4095, 64], but the model needs" in refusal(directory, monkeypatch)


@pytest.mark.slow
def test_code_that_is_named_comes_along(model: Callable[..., Path]) -> None:
    directory = model("DeepseekV2ForCausalLM", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    (directory / "configuration_own.py").write_text(
        "from .constants_own import BASE\nfrom transformers.models.deepseek_v2 import DeepseekV2Config as Base\n"
        "class OwnConfig(Base):\n    base = BASE\n"
    )
    (directory / "constants_own.py").write_text("BASE = 3\n")
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            json.loads((directory / "tokenizer_config.json").read_text())
            | {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None], "AutoProcessor": "acme/other--proc.P"}}
        )
    )
    (directory / "tokenization_own.py").write_text("class Own: ...\n")
    (directory / "unrelated.py").write_text("raise SystemExit\n")
    out = quantize(directory)
    assert {p.name for p in out.glob("*.py")} == {"configuration_own.py", "constants_own.py", "tokenization_own.py"}
    assert json.loads((out / "config.json").read_text())["auto_map"] == {"AutoConfig": "configuration_own.OwnConfig"}


@pytest.mark.slow
def test_code_that_is_named_and_not_there(model: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = quantize(model(auto_map={"AutoConfig": "configuration_own.OwnConfig"}))
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert "configuration_own.py" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokenizer_other.json", "LICENSE"])
def test_side_files_that_lead_nowhere(name: str, model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = model()
    (directory / name).symlink_to("nowhere")
    assert f"{name} is missing" in refusal(directory, monkeypatch)


def test_a_tokenizer_that_loads_and_does_not_work(model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = model()
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "long"}))
    assert "no tokenizer can be loaded" in refusal(directory, monkeypatch)


def test_code_that_leads_elsewhere(model: Callable[..., Path], tmp_path: Path) -> None:
    directory = model(auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    (tmp_path / "secret").write_text("secret")
    (directory / "configuration_own.py").symlink_to("../secret")
    with pytest.raises(BitsmoeError, match=r"configuration_own\.py is a link to .*secret"):
        open_model(directory)


@pytest.mark.slow
def test_named_chat_templates_and_licenses_come_along(model: Callable[..., Path]) -> None:
    directory = model()
    (directory / "additional_chat_templates").mkdir()
    files = {
        "additional_chat_templates/tool_use.jinja": "{{ tools }}", "LICENSE": "terms", "LICENSE.txt": "terms 2",
        "NOTICE": "thanks", "USE_POLICY.md": "policy", "chat_template.jinja": "{{ messages }}",
    }  # fmt: skip
    for name, content in files.items():
        (directory / name).write_text(content)
    out = quantize(directory)
    assert {name: (out / name).read_text() for name in files} == files


@pytest.mark.slow
def test_a_revision_of_a_model_on_the_hub(
    model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = model()
    cache = tmp_path / "hub" / "models--acme--tiny"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(directory, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    (cache / "refs" / "dev").write_text("b" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve_model("acme/tiny").name == "a" * 40
    assert resolve_model("acme/tiny", "dev").name == "b" * 40
    assert resolve_model("acme/tiny", "b" * 40).name == "b" * 40
    with pytest.raises(BitsmoeError, match="acme/tiny at --revision nowhere"):
        resolve_model("acme/tiny", "nowhere")
    with pytest.raises(BitsmoeError, match=r"--revision dev: .* is a directory"):
        resolve_model(str(directory), "dev")
    with pytest.raises(BitsmoeError, match=f"folder of the Hub's cache; give .*{'a' * 40}, {'b' * 40}"):
        resolve_model(str(cache))
    text, out = tmp_path / "text.txt", tmp_path / "quantized"
    text.write_text(TEXT, encoding="utf-8")
    config = QuantizeConfig(bits=3.0, calib=str(text), calib_samples=4, calib_length=64)
    quantize_model("acme/tiny", out, config, revision="dev")
    card = (out / "README.md").read_text()
    assert "base_model: acme/tiny" in card
    assert f"| its commit | `{'b' * 40}` |" in card
