"""A bitsmoe checkpoint in transformers: refused without this package, and with it the dequantized model's logits."""

import copy
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import bitsmoe
from bitsmoe import hf_quantizer
from bitsmoe.hf_quantizer import BitsmoeConfig, BitsmoeExperts, BitsmoeQuantizer
from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.checkpoint import WEIGHTS_KEY, WEIGHTS_NOTE
from bitsmoe_kernels.format.linear_layers import DenseBits
from bitsmoe_kernels.models.families import FAMILIES
from builders import FORMS, REPO, store_dense, write_tiny_qwen3_moe
from families import IDS, class_of, family_cases, make_quantized, whole_logits
from offline_quant.checkpoint.dequantize import dequantize_checkpoint

QWEN, MIXTRAL = "Qwen3MoeForCausalLM", "MixtralForCausalLM"
EXPERTS = "model.layers.0.mlp.experts"
MAX_ERROR = 1e-4
"""Of a logit in float32, where they are about 4."""


def dequantized(directory: Path) -> Path:
    """The ordinary checkpoint of a quantized one, beside it."""
    out = directory.with_name(f"{directory.name}-plain")
    dequantize_checkpoint(directory, out, torch.float32)
    return out


def load(directory: Path | str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype, **options).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quantized(QWEN, tmp_path_factory.mktemp("transformers") / "quantized", "shared_basis")


@pytest.fixture(scope="module")
def plain(quantized: Path) -> Path:
    return dequantized(quantized)


@pytest.fixture
def own(quantized: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(quantized, tmp_path / "own"))


