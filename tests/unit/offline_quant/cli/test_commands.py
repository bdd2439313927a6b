"""The commands as a user runs them, on the demo model with little calibration text."""

import contextlib
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitsmoe_kernels.format.checkpoint import WEIGHTS_KEY, WEIGHTS_NOTE, Checkpoint
from bitsmoe_kernels.reference import LayerWeights
from builders import REPO, write_first_layers
from offline_quant.calibration.windows import load_tokenizer
from offline_quant.cli.__main__ import main
from offline_quant.model.source import SourceModel

pytestmark = pytest.mark.slow
NIGHTLY = pytest.mark.nightly

FAST = ("--calib-samples", "6", "--calib-length", "64")
TEXT = "She opened the door, and there stood her brother with the lamp in his hand. " * 60


@dataclass(frozen=True)
class Done:
    """A finished command."""

    returncode: int
    stdout: str
    stderr: str


def bitsmoe(*args, columns=200):
    """Run the command line in this process, which has torch loaded already."""
    out, err = io.StringIO(), io.StringIO()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["bitsmoe", *map(str, args)])
        patch.setenv("COLUMNS", str(columns))
        patch.setenv("HF_HUB_OFFLINE", "1")
        try:
            main()
            status = 0
        except SystemExit as e:
            status = e.code or 0
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return Done(status, out.getvalue(), err.getvalue())


def succeed(*args, columns=200):
    done = bitsmoe(*args, columns=columns)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def refused(*args, message):
    """The command ends with status 2 and one error that says `message`."""
    done = bitsmoe(*args)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("Error:") == 1, done.stderr
    flat = " ".join(done.stderr.split())
    assert message in flat, flat
    return flat


LAYERS = 2
EXPERTS = 8


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The demo model's first two layers, with half of their experts."""
    return write_first_layers(tmp_path_factory.mktemp("source") / "model", LAYERS, EXPERTS)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, source, text):
    out = tmp_path_factory.mktemp("q") / "checkpoint"
    succeed("quantize", source, "--bits", "2.25", "--out", out, "--calib", text, *FAST)
    return out


@pytest.fixture
def model(tmp_path, source):
    """A copy of the model that a test may damage."""
    return shutil.copytree(source, tmp_path / "model")


def test_a_checkpoint_has_a_model_card(quantized, source, text):
    card = (quantized / "README.md").read_text()
    report = json.loads((quantized / "bitsmoe_report.json").read_text())
    assert card.startswith("---\nlibrary_name: vllm\n")
    assert f"| original model | `{source.name}` |" in card
    assert f"counted | {report['bpw']:.4f} |" in card
    for row in report["layers"]:
        assert f"| `{row['layer']}` | {row['basis']} | {row['bpw']:.4f} |" in card
    assert f"| calib | `{text.name}` |" in card
    for path in (source.parent, text.parent, quantized.parent):
        assert str(path) not in card
        assert path.name not in card


