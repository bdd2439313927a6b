"""Model cards, and `bitsmoe push` against a Hub on this machine."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.checkpoint import Checkpoint
from builders import TINY_MOE, write_tiny_qwen3_moe
from fake_hub import TOKEN, FakeHub, fake_hub
from offline_quant.calibration.sources.base import CalibrationText
from offline_quant.checkpoint.dequantize import dequantize_checkpoint
from offline_quant.checkpoint.hub import push
from offline_quant.report.model_card import base_model, source_license, write_card
from offline_quant.report.schema import ModelReport

SANITY = {
    "tokens": 8192, "perplexity_original": 43.96, "perplexity_quantized": 44.5, "likeliest_token_share_original": 0.05,
    "likeliest_token_share_quantized": 0.05, "degenerate": False, "faults": [], "advice": None,
}  # fmt: skip


def row(layer: int) -> dict[str, Any]:
    return {
        "layer": f"model.layers.{layer}.mlp.experts", "basis": "whitened", "basis_rank": {"gate_up": 48},
        "bpw": 2.125 + layer, "predicted_error": 0.0123 * (layer + 1), "predicted_error_by_projection": None,
        "measured_error": 0.0234 * (layer + 1), "measured_error_by_projection": None, "output_error": 0.03,
        "solver_gap": 0.0, "tokens_per_expert": {"min": 1, "max": 2}, "extreme_experts": [], "unseen_experts": [],
        "mean_bits_by_expert": {}, "weights_by_width": {}, "compensator_ranks": None,
    }  # fmt: skip


def report(**changes: Any) -> ModelReport:
    data = {
        "bpw": 2.1249, "expert_weights": 3_145_728, "expert_bytes": 30_000, "calibration_tokens": 65_536,
        "options": {"bits": 2.125, "objective": "bitsmoe", "calib": "my|text`.txt", "seed": 0}, "sanity": SANITY,
        "model_budget": None, "model_tuning": None, "layers": [row(0), row(1)], "dense_layers": None,
    } | changes  # fmt: skip
    return ModelReport.model_validate(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hub") / "checkpoint"
    write_tiny_qwen3_moe(directory, max_shard_bytes=600_000)
    return directory


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "checkpoint")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "place-of-mine" / "my model"
    directory.mkdir(parents=True)
    return directory


TEXT = CalibrationText("calib.txt", "calib.txt (text)")


def card_of(checkpoint: Path, model: str, source: Path, text: CalibrationText = TEXT, **changes: Any) -> ModelCard:
    write_card(checkpoint, model, source, report(**changes), text)
    return ModelCard((checkpoint / "README.md").read_text())


# Cards.


def test_a_card_says_what_the_hub_wants_to_know(checkpoint: Path, source: Path) -> None:
    (source / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\nlanguage: en\n---\n# The original\n")
    card = card_of(checkpoint, "Qwen/Qwen3-30B-A3B", source)
    assert card.data.to_dict() == {
        "base_model": "Qwen/Qwen3-30B-A3B", "base_model_relation": "quantized", "library_name": "vllm",
        "pipeline_tag": "text-generation", "license": "apache-2.0",
        "tags": ["bitsmoe", "mixture-of-experts", "quantized"],
    }  # fmt: skip
    assert "The original" not in card.text
    assert "(`calib.txt (text)`)" in card.text


def test_a_card_names_the_dataset_of_the_hub(checkpoint: Path, source: Path) -> None:
    text = CalibrationText("hf:allenai/c4", "hf:allenai/c4 (configuration en, split train, `text` of its rows)")
    card = card_of(checkpoint, "Qwen/Qwen3-30B-A3B", source, text)
    assert card.data.datasets == ["allenai/c4"]
    assert "hf:allenai/c4 (configuration en, split train, 'text' of its rows)" in card.text
    local = card_of(checkpoint, "Qwen/Qwen3-30B-A3B", source, CalibrationText("hf:mine", "hf:mine (split train)"))
    assert local.data.datasets is None


def test_a_card_has_the_reports_figures(checkpoint: Path, source: Path) -> None:
    text = card_of(checkpoint, "Qwen/Qwen3-30B-A3B", source).text
    total = sum(spec.nbytes for spec in Checkpoint(checkpoint).tensors.specs.values())
    for line in (
        "# `Qwen3-30B-A3B`, experts at 2.125 bits per weight",
        "| original model | [Qwen/Qwen3-30B-A3B](https://huggingface.co/Qwen/Qwen3-30B-A3B) |",
        "| bits per expert weight, scales, bases and metadata counted | 2.1249 |",
        "| expert weights | 3,145,728 |",
        "| size of the experts | 0.03 MB |",
        f"| size of everything else | {(total - 30_000) / 1e6:.2f} MB |",
        "| perplexity of the original on 8,192 tokens of the calibration text | 43.96 |",
        "| perplexity of this model on them | 44.5 |",
        "    vllm serve MODEL --quantization bitsmoe",
        "| `model.layers.0.mlp.experts` | whitened | 2.1250 | 0.0123 | 0.0234 |",
        "| `model.layers.1.mlp.experts` | whitened | 3.1250 | 0.0246 | 0.0468 |",
        "| bits | `2.125` |",
        r"| calib | `my\|text'.txt` |",
    ):
        assert f"\n{line}\n" in f"\n{text}\n", line
    assert "quantized with bitsmoe-vllm; nothing else is." in text
    assert "KL divergence" not in text
    assert "broken" not in text


def test_a_card_names_layers_outside_the_experts(checkpoint: Path, source: Path) -> None:
    linear = {"bits": [4], "matrices": 3, "weights": 18_000, "bytes": 10_000, "bits_per_weight": 4.4}
    text = card_of(checkpoint, "me/model", source, dense_layers=linear).text
    total = sum(spec.nbytes for spec in Checkpoint(checkpoint).tensors.specs.values())
    assert "quantized with bitsmoe-vllm; the linear layers outside them are at 4 bits." in text
    assert "| size of the linear layers outside the experts | 0.01 MB |" in text
    assert f"| size of everything else | {(total - 40_000) / 1e6:.2f} MB |" in text


def test_a_card_says_that_a_model_is_broken(checkpoint: Path, source: Path) -> None:
    sanity = SANITY | {"perplexity_quantized": None, "degenerate": True, "faults": ["it stammers"]}
    text = card_of(checkpoint, "a/b", source, sanity=sanity).text
    assert "| perplexity of this model on them | infinite |" in text
    assert "**This model is broken: it stammers.**" in text


def test_a_local_directory_gives_its_name_only(checkpoint: Path, source: Path) -> None:
    card = card_of(checkpoint, str(source), source)
    assert "# `my model`, experts at" in card.text
    assert "| original model | `my model` |" in card.text
    assert card.data.get("base_model") is None
    assert card.data.get("base_model_relation") is None
    assert str(source.parent) not in str(card)
    assert source.parent.name not in str(card)


def test_equal_inputs_equal_bytes(made: Path, tmp_path: Path, source: Path) -> None:
    cards = []
    for name in ("a", "b"):
        directory = shutil.copytree(made, tmp_path / name)
        card_of(directory, str(source), source)
        cards.append((directory / "README.md").read_bytes())
    assert cards[0] == cards[1]
    assert not re.search(rb"\b20\d\d-\d\d", cards[0])


def test_the_name_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen3-30B-A3B" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    assert base_model("Qwen/Qwen3-30B-A3B", snapshot) == ("Qwen/Qwen3-30B-A3B",) * 2
    assert base_model(str(snapshot), snapshot) == ("Qwen/Qwen3-30B-A3B",) * 2
    monkeypatch.chdir(snapshot)
    assert base_model(".", Path(".")) == ("Qwen/Qwen3-30B-A3B",) * 2
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert base_model(".", Path(".")) == (None, "mine")


@pytest.mark.parametrize(
    ("head", "base", "found"),
    [
        ("license: mit", None, {"license": "mit"}),
        ("license: [mit, apache-2.0]", None, {"license": ["mit", "apache-2.0"]}),
        (
            "license: other\nlicense_name: their-own\nlicense_link: LICENSE.txt",
            "a/b",
            {
                "license": "other",
                "license_name": "their-own",
                "license_link": "https://huggingface.co/a/b/blob/main/LICENSE.txt",
            },
        ),
        ("license: other\nlicense_link: LICENSE", None, {"license": "other"}),
        (
            "license: other\nlicense_link: https://example.org/l",
            None,
            {"license": "other", "license_link": "https://example.org/l"},
        ),
        ("language: en", None, {}),
        ("license: [", None, {}),
        ("- a list", None, {}),
        ("license: '\x00'", None, {}),
    ],
)
def test_the_originals_license(head: str, base: str | None, found: dict[str, Any], source: Path) -> None:
    (source / "README.md").write_text(f"---\n{head}\n---\ntext")
    assert source_license(source, base) == found


def test_no_license_without_a_card(source: Path) -> None:
    assert source_license(source, None) == {}
    (source / "README.md").write_bytes(b"\xff\xfe")
    assert source_license(source, None) == {}
    (source / "README.md").write_text("no front matter")
    assert source_license(source, None) == {}


@pytest.mark.parametrize("name", ["a|b", "x`y", "line\nbreak", "<script>", "[l](http:x)", "---", "naïve 模型"])
def test_names_that_mean_something_in_markdown_or_yaml(name: str, checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / name
    source.mkdir()
    card = card_of(checkpoint, str(source), source)
    assert yaml.safe_load(str(card).split("---\n")[1])["pipeline_tag"] == "text-generation"
    lines = card.text.splitlines()
    tables = [line for line in lines if line.startswith("| original model")]
    assert len(tables) == 1
    assert len(re.findall(r"(?<!\\)\|", tables[0])) == 3
    assert tables[0].count("`") == 2


def test_a_dequantized_model_has_no_card_of_the_quantized_one(checkpoint: Path, source: Path, tmp_path: Path) -> None:
    import torch

    card_of(checkpoint, "a/b", source)
    dequantize_checkpoint(checkpoint, tmp_path / "plain", torch.float32)
    names = {p.name for p in (tmp_path / "plain").iterdir()}
    assert "README.md" not in names
    assert "tokenizer.json" in names


# Push.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def refused(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(BitsmoeError) as e:
        push(*args, **kwargs)
    return str(e.value)


def test_push(hub: FakeHub, checkpoint: Path, source: Path) -> None:
    card_of(checkpoint, "a/b", source)
    (checkpoint / "bitsmoe_report.json").write_text("{}")
    whole = contents(checkpoint)
    (checkpoint / "notes.txt").write_text("mine")
    (checkpoint / ".env").write_text("SECRET=1")
    (checkpoint / "leftover.safetensors").write_text("x")
    (checkpoint / "sub").mkdir()
    (checkpoint / "sub" / "config.json").write_text("{}")
    assert push(checkpoint, "me/model") == f"{hub.url}/me/model"
    repository = hub.repositories["me/model"]
    assert repository.branches == {"main": whole}
    assert repository.commits == 1
    assert not repository.private


def test_push_again_replaces_shards(hub: FakeHub, checkpoint: Path) -> None:
    push(checkpoint, "me/model")
    assert "model.safetensors.index.json" in hub.repositories["me/model"].branches["main"]
    hub.repositories["me/model"].branches["main"]["LICENSE"] = b"added there"
    for path in checkpoint.iterdir():
        path.unlink()
    write_tiny_qwen3_moe(checkpoint)
    push(checkpoint, "me/model")
    found = hub.repositories["me/model"].branches["main"]
    assert found == contents(checkpoint) | {"LICENSE": b"added there"}


def test_a_name_alone_is_the_users_own(hub: FakeHub, checkpoint: Path) -> None:
    assert push(checkpoint, "model") == f"{hub.url}/me/model"


def test_push_to_a_branch(hub: FakeHub, checkpoint: Path) -> None:
    for _ in range(2):
        assert push(checkpoint, "me/model", revision="2bit") == f"{hub.url}/me/model/tree/2bit"
    assert hub.repositories["me/model"].branches == {"main": {}, "2bit": contents(checkpoint)}


def test_private(hub: FakeHub, checkpoint: Path) -> None:
    push(checkpoint, "me/model", private=True)
    assert hub.repositories["me/model"].private
    push(checkpoint, "me/model", private=True)
    push(checkpoint, "me/public")
    before = len(hub.requests)
    assert "me/public: exists and is public, but --private was given" in refused(checkpoint, "me/public", private=True)
    assert not any("commit" in r or "preupload" in r for r in hub.requests[before:])


def test_all_faults_before_anything_is_sent(
    hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] |= {"surprise": 1, "block_size": 5}
    (checkpoint / "config.json").write_text(json.dumps(config))
    message = refused(checkpoint, "me/--bad--/name")
    assert "'me/--bad--/name' cannot be a repository's name" in message
    assert "no token for the Hub: run `hf auth login`" in message
    assert "surprise: Extra inputs are not permitted" in message
    assert "block_size" in message
    assert hub.requests == []


def test_damage_outside_the_experts_is_found(hub: FakeHub, checkpoint: Path) -> None:
    path = next(p for p in checkpoint.glob("*.safetensors") if "model.norm.weight" in load_file(p))
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    message = refused(checkpoint, "me/model")
    assert f"tensor model.norm.weight: 1 of {len(tensors['model.norm.weight'])} values are NaN or infinite" in message
    assert hub.requests == []


@pytest.mark.parametrize("name", ["", "a/b/c", "a b", "-x", "x" * 100, "a--b", "x.git", "/x", "me/"])
def test_names_no_repository_can_have(hub: FakeHub, checkpoint: Path, name: str) -> None:
    assert "cannot be a repository's name" in refused(checkpoint, name)
    assert hub.requests == []


def test_a_card_that_cannot_be_read(hub: FakeHub, checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("---\nlicense: [\n---\n")
    assert "README.md: the metadata at its top cannot be read" in refused(checkpoint, "me/model")
    assert hub.requests == []


def test_links_are_not_followed_to_other_places(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    (checkpoint / "README.md").symlink_to(tmp_path / "key")
    assert f"README.md is a link to {tmp_path / 'key'}, outside the checkpoint" in refused(checkpoint, "me/model")
    assert hub.requests == []


def test_an_ordinary_checkpoint_is_not_pushed(hub: FakeHub) -> None:
    assert "expected 'bitsmoe'" in refused(TINY_MOE, "me/model")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("where", "status", "said"),
    [
        ("repos/create", 401, "refuses with status 401: the token is not valid, run `hf auth login`"),
        ("repos/create", 403, "refuses with status 403: the token may not write there"),
        ("commit", 403, "refuses with status 403"),
        ("preupload", 400, "refuses with status 400"),
    ],
)
def test_the_hub_refuses(hub: FakeHub, checkpoint: Path, where: str, status: int, said: str) -> None:
    hub.fail = {where: status}
    assert f"me/model: the Hub {said}" in refused(checkpoint, "me/model")


def test_metadata_the_hub_does_not_take(hub: FakeHub, checkpoint: Path, source: Path) -> None:
    card_of(checkpoint, "a/b", source)
    hub.card_errors = ['"license" must be one of these']
    message = refused(checkpoint, "me/model")
    assert "me/model: the upload failed" in message
    assert "must be one of these" in message
    assert hub.repositories["me/model"].commits == 0


def test_without_network(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "me/model: the Hub cannot be reached" in refused(checkpoint, "me/model")


def test_offline_mode(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "me/model: the Hub cannot be reached" in refused(checkpoint, "me/model")
    assert hub.requests == []
