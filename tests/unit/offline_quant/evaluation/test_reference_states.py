"""A reference that is run once: its hidden states are kept in a file, for its own text and model alone."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitsmoe_kernels.errors import BitsmoeError
from families import make_model
from offline_quant.evaluation import evaluate as module
from offline_quant.evaluation import reference_states as states_module
from offline_quant.evaluation.evaluate import Evaluation, Reference, evaluate, evaluate_named

TEXT = "She opened the door, and there stood her brother with the lamp in his hand. " * 40
Passes = list[Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text(TEXT.upper())
    make_model("Qwen3MoeForCausalLM", folder / "reference", num_hidden_layers=2)
    shutil.copytree(folder / "reference", folder / "model")
    tensors = load_file(folder / "model" / "model.safetensors")
    head = torch.randn(tensors["lm_head.weight"].shape, generator=torch.Generator().manual_seed(0))
    tensors["lm_head.weight"] += 0.1 * head
    save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """Models that run, in turn."""
    seen: Passes = []
    usual: Callable = module._pass

    def counted(model, windows):
        seen.append(model.source.directory)
        return usual(model, windows)

    monkeypatch.setattr(module, "_pass", counted)
    return seen


def test_the_reference_runs_once_and_figures_stay_the_same(made: Path, tmp_path: Path, passes: Passes) -> None:
    model, reference, text = made / "model", made / "reference", made / "text.txt"
    kept = tmp_path / "deep" / "states.safetensors"
    expected = evaluate(model, text, reference)
    passes.clear()
    first = evaluate(model, text, reference, reference_states=kept)
    assert passes == [reference, model]
    second = evaluate(model, text, reference, reference_states=kept)
    third = Reference(reference, text, states=kept).evaluate(model)
    assert passes == [reference, model, model, model]
    assert expected.kl
    assert first == second == third == expected
    assert [p.name for p in kept.parent.iterdir()] == [kept.name]


def figures(made: Path, kept: Path, text: str = "text.txt", reference: str = "reference") -> Evaluation:
    return evaluate(made / "model", made / text, made / reference, reference_states=kept)


def test_a_file_of_another_model_or_text_is_refused(made: Path, tmp_path: Path, passes: Passes) -> None:
    kept = tmp_path / "states.safetensors"
    figures(made, kept)
    passes.clear()
    with pytest.raises(BitsmoeError, match=r"states\.safetensors: was written for another text than those"):
        figures(made, kept, text="other.txt")
    with pytest.raises(BitsmoeError, match="was written for another model than those"):
        figures(made, kept, reference="model")
    assert passes == []


def test_a_file_of_something_else_is_refused_and_stays(made: Path, tmp_path: Path, passes: Passes) -> None:
    kept = tmp_path / "states.safetensors"
    kept.write_text("not tensors")
    with pytest.raises(BitsmoeError, match="holds no hidden states of a reference"):
        figures(made, kept)
    assert kept.read_text() == "not tensors"
    save_file(load_file(made / "model" / "model.safetensors"), kept)
    with pytest.raises(BitsmoeError, match="holds no hidden states of a reference"):
        figures(made, kept)
    assert passes == []


def test_a_file_that_cannot_be_written_is_refused_before_a_model_runs(
    made: Path, tmp_path: Path, passes: Passes
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BitsmoeError, match="cannot be written"):
        figures(made, tmp_path / "file" / "states.safetensors")
    assert passes == []


def test_a_full_disk_leaves_nothing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_text("a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(states_module, "save_file", full)
    with pytest.raises(BitsmoeError, match=r"cannot be written .*No space left"):
        figures(made, tmp_path / "states.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_states_without_a_reference_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(BitsmoeError, match="there is no --reference"):
        evaluate_named(str(made / "model"), str(made / "text.txt"), reference_states=tmp_path / "s.safetensors")


def test_kept_states_are_those_of_the_last_layer(made: Path, tmp_path: Path) -> None:
    """A changed state changes the figures: they are what the comparison reads."""
    kept = tmp_path / "states.safetensors"
    expected = figures(made, kept)
    with pytest.MonkeyPatch.context() as patch:
        usual = module.StatesFile.read
        patch.setattr(module.StatesFile, "read", lambda file: usual(file).mul_(1.5))
        changed = figures(made, kept)
    assert changed.perplexity == expected.perplexity
    assert dataclasses.replace(changed, kl=0.0) != dataclasses.replace(expected, kl=0.0)