def edit(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
def test_transformers_alone_refuses_it(quantized: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    write_tiny_qwen3_moe(sharded, max_shard_bytes=100_000)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    script = REPO / "tests" / "support" / "transformers_alone.py"
    ended = subprocess.run(
        [sys.executable, "-P", script, quantized, sharded],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr
    for errors in json.loads(ended.stdout.splitlines()[-1]):
        assert len(errors) >= 12
        assert [way for way, error in errors.items() if error is None or WEIGHTS_NOTE not in error] == []


def test_the_note_is_a_name_that_no_file_has() -> None:
    assert "bitsmoe" in WEIGHTS_NOTE
    assert "/" not in WEIGHTS_NOTE
    assert len(WEIGHTS_NOTE.encode()) <= 255  # a version that looked for the file would say that it is missing
    assert not WEIGHTS_NOTE.endswith((".safetensors", ".safetensors.index.json", ".bin"))


def test_the_dequantized_checkpoint_is_ordinary(plain: Path) -> None:
    assert not {WEIGHTS_KEY, "quantization_config"} & json.loads((plain / "config.json").read_text()).keys()


@pytest.mark.slow
def test_import_loads_nothing_heavy_and_registers_later() -> None:
    code = """
import sys, bitsmoe
print(sorted({"torch", "transformers", "numpy", "pydantic"} & sys.modules.keys()), bitsmoe.__version__ != "")
bitsmoe.register_with_transformers()
print(sum(type(finder).__module__ == "bitsmoe.registration" for finder in sys.meta_path))
from transformers.quantizers import auto
print(auto.AUTO_QUANTIZER_MAPPING["bitsmoe"].__module__, auto.AUTO_QUANTIZATION_CONFIG_MAPPING["bitsmoe"].__module__)
print(auto.__spec__.loader.get_source("transformers.quantizers.auto") is not None)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "[] True\n1\nbitsmoe.hf_quantizer bitsmoe.hf_quantizer\nTrue\n", ended.stderr


def test_registered_at_once_where_transformers_is_there() -> None:
    del AUTO_QUANTIZER_MAPPING["bitsmoe"], AUTO_QUANTIZATION_CONFIG_MAPPING["bitsmoe"]
    bitsmoe.register_with_transformers()
    bitsmoe.register_with_transformers()
    assert AUTO_QUANTIZER_MAPPING["bitsmoe"] is BitsmoeQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["bitsmoe"] is BitsmoeConfig


@pytest.mark.slow
@pytest.mark.parametrize("architecture", family_cases(FAMILIES))
def test_logits_of_every_family(architecture: str, tmp_path: Path) -> None:
    directory = make_quantized(architecture, tmp_path / "q")
    plain = dequantized(directory)
    assert torch.allclose(whole_logits(directory), whole_logits(plain), rtol=0, atol=MAX_ERROR)
    for auto in (class_of(FAMILIES[architecture]), AutoModel):
        models = [auto.from_pretrained(d, dtype=torch.float16) for d in (directory, plain)]
        got, want = ({n: p.dtype for n, p in m.state_dict().items() if ".experts." not in n} for m in models)
        assert got == want


@pytest.mark.slow
@pytest.mark.parametrize("form", [f for f in FORMS if f not in ("natural", "shared_basis")])
def test_logits_of_every_form(form: str, tmp_path: Path) -> None:
    write_tiny_qwen3_moe(tmp_path / "q", form=form, block_size=32, max_shard_bytes=100_000)
    assert torch.allclose(
        whole_logits(tmp_path / "q"), whole_logits(dequantized(tmp_path / "q")), rtol=0, atol=MAX_ERROR
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "bits"), [(QWEN, 8), ("Qwen2MoeForCausalLM", 4), (MIXTRAL, 4), ("DeepseekV3ForCausalLM", 8)]
)
def test_linear_layers_at_few_bits(architecture: str, bits: DenseBits, tmp_path: Path) -> None:
    directory = make_quantized(architecture, tmp_path / "q")
    assert "lm_head.weight" in store_dense(directory, bits)
    reference = whole_logits(dequantized(directory))
    model = load(directory)
    assert torch.allclose(logits(model), reference, rtol=0, atol=MAX_ERROR)
    kinds = {type(m).__name__ for m in model.modules()}
    assert "_StoredLinear" not in kinds
    assert not any(name.endswith("weight_packed") for name in model.state_dict())


def test_logits_in_bfloat16_are_as_near_as_those_of_the_dequantized_model(quantized: Path, plain: Path) -> None:
    exact = logits(load(plain))
    ours, theirs = (logits(load(d, torch.bfloat16)).float() - exact for d in (quantized, plain))
    assert ours.std() < 1.1 * theirs.std()


def assert_as_stored(model: PreTrainedModel, directory: Path) -> None:
    """The experts' tensors, bit for bit."""
    stored = {n: t for n, t in load_file(directory / "model.safetensors").items() if ".experts." in n}
    found = {
        f"model.{name.removeprefix('model.')}": parameter
        for name, parameter in model.named_parameters()
        if ".experts." in name
    }
    assert found.keys() == stored.keys()
    for name, want in stored.items():
        assert found[name].dtype == want.dtype
        assert torch.equal(found[name], want), name
        assert not found[name].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_stay_as_they_are_stored(dtype: torch.dtype, quantized: Path) -> None:
    model = load(quantized, dtype)
    assert model.dtype == dtype
    assert_as_stored(model, quantized)
    model.to(torch.bfloat16 if dtype == torch.float16 else torch.float16)
    assert_as_stored(model, quantized)
    nn.Module.double(model)
    assert_as_stored(model, quantized)
    assert model.model.norm.weight.dtype == torch.float64


def test_other_heads(quantized: Path, plain: Path) -> None:
    got, want = (AutoModel.from_pretrained(d, dtype=torch.float32) for d in (quantized, plain))
    with torch.no_grad():
        hidden = [model(IDS).last_hidden_state for model in (got, want)]
    assert torch.allclose(*hidden, rtol=0, atol=MAX_ERROR)
    assert_as_stored(got, quantized)
    model = AutoModelForSequenceClassification.from_pretrained(quantized, num_labels=3, dtype=torch.float32)
    assert_as_stored(model, quantized)


def test_a_snapshot_in_the_hubs_cache(quantized: Path, plain: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--me--tiny"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / ("0" * 40)
    for directory in (blobs, snapshot, repository / "refs"):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for file in quantized.iterdir():
        shutil.copyfile(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    model = load("me/tiny", cache_dir=tmp_path, local_files_only=True)
    assert torch.allclose(logits(model), logits(load(plain)), rtol=0, atol=MAX_ERROR)


def test_an_older_checkpoint_without_the_note(own: Path, plain: Path) -> None:
    config = json.loads((own / "config.json").read_text())
    del config[WEIGHTS_KEY]
    (own / "config.json").write_text(json.dumps(config))
    assert torch.allclose(logits(load(own)), logits(load(plain)), rtol=0, atol=MAX_ERROR)


def test_generates_the_same_text(quantized: Path, plain: Path) -> None:
    texts = [
        load(d).generate(IDS[:, :8], max_new_tokens=12, do_sample=False, pad_token_id=0) for d in (quantized, plain)
    ]
    assert torch.equal(*texts)


def test_gradients_pass_through_the_experts(quantized: Path, plain: Path) -> None:
    gradients = []
    for directory in (quantized, plain):
        model = load(directory)
        model(IDS, labels=IDS).loss.backward()
        gradients.append(
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None and ".experts." not in n}
        )
    got, want = gradients
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert torch.allclose(got[name], gradient, rtol=1e-3, atol=1e-6), name


def test_copies_and_pickles(quantized: Path) -> None:
    model = load(quantized)
    want, buffer = logits(model), io.BytesIO()
    assert torch.equal(logits(copy.deepcopy(model)), want)
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False)), want)
    assert "BitsmoeExperts(num_experts=8" in repr(model)


def test_the_config_says_what_the_file_says(quantized: Path) -> None:
    model = load(quantized)
    stored = json.loads((quantized / "config.json").read_text())
    assert json.loads(model.config.to_json_string())["quantization_config"] == stored["quantization_config"]
    assert not hasattr(model.config, WEIGHTS_KEY)
    assert model.is_quantized


def test_save_pretrained_is_refused(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Whatever other tests have done to transformers' logger.
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [caplog.handler])
    caplog.set_level(logging.WARNING, logger="transformers")
    model = load(quantized)
    with pytest.raises(ValueError, match="quantized with bitsmoe and is not serializable"):
        model.save_pretrained(tmp_path / "saved")
    assert "model.dequantize()" in caplog.text
    assert not (tmp_path / "saved").exists()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [QWEN, MIXTRAL])
