"""Tuning of the whole model: gradients against those of transformers' model, and what comes out."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

from bitsmoe_kernels.format.checkpoint import Checkpoint
from bitsmoe_kernels.models.families import FAMILIES, decoder_of, moe_shape
from bitsmoe_kernels.reference import LayerWeights
from families import IDS, family_cases, make_quantized, whole_model
from offline_quant.checkpoint.dequantize import dequantize_checkpoint
from offline_quant.model.expert_files import module_tensors
from offline_quant.model.quantized import as_read, open_model
from offline_quant.model.streaming import StreamedModel
from offline_quant.rounding import model_tuning
from offline_quant.rounding.model_tuning import StoredLayers, layer_visits, tune_model

LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "Granite": lambda x: x / 2,
    "Cohere": lambda x: x / 4,
    "Gemma": lambda x: 5 * (x / 5).tanh(),
}
"""What the random models of architectures do to the products of the head, by the beginning of their names."""


def stored_layers(directory: Path) -> StoredLayers:
    checkpoint = Checkpoint(directory)
    shape = moe_shape(checkpoint.model_config, str(directory))

    def load(index: int) -> dict[str, Tensor]:
        prefix = shape.prefix(index)
        names = checkpoint.config.layers[prefix].tensor_specs(checkpoint.config.block_size)
        return {name: checkpoint.tensors.get(f"{prefix}.{name}") for name in names}

    schemas = {index: checkpoint.config.layers[shape.prefix(index)] for index in shape.layers}
    return StoredLayers(schemas, checkpoint.config.block_size, load)


def noisy_states(directory: Path, windows: Tensor, noise: float) -> Callable[[int], Tensor]:
    """What leaves the last layer of another model: that of the checkpoint, and noise."""
    model = StreamedModel(open_model(directory))
    tuner = model_tuning._Tuner(model, stored_layers(directory))
    states = tuner.forward(windows, lambda: None)[-1]
    states += noise * states.std() * torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    return lambda i: states[i]


@pytest.mark.slow
@pytest.mark.parametrize("codes", [False, True], ids=["scales", "codes"])
@pytest.mark.parametrize(
    ("architecture", "form"),
    [
        *family_cases(FAMILIES, "natural"),
        *(("Qwen3MoeForCausalLM", f) for f in ("expert_order_basis", "paper", "extras")),
    ],
)
def test_gradients_are_those_of_the_whole_model(architecture: str, form: str, codes: bool, tmp_path: Path) -> None:
    directory, family = make_quantized(architecture, tmp_path / "model", form), FAMILIES[architecture]
    stored, model = stored_layers(directory), StreamedModel(open_model(directory))
    wanted = noisy_states(directory, IDS, 0.3)
    tuner = model_tuning._Tuner(model, stored, codes)
    entering = tuner.forward(IDS, lambda: None)
    aim = torch.stack([wanted(i) for i in range(len(IDS))])
    lost, gradient = model_tuning._divergence(model, model.head, entering.pop(), aim)
    assert list(tuner.backward(IDS, entering, gradient)) == list(reversed(range(model.num_layers)))

    dequantize_checkpoint(directory, tmp_path / "plain", torch.float32)
    whole = whole_model(tmp_path / "plain")
    decoder = next(name for name, module in whole.named_modules() if module is decoder_of(whole))
    changes: dict[tuple[int, str, str], Tensor] = {}
    levels: dict[tuple[int, str], list[Tensor]] = {}
    weights = {}
    for index in stored.schemas:
        given = stored.load(index)
        for name in stored.schemas[index].projections:
            for side in ("component", "feature"):
                key = f"{name}_{side}_scale"
                changes[index, name, side] = torch.zeros(given[key].shape, requires_grad=True)
                given[key] = given[key].float() * (1 + changes[index, name, side])
        layer = LayerWeights(stored.schemas[index], stored.block_size, given)
        if codes:
            for name, part in layer.projections.items():
                levels[index, name] = [q.requires_grad_() for q in map(part.levels, range(layer.layer.num_experts))]
                vars(part)["levels"] = levels[index, name].__getitem__
        experts = as_read(layer, range(stored.schemas[index].num_experts))
        name = f"{decoder}.layers.{index}.{family.module_experts}"
        weights |= {f"{name}.{n}": w for n, w in module_tensors(family, experts).items()}
    logits = functional_call(whole, weights, (IDS,)).logits
    with torch.no_grad():
        normed = aim
        for name in family.module_tail:
            normed = decoder_of(whole).get_submodule(name)(normed)
        finish = next((f for start, f in LOGITS.items() if architecture.startswith(start)), lambda x: x)
        target = finish(whole.get_output_embeddings()(normed)).log_softmax(-1)
    loss = (target.exp() * (target - logits.log_softmax(-1))).sum()
    assert lost == pytest.approx(float(loss.detach()), rel=1e-3)
    loss.backward()
    moved = 0.0
    for (index, name, side), change in changes.items():
        part = tuner.changes[index][name]
        lists = part.components if side == "component" else part.features
        found = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for p in lists])
        assert change.grad is not None
        assert float((found - change.grad).norm()) <= 2e-3 * float(change.grad.norm()), (index, name, side)
        moved += float(found.norm())
    coded = 0.0
    for (index, name), given_levels in levels.items():
        part, latent = stored.weights(index, model.device).projections[name], tuner.changes[index][name].latent
        assert latent is not None
        width = part.part("bits").repeat_interleave(part.block_size, 1)
        for e, q in enumerate(given_levels):
            order, own = part.order(e), latent.levels[e].grad
            if own is None:  # an expert that is kept, or that no token reaches
                assert q.grad is None or not q.grad.any()
                continue
            assert q.grad is not None
            whole_grad = q.grad * (width[e, : len(q), None] > 0)  # rows of no bits have no codes
            off = (own if order is None else own[order]) - whole_grad
            assert float(off.norm()) <= 2e-3 * float(q.grad.norm()), (index, name, e)
            coded += float(whole_grad.norm())
    assert (coded > 0) == codes
    assert moved > 0


@pytest.fixture
def spoiled(tmp_path: Path) -> tuple[Path, Path]:
    """A quantized model, and the same with scales that are off by 15%."""
    good, bad = make_quantized("Qwen3MoeForCausalLM", tmp_path / "good"), tmp_path / "bad"
    shutil.copytree(good, bad)
    tensors, g = load_file(bad / "model.safetensors"), torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if name.endswith("_scale") and ".experts." in name:
            tensors[name] = (tensor.float() * (1 + 0.15 * torch.randn(tensor.shape, generator=g))).half()
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    return good, bad


@pytest.mark.slow
@pytest.mark.parametrize("codes", [False, True], ids=["scales", "codes"])
def test_tuning_finds_scales_that_were_spoiled(
    codes: bool, spoiled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = spoiled
    monkeypatch.setattr(model_tuning, "STEP_TOKENS", 128)
    monkeypatch.setattr(model_tuning, "CODE_PASSES" if codes else "PASSES", 6)
    monkeypatch.setattr(model_tuning, "RATE", 0.07)
    windows = torch.randint(4096, (16, 32), generator=torch.Generator().manual_seed(2))
    stored, model, visits = stored_layers(bad), StreamedModel(open_model(bad)), []
    wanted = noisy_states(good, windows, 0)
    found = tune_model(model, stored, windows, wanted, 2, on_layer=lambda: visits.append(1), codes=codes)
    assert len(visits) == layer_visits(model.num_layers, windows, 2, codes)
    assert found.after < 0.6 * found.before
    given = stored.load(0)
    assert {k: (v.dtype, v.shape) for k, v in found.tensors[0].items()} == {
        k: (v.dtype, v.shape) for k, v in given.items() if k.endswith(("_scale", "_codes") if codes else "_scale")
    }
    # The judged divergence is that of the tensors as they are stored.
    tuned = StoredLayers(stored.schemas, stored.block_size, lambda i: stored.load(i) | found.tensors[i])
    tuner = model_tuning._Tuner(model, tuned)
    states = tuner.forward(windows[:2], lambda: None)[-1]
    assert torch.equal(states, found.states)
    again = tune_model(model, stored, windows, wanted, 2, codes=codes)
    assert all(torch.equal(again.tensors[i][k], v) for i, tensors in found.tensors.items() for k, v in tensors.items())


def test_scales_that_lower_nothing_are_not_kept(spoiled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = spoiled
    monkeypatch.setattr(model_tuning, "RATE", 300.0)
    windows = IDS[:, :16]
    model = StreamedModel(open_model(bad))
    found = tune_model(model, stored_layers(bad), windows, noisy_states(good, windows, 0), 1)
    assert found.tensors == {}
    assert not found.after < found.before


def test_a_divergence_that_rounds_below_zero_is_none(
    spoiled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = model_tuning._divergence
    monkeypatch.setattr(model_tuning, "_divergence", lambda *given: (-1e-9, usual(*given)[1]))
    windows = IDS[:, :16]
    found = tune_model(
        StreamedModel(open_model(spoiled[1])),
        stored_layers(spoiled[1]),
        windows,
        noisy_states(spoiled[0], windows, 0),
        1,
    )
    assert found.tensors == {}