def test_push(quantized, tmp_path, monkeypatch):
    """What it does is in test_hub.py; here the command."""
    monkeypatch.setenv("HF_TOKEN", "x")
    refused("push", tmp_path / "no", "me/model", message="no such directory")
    refused("push", quantized, "me/--x", "--private", "--revision", "r", message="cannot be a repository's name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("push", quantized, "me/model", message="me/model: the Hub cannot be reached")


def test_checkpoint_is_whole_and_valid(quantized, source):
    checkpoint = Checkpoint(quantized)
    checkpoint.check()
    names = {p.name for p in quantized.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert {"generation_config.json", "bitsmoe_report.json"} <= names
    assert not any(n.endswith((".tmp", ".py")) for n in names)
    assert checkpoint.config.bpw <= 2.25
    assert str(quantized.parent) not in (quantized / "config.json").read_text()
    original = load_file(source / "model.safetensors")
    for name, tensor in original.items():
        if ".experts." not in name:
            assert torch.equal(checkpoint.tensors.get(name), tensor)
    assert list(quantized.parent.iterdir()) == [quantized]


@pytest.mark.parametrize("bits", [1.5, 4.0, *(pytest.param(b, marks=NIGHTLY) for b in (2.0, 2.5, 3.0))])
def test_all_in_bits_stay_within_the_budget(tmp_path, text, bits, source):
    out = tmp_path / "q"
    succeed("quantize", source, "--bits", bits, "--out", out, "--calib", text, "--refine", "0", *FAST)
    data = json.loads(succeed("inspect", out, "--json").stdout)
    assert bits - 0.01 <= data["bpw"] <= bits
    # The figure again, from the file itself: bytes of all tensors that replace experts.
    size = sum(t.nbytes for name, t in load_file(out / "model.safetensors").items() if ".experts." in name)
    assert data["bpw"] == pytest.approx(8 * size / (LAYERS * EXPERTS * 3 * 256 * 256))
    assert data["expert_bytes"] == size


def test_equal_inputs_give_equal_bytes(tmp_path, text, quantized, source):
    again = tmp_path / "elsewhere" / "again"
    succeed("quantize", source, "--bits", "2.25", "--out", again, "--calib", text, *FAST)
    files = sorted(p.name for p in quantized.iterdir())
    assert files == sorted(p.name for p in again.iterdir())
    assert "report.html" in files
    for name in files:
        if name != "report.html":  # it tells times
            assert (quantized / name).read_bytes() == (again / name).read_bytes(), name


@pytest.mark.parametrize(
    "options",
    [
        ["--objective", "alphaq", "--gamma", "0.5"],
        ["--objective", "bt-moe", "--ranks", "0,4"],
        pytest.param(["--objective", "frequency"], marks=NIGHTLY),
        pytest.param(["--objective", "uniform"], marks=NIGHTLY),
        ["--budget", "model"],
        pytest.param(["--no-feedback", "--refine", "0"], marks=NIGHTLY),
    ],
    ids=" ".join,
)
def test_every_objective_keeps_the_budget(tmp_path, text, options, source):
    out = tmp_path / "q"
    printed = succeed("quantize", source, "--bits", "3", "--out", out, "--calib", text, *options, *FAST)
    checkpoint = Checkpoint(out)
    checkpoint.check()
    assert 2 < checkpoint.config.all_in_bpw() <= 3
    report = json.loads((out / "bitsmoe_report.json").read_text())
    assert all(layer["solver_gap"] < 1e-5 for layer in report["layers"])
    assert all(0 < layer["output_error"] < 1 for layer in report["layers"])
    of_model = options[0] == "--budget" or options[1] in ("alphaq", "bt-moe")
    assert (report["model_budget"] is not None) == of_model
    if options[0] == "--budget":
        assert all(v > 0 for v in report["model_budget"]["sensitivity"].values())
    assert "report.html" in printed.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objective", "alphaq", "--basis", "whitened"], "works on whole matrices"),
        (["--ranks", "4,2"], "must begin with 0 and ascend"),
        (["--objective", "best"], "--objective 'best'"),
        (["--budget", "planet"], "--budget 'planet'"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_options_of_the_objectives_are_checked(tmp_path, text, options, message, source):
    out = tmp_path / "q"
    refused("quantize", source, "--bits", "3", "--out", out, "--calib", text, *options, message=message)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("basis", "block_size"),
    [
        ("natural", 16),
        ("whitened", 32),
        ("paper", 16),
        *(pytest.param(*case, marks=NIGHTLY) for case in (("natural", 32), ("whitened", 16), ("paper", 32))),
    ],
)
def test_every_form_dequantizes_to_what_the_reference_says(tmp_path, text, basis, block_size, source):
    out, plain = tmp_path / "q", tmp_path / "d"
    succeed(
        "quantize", source, "--bits", "3", "--out", out, "--calib", text, "--basis", basis,
        "--block-size", block_size, *FAST,
    )  # fmt: skip
    succeed("dequantize", out, "--out", plain, "--dtype", "float32")
    tensors = load_file(plain / "model.safetensors")
    assert sorted(tensors) == sorted(load_file(source / "model.safetensors"))
    checkpoint = Checkpoint(out)
    assert checkpoint.model_config[WEIGHTS_KEY] == WEIGHTS_NOTE
    assert not {WEIGHTS_KEY, "quantization_config"} & json.loads((plain / "config.json").read_text()).keys()
    for prefix, layer in checkpoint.config.layers.items():
        weights = LayerWeights(layer, block_size, checkpoint.layer_tensors(prefix))
        for e in (0, EXPERTS - 1):
            for name, value in zip(("gate", "up", "down"), weights.expert_weights(e), strict=True):
                assert torch.equal(tensors[f"{prefix}.{e}.{name}_proj.weight"], value)
    result = json.loads(succeed("eval", plain, "--text", text, "--reference", source, "--json").stdout)
    same = json.loads(succeed("eval", out, "--text", text, "--reference", source, "--json").stdout)
    assert same["kl"] == pytest.approx(result["kl"], rel=1e-3)
    assert same["perplexity"] == pytest.approx(result["perplexity"], rel=1e-4)
    assert 0 < same["kl"] < 0.1
    assert 0.8 < same["top1_agreement"] <= 1
    assert same["bpw"] <= 3


def test_bfloat16_is_the_rounded_weights(tmp_path, quantized):
    succeed("dequantize", quantized, "--out", tmp_path / "b")
    succeed("dequantize", quantized, "--out", tmp_path / "f", "--dtype", "float32")
    rounded, exact = (load_file(tmp_path / d / "model.safetensors") for d in "bf")
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    assert rounded[name].dtype == torch.bfloat16
    assert torch.equal(rounded[name], exact[name].bfloat16())


def test_plan_writes_the_report_only(tmp_path, text):
    """Of all experts of a layer: half of them are too few for a shared basis."""
    out, source = tmp_path / "plan", write_first_layers(tmp_path / "model", LAYERS)
    table = succeed(
        "quantize", source, "--bits", "1.8", "--out", out, "--calib", text, "--plan", *FAST, columns=80
    ).stdout
    assert sorted(p.name for p in out.iterdir()) == ["bitsmoe_report.json", "report.html"]
    report = json.loads((out / "bitsmoe_report.json").read_text())
    assert 1.79 <= report["bpw"] <= 1.8
    assert len(report["layers"]) == LAYERS
    for layer in report["layers"]:
        assert layer["solver_gap"] < 1e-5
        assert layer["measured_error"] is None
        assert 0 < layer["predicted_error"] < 1
    # A line for each layer, whole at 80 columns.
    rows = [line.split() for line in table.splitlines() if re.match(r"\s*\d+\s+(natural|whitened)", line)]
    assert rows == [
        [
            str(i), layer["basis"], str(layer["basis_rank"].get("gate_up", "-")), f"{layer['bpw']:.4f}",
            f"{layer['predicted_error']:.4f}", "-", "-", "{min}-{max}".format(**layer["tokens_per_expert"]),
        ]
        for i, layer in enumerate(report["layers"])
    ]  # fmt: skip
    assert "whitened" in rows[0]
    # The same directory then takes the checkpoint.
    succeed("quantize", source, "--bits", "2", "--out", out, "--calib", text, "--refine", "0", *FAST)
    assert json.loads((out / "bitsmoe_report.json").read_text())["layers"][0]["measured_error"] > 0


def test_self_calibration_and_jsonl(tmp_path, source):
    succeed("quantize", source, "--bits", "2", "--out", tmp_path / "s", "--calib", "self", "--refine", "0", *FAST)
    rows = tmp_path / "c.jsonl"
    rows.write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(2)))
    succeed("quantize", source, "--bits", "2", "--out", tmp_path / "j", "--calib", rows, "--refine", "0", *FAST)
    assert json.loads((tmp_path / "s" / "config.json").read_text())["quantization_config"]["run"]["calib"] == "self"