def test_dequantized_it_is_an_ordinary_model(architecture: str, tmp_path: Path) -> None:
    directory = make_quantized(architecture, tmp_path / "q", "extras")
    want = load_file(dequantized(directory) / "model.safetensors")
    model = load(directory).dequantize()
    assert not any(isinstance(module, BitsmoeExperts) for module in model.modules())
    model.save_pretrained(tmp_path / "saved")
    assert (
        not {WEIGHTS_KEY, "quantization_config"} & json.loads((tmp_path / "saved" / "config.json").read_text()).keys()
    )
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(saved[name], tensor), name
    half = load(directory, torch.bfloat16).dequantize()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def spoil_config(own: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((own / "config.json").read_text())
    change(config)
    (own / "config.json").write_text(json.dumps(config))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a scale that is no number": (
        lambda own: edit(own, lambda t: t[f"{EXPERTS}.down_component_scale"].view(-1)[:2].fill_(float("nan"))),
        r"down_component_scale: 2 of \d+ values are not finite",
    ),
    "a missing part": (lambda own: edit(own, lambda t: t.pop(f"{EXPERTS}.down_bits")), "down_bits is missing"),
    "a missing tensor outside the experts": (
        lambda own: edit(own, lambda t: t.pop("model.layers.1.self_attn.q_proj.weight")),
        r"model.layers.1.self_attn.q_proj.weight is missing",
    ),
    "another shape outside the experts": (
        lambda own: edit(own, lambda t: t.update({"model.norm.weight": torch.ones(5)})),
        r"model.norm.weight is .*but the model needs shape \[64\]",
    ),
    "a truncated file": (
        lambda own: os.truncate(own / "model.safetensors", 5000),
        r"model.safetensors \(5000 bytes\) is truncated or damaged",
    ),
    "a later format": (
        lambda own: spoil_config(own, lambda c: c["quantization_config"].update(format_version=4)),
        "format_version",
    ),
    "experts that config.json does not know": (
        lambda own: spoil_config(own, lambda c: c.update(mlp_only_layers=[1])),
        "model.layers.1.mlp.experts: quantization_config has these experts, config.json does not",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_gets_one_error(kind: str, own: Path) -> None:
    damage, message = DAMAGE[kind]
    damage(own)
    with pytest.raises(BitsmoeError, match=message):
        load(own)


def test_options_that_change_the_model(quantized: Path) -> None:
    with pytest.raises(BitsmoeError, match=r"model.layers.2.mlp.experts is in the checkpoint, but not in the model"):
        load(quantized, num_hidden_layers=2)
    with pytest.raises(BitsmoeError, match=r"model.layers.3.*is missing"):
        load(quantized, num_hidden_layers=4)


def test_tensors_that_transformers_puts_elsewhere(quantized: Path) -> None:
    with pytest.raises(
        BitsmoeError, match=rf"transformers .* loaded it wrongly:\n  - tensor {EXPERTS}.down_feature_scale has"
    ):
        load(quantized, key_mapping={r"0\.mlp\.experts\.down_feature_scale": "1.mlp.experts.down_feature_scale"})


def test_a_state_dict_is_refused(quantized: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(quantized)
    with pytest.raises(BitsmoeError, match="from its directory or Hub name, not from a state_dict"):
        transformers.Qwen3MoeForCausalLM.from_pretrained(
            None, config=config, state_dict=load_file(quantized / "model.safetensors")
        )


def test_another_quantization_is_refused(quantized: Path, plain: Path) -> None:
    with pytest.raises(BitsmoeError, match="make a checkpoint with `bitsmoe quantize`"):
        load(plain, quantization_config=BitsmoeConfig())
    with pytest.raises(ValueError, match="quantized with BitsmoeConfig but you are passing a BitsAndBytesConfig"):
        load(quantized, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))


def test_division_among_processes_is_refused(quantized: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(quantized)
    config.distributed_config = {"tp_size": 2}
    with pytest.raises(BitsmoeError, match="cannot divide bitsmoe experts among processes"):
        load(quantized, config=config)


def test_an_old_transformers_is_refused(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers puts a second module of its name into sys.modules when it first imports a model.
    monkeypatch.setattr(hf_quantizer.transformers, "__version__", "5.5.2")
    with pytest.raises(BitsmoeError, match=r"transformers 5.5.2 is too old .* pip install 'transformers>=5.5.3'"):
        load(quantized)
    monkeypatch.delattr("transformers.quantizers.auto.register_quantizer")
    with pytest.raises(BitsmoeError, match="too old"):
        bitsmoe.register_with_transformers()


def test_the_oldest_transformers_is_that_of_the_package() -> None:
    assert f'"transformers>={hf_quantizer.OLDEST}"' in (REPO / "pyproject.toml").read_text(encoding="utf-8")