def test_rows_are_checked_before_the_weights_are_read(tmp_path, source, monkeypatch):
    def read(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(SourceModel, "check_finite", read)
    rows = [{"text": TEXT}] * 40
    message = [{"role": "user", "content": "a"}]
    for name, data, said in (
        ("late.json", [*rows, {"text": 3}], "row 41: its 'text' is a number, not text"),
        ("keys.json", [{"body": TEXT}], "found ['body']; name the right one with --calib-column"),
        ("chat.json", [{"messages": message}], "the model's tokenizer has no chat template; name a column"),
        ("short.json", [{"text": "a"}], "one window takes 64; give more text"),
    ):
        path = tmp_path / name
        path.write_text(json.dumps(data))
        flat = refused(
            "quantize", source, "--bits", "2", "--out", tmp_path / "new/q", "--calib", path, *FAST, message=said
        )
        assert f"--calib {path}" in flat
        path.unlink()
        assert list(tmp_path.iterdir()) == []


def test_a_column_is_recorded_and_gives_the_bytes_of_its_text(tmp_path, source, text, quantized):
    rows, out = tmp_path / "rows", tmp_path / "q"
    rows.write_text(json.dumps([{"title": "x", "body": text.read_text()}]))
    options = ("--calib", rows, "--calib-column", "body")
    done = succeed("quantize", source, "--bits", "2.25", "--out", out, *options, *FAST)
    assert "Calibration text: rows (JSON, `body` of its rows)" in done.stderr
    assert (out / "model.safetensors").read_bytes() == (quantized / "model.safetensors").read_bytes()
    record, plain = (
        json.loads((d / "config.json").read_text())["quantization_config"]["run"] for d in (out, quantized)
    )
    assert record == plain | {"calib": "rows", "calib_column": "body"}
    assert "| calib_column | `body` |" in (out / "README.md").read_text()
    figures = [
        succeed("eval", out, "--json", "--text", *more).stdout for more in ((text,), (rows, "--text-column", "body"))
    ]
    assert figures[0] == figures[1]
    refused("eval", out, "--text", rows, message="found ['body', 'title']; name the right one with --text-column")
    refused("eval", out, "--text", "hf:a/b", message="--text hf:a/b: must be a file")


def test_without_a_dataset_the_fall_back_is_loud(tmp_path, source):
    done = succeed("quantize", source, "--bits", "2", "--out", tmp_path / "q", "--refine", "0", *FAST)
    assert "Warning:" in done.stderr
    assert "sampled from the model itself" in done.stderr


def test_fused_experts_on_disk_give_the_same_checkpoint(tmp_path, model, text, quantized):
    tensors = load_file(model / "model.safetensors")
    fused = {k: v for k, v in tensors.items() if ".experts." not in k}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = {
            n: torch.stack([tensors[f"{prefix}.{e}.{n}_proj.weight"] for e in range(EXPERTS)])
            for n in ("gate", "up", "down")
        }
        fused[f"{prefix}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], 1)
        fused[f"{prefix}.down_proj"] = parts["down"]
    save_file(fused, model / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "q"
    succeed("quantize", model, "--bits", "2.25", "--out", out, "--calib", text, *FAST)
    assert (out / "model.safetensors").read_bytes() == (quantized / "model.safetensors").read_bytes()


def test_shards_on_disk_give_the_same_checkpoint(tmp_path, model, text, quantized):
    split(model)
    succeed("quantize", model, "--bits", "2.25", "--out", tmp_path / "q", "--calib", text, *FAST)
    assert (tmp_path / "q" / "model.safetensors").read_bytes() == (quantized / "model.safetensors").read_bytes()


def test_dense_layers_pass_through_and_an_untied_head_is_used(tmp_path, model, text):
    """The first layer an ordinary MLP, the output embedding a tensor of its own."""

    def change(tensors):
        for name in [n for n in tensors if n.startswith("model.layers.0.mlp.")]:
            del tensors[name]
        g = torch.Generator().manual_seed(0)
        for name, shape in (("gate", (1024, 256)), ("up", (1024, 256)), ("down", (256, 1024))):
            tensors[f"model.layers.0.mlp.{name}_proj.weight"] = (torch.randn(shape, generator=g) / 40).bfloat16()
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 0.5

    edit_tensors(model, change)
    edit_config(model, mlp_only_layers=[0], tie_word_embeddings=False)
    out = tmp_path / "q"
    succeed("quantize", model, "--bits", "2.5", "--out", out, "--calib", text, *FAST)
    assert list(Checkpoint(out).config.layers) == ["model.layers.1.mlp.experts"]
    succeed("dequantize", out, "--out", tmp_path / "d", "--dtype", "float32")
    whole = AutoModelForCausalLM.from_pretrained(str(tmp_path / "d"), dtype=torch.float32).eval()
    ids = torch.tensor(load_tokenizer(model)(TEXT)["input_ids"])
    windows = ids[: len(ids) // 512 * 512].view(-1, 512)
    with torch.no_grad():
        logp = whole(windows).logits[:, :-1].log_softmax(-1)
    nll = float(-logp.gather(-1, windows[:, 1:, None]).mean())
    result = json.loads(succeed("eval", out, "--text", text, "--json").stdout)
    assert result["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)


def test_output_may_be_an_empty_directory_or_a_link_to_one(tmp_path, source, text):
    (tmp_path / "here").mkdir()
    (tmp_path / "link [v2]").symlink_to("here")
    out = tmp_path / "link [v2]"
    done = succeed("quantize", source, "--bits", "2", "--out", out, "--calib", text, "--refine", "0", *FAST)
    assert "link [v2]" in done.stdout
    Checkpoint(out).check()
    assert not any(p.name.startswith(".") for p in out.iterdir())
    (tmp_path / "file").touch()
    message = "cannot be written"
    refused("quantize", source, "--bits", "2", "--out", tmp_path / "file" / "q", "--calib", text, message=message)


def test_made_parents_are_removed_after_a_failure(tmp_path, model, text):
    edit_tensors(model, lambda t: t[EXPERT][0].fill_(float("nan")))
    out = tmp_path / "new" / "parents" / "q"
    refused(
        "quantize",
        model,
        "--bits",
        "2",
        "--out",
        out,
        "--calib",
        text,
        message="nothing can be computed",
    )
    assert not (tmp_path / "new").exists()


def edit_config(model, **changes):
    path = model / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(model, change):
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def dense(model):
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}
    (model / "config.json").write_text(json.dumps(config))


SECOND_SHARD = "model-00002-of-00002.safetensors"


def split(model):
    """Spread the weights over two shards."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:60], SECOND_SHARD: names[60:]}
    for file, part in files.items():
        save_file({n: tensors[n] for n in part}, model / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, part in files.items() for n in part}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_a_shard(model):
    split(model)
    (model / SECOND_SHARD).unlink()


def truncate(model):
    path = model / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: edit_config(m, num_experts=-1), "num_experts is -1, but must be a whole number above 0"),
        (lambda m: edit_config(m, hidden_size="256"), "hidden_size is '256', but must be a whole number above 0"),
        (lambda m: edit_config(m, decoder_sparse_step=0), "decoder_sparse_step is 0"),
        (
            lambda m: edit_config(m, model_type="llama"),
            "model_type is 'llama', but Qwen3MoeForCausalLM is supported with 'qwen3_moe'",
        ),
        (lambda m: edit_config(m, rope_theta="x"), "transformers cannot build the model"),
        (lambda m: edit_config(m, architectures=5), "architecture [] is not supported"),
        (
            lambda m: edit_config(m, num_attention_heads=4),
            "q_proj.weight is bfloat16[256, 256], but the model needs shape [128",
        ),
        (lambda m: edit_config(m, tie_word_embeddings=False), "tensor lm_head.weight is missing"),
        (lambda m: edit_tensors(m, lambda t: t.pop("model.norm.weight")), "tensor model.norm.weight is missing"),
        (lambda m: edit_tensors(m, lambda t: t[EXPERT][0].fill_(3e38)), "holds values up to 3e+38; up to 1e+12"),
        (lambda m: (m / "tokenizer_config.json").write_text("[]"), "no tokenizer can be loaded"),
        (dense, "not a Mixture-of-Experts model"),
        (
            lambda m: edit_config(m, architectures=["MysteryMoeForCausalLM"]),
            "['MysteryMoeForCausalLM'] is not supported",
        ),
        (lambda m: edit_config(m, hidden_act="gelu"), "hidden_act is 'gelu'"),
        (lambda m: edit_config(m, moe_intermediate_size=None), "config.json lacks ['moe_intermediate_size']"),
        (lambda m: edit_config(m, num_experts=9), "tensor model.layers.0.mlp.experts.8.gate_proj.weight is missing"),
        (lose_a_shard, f"{SECOND_SHARD} is missing"),
        (truncate, "bytes) is truncated or damaged"),
        (lambda m: edit_tensors(m, lambda t: t.pop(EXPERT)), f"tensor {EXPERT} is missing"),
        (lambda m: edit_tensors(m, lambda t: t.update({EXPERT: t[EXPERT][:8].clone()})), "has shape [8, 256]"),
        (lambda m: edit_tensors(m, lambda t: t[EXPERT].view(-1)[5:7].fill_(float("nan"))), "2 of 65536 values are NaN"),
        (lambda m: (m / "config.json").unlink(), "config.json: cannot be read"),
        (lambda m: (m / "tokenizer.json").unlink(), "no tokenizer can be loaded"),
        (
            lambda m: [path.unlink() for path in (*m.glob("tokenizer*"), m / "special_tokens_map.json")],
            "no tokenizer can be loaded (its files are missing)",
        ),
    ],
)
def test_damaged_models_are_refused(tmp_path, model, text, damage, message):
    damage(model)
    refused("quantize", model, "--bits", "2", "--out", tmp_path / "q", "--calib", text, message=message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_all_damaged_tensors_are_named_at_once(tmp_path, model, text):
    def spoil(tensors):
        tensors[EXPERT][0, 0] = float("nan")
        tensors["model.norm.weight"][3] = float("inf")

    edit_tensors(model, spoil)
    said = refused(
        "quantize",
        model,
        "--bits",
        "2",
        "--out",
        tmp_path / "q",
        "--calib",
        text,
        message="nothing can be computed",
    )
    assert EXPERT in said
    assert "model.norm.weight" in said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--bits", "0.1"), "use at least --bits 0."),
        (("--bits", "nan"), "--bits nan: Input should be"),
        (("--bits", "0"), "--bits 0.0: Input should be greater than 0"),
        (("--bits", "2", "--basis", "cosine", "--basis-bits", "7"), "--basis-bits 7: Input should be 8 or 16"),
        (("--bits", "2", "--seed", str(2**70)), "--seed 1180591620717411303424: Input should be less than"),
        (("--bits", "2", "--device", "cpu:x"), "--device cpu:x: must be cpu, cuda or cuda:N"),
        (("--bits", "2", "--device", "cuda:99"), "--device cuda:99: torch"),
        (("--bits", "2", "--calib", "tests"), "--calib tests: is a directory; give a file"),
        (("--bits", "2", "--calib", "/dev/null"), "--calib /dev/null: is a pipe or a device"),
        (
            ("--bits", "2", "--calib", "self", "--calib-column", "a"),
            "--calib-column: for --calib FILE or hf:DATASET only",
        ),
        (
            ("--bits", "2", "--calib-split", "a", "--calib-config", "b"),
            "--calib-config, --calib-split: for --calib FILE",
        ),
        (
            ("--bits", "2", "--calib", "README.md", "--calib-split", "a"),
            "only hf:DATASET has configurations and splits",
        ),
        (
            ("--bits", "2", "--calib", "README.md", "--calib-column", "a"),
            "plain text without columns; leave out --calib-c",
        ),
        (("--bits", "2", "--calib", "nowhere.txt"), "--calib nowhere.txt: no such file"),
        (("--bits", "2", "--calib", "EMPTY"), "the file is empty"),
        (("--bits", "2", "--device", "tpu"), "--device tpu: must be cpu, cuda or cuda:N"),
        (("--bits", "0.3", "--basis", "paper", "--calib-samples", "1", "--calib-length", "64"), "use at least --bits"),
    ],
)
def test_bad_options_are_refused(tmp_path, args, message, source):
    (tmp_path / "empty.txt").touch()
    args = [str(tmp_path / "empty.txt") if a == "EMPTY" else a for a in args]
    refused("quantize", source, "--out", tmp_path / "q", *args, message=message)
    assert [p.name for p in tmp_path.iterdir()] == ["empty.txt"]


def test_the_smallest_budget_named_is_possible(tmp_path, text, source):
    said = refused("quantize", source, "--bits", "0.1", "--out", tmp_path / "q", message="use at least --bits")
    least = said.split("use at least --bits ")[1].split()[0]
    succeed("quantize", source, "--bits", least, "--out", tmp_path / "q", "--calib", text, "--refine", "0", *FAST)


def test_existing_output_is_left_alone(tmp_path, text, source):
    out = tmp_path / "q"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    message = "exists and is not an empty directory"
    refused("quantize", source, "--bits", "2", "--out", out, "--calib", text, message=message)
    refused("dequantize", out, "--out", out, message=message)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


@contextlib.contextmanager
def small_disk(path, size):
    """A file system of `size` bytes: a real one for root, else a cap on file sizes that fails writes the same way."""
    path.mkdir()
    if os.geteuid() == 0:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
        try:
            yield None
        finally:
            subprocess.run(["umount", path], check=True)
    else:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def start(*args, prelude="", limit=None):
    """The command in a process of its own."""
    code = f"import sys; from offline_quant.cli import main\n{prelude}\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


FILL_AFTER_CHECK = """
import pathlib, offline_quant.pipeline.preflight as p
check = p.check_space
def check_then_fill(out, needed):
    check(out, needed)
    (out.parent / "filler").write_bytes(bytes(4_500_000))
p.check_space = check_then_fill
"""


@pytest.mark.parametrize(
    ("size", "prelude", "message", "left"),
    [
        (2_000_000, "", "MB are free", []),
        (6_500_000, FILL_AFTER_CHECK, "1 finished layer(s) are kept in", [".q.partial", "filler"]),
    ],
    ids=["full from the start", "fills up while writing"],
)
def test_a_full_disk_leaves_nothing_behind_but_finished_layers(tmp_path, source, text, size, prelude, message, left):
    small = tmp_path / "small"
    with small_disk(small, size) as limit:
        args = ("--bits", "2", "--out", small / "q", "--calib", text, "--refine", "0", *FAST)
        process = start("quantize", source, *args, prelude=prelude, limit=limit)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 2, err
        assert message in " ".join(err.split())
        assert "Traceback" not in err
        assert [p.name for p in small.iterdir()] == left


EXIT_BECOMES_AN_IMPORT_ERROR = """
import time, offline_quant.pipeline.quantize as p
from offline_quant.model.source import SourceModel
def import_compiled_module(*args):
    try:
        time.sleep(60)
    except SystemExit:
        raise ImportError("initialization failed")
SourceModel.check_finite = import_compiled_module
"""


@pytest.mark.parametrize(
    ("number", "prelude"),
    [
        pytest.param(signal.SIGINT, "", marks=NIGHTLY),
        (signal.SIGTERM, ""),
        pytest.param(signal.SIGINT, EXIT_BECOMES_AN_IMPORT_ERROR, marks=NIGHTLY),
    ],
    ids=["SIGINT", "SIGTERM", "amid an import"],
)
def test_a_stopped_run_leaves_nothing_behind(tmp_path, source, text, number, prelude):
    process = start("quantize", source, "--bits", "2", "--out", tmp_path / "q", "--calib", text, prelude=prelude)
    deadline = time.monotonic() + 120
    while not any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert any(tmp_path.iterdir()), "the run never began to write"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"Stopped by {number.name}; nothing is left behind" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_model_is_not_quantized_again(tmp_path, quantized, text):
    refused("quantize", quantized, "--bits", "2", "--out", tmp_path / "q", "--calib", text, message="already quantized")


def test_broken_checkpoints_are_refused_by_every_reader(tmp_path, quantized, text):
    broken = tmp_path / "broken"
    shutil.copytree(quantized, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_bits"][4, 3] ^= 1
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    for command in (("inspect",), ("dequantize", "--out", tmp_path / "d"), ("eval", "--text", text)):
        refused(command[0], broken, *command[1:], message="model.layers.1.mlp.experts.down_bits: block bits sum to")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 7}, "num_experts is 8, config.json says 7"),
        ({"moe_intermediate_size": 128}, "intermediate_size is 256, config.json says 128"),
        (
            {"num_hidden_layers": 1},
            "layers.1.mlp.experts: quantization_config has these experts, config.json does not",
        ),
        (
            {"num_hidden_layers": 3},
            "layers.2.mlp.experts: config.json has these experts, quantization_config does not",
        ),
    ],
)
def test_a_config_that_contradicts_the_checkpoint_is_refused(tmp_path, quantized, changes, message):
    broken = shutil.copytree(quantized, tmp_path / "broken")
    edit_config(broken, **changes)
    refused("dequantize", broken, "--out", tmp_path / "d", message=message)
    assert not (tmp_path / "d").exists()


def test_inspect_shows_where_the_bits_went(quantized):
    data = json.loads(succeed("inspect", quantized, "--json").stdout)
    for layer in data["layers"]:
        for projection in layer["projections"].values():
            assert len(projection["code_bits_by_expert"]) == EXPERTS
        assert sum(sum(p["bytes"].values()) for p in layer["projections"].values()) * 8 == pytest.approx(
            layer["bpw"] * 3 * EXPERTS * 256 * 256
        )
    assert data["parallel_sizes"] == {
        "tensor": [1, 2, 4, 8],  # as many as heads, and as blocks of 32 channels
        "tensor_with_experts": [1, 2, 4, 8],
        "expert_ranks": EXPERTS,
        "stages": 2,
    }
    table = succeed("inspect", quantized).stdout
    assert "bits per weight all-in" in table
    layers = Checkpoint(quantized).config.layers.values()
    ranks = [p.basis.rank if p.basis else "-" for layer in layers for p in layer.projections.values()]
    rows = [line.split() for line in table.splitlines() if re.match(r"\s*\d+\s+(gate|up|down)", line)]
    assert [row[-2] for row in rows] == [str(rank) for rank in ranks]
    assert "gate_up" in table
    assert "tensor-parallel sizes 1, 2, 4, 8;" in " ".join(table.split())
    assert "up to 2 pipeline stages" in " ".join(table.split())


def test_a_title_is_whole_on_one_line_and_a_histogram_survives_ascii(quantized, text):
    title = f"{quantized} on {text.name}"
    assert title in succeed("eval", quantized, "--text", text, columns=80).stdout.splitlines()
    command = [sys.executable, "-m", "offline_quant.cli", "inspect", str(quantized)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Stored factor entries by bit-width" in done.stdout.splitlines()
    assert "?????" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_said_so(quantized):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "offline_quant.cli", "inspect", str(quantized)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "Error: standard output cannot be written (No space left on device)\n"


def test_a_gpu_that_is_too_small_is_said_so(tmp_path, source, text, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"
        )

    monkeypatch.setattr("offline_quant.pipeline.moe_layer.quantize_layer", full)
    done = bitsmoe("quantize", source, "--bits", 4.5, "--calib", text, "--out", tmp_path / "q", *FAST)
    assert done.returncode == 2
    assert "Error: CUDA out of memory: the GPU is too small; give less calibration text" in done.stderr
    assert not (tmp_path / "q").exists()


def test_nan_outside_the_experts_is_no_result(tmp_path, model, quantized, text):
    """Of the checkpoint, and of the reference it is compared with."""
    edit_tensors(model, lambda t: t["model.layers.0.self_attn.q_proj.weight"].view(-1)[:1].fill_(float("nan")))
    refused("eval", model, "--text", text, message=f"{model}: its predictions are not finite")
    refused("eval", quantized, "--text", text, "--reference", model, message=f"{model}: its predictions are not finite")


def test_evaluation_refuses_what_it_cannot_compare(tmp_path, model, text, source):
    refused("eval", source, "--text", tmp_path / "none.txt", message="no such file")
    refused("eval", source, "--text", text, "--device", "tpu", message="--device tpu: must be cpu, cuda or cuda:N")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    refused("eval", source, "--text", short, message="but one window takes 512")
    edit_config(model, vocab_size=4000)
    refused("eval", source, "--text", text, "--reference", model, message="vocab_size is 4000")


def test_usage_errors_and_help(source):
    assert bitsmoe("quantize", source).returncode == 2
    assert "quantize" in succeed("--help").stdout
    assert succeed("--version").stdout.startswith("bitsmoe-vllm 0.")
    refused("quantize", "no/such/model/at/all", "--bits", "2", "--out", "q", message="is not a directory")
    assert not Path("q").exists()
