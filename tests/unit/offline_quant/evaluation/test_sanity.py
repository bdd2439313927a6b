"""The sanity gate: a model that works passes, one that repeats itself or is lost is called broken."""

import math

import pytest
import torch

from builders import TINY_MOE
from offline_quant.calibration import token_gradients
from offline_quant.calibration.token_gradients import token_powers, token_weights
from offline_quant.evaluation import sanity
from offline_quant.evaluation.sanity import Tally, tally, verdict
from offline_quant.model.source import SourceModel
from offline_quant.model.streaming import StreamedModel


def counts(*pairs):
    out = torch.zeros(50, dtype=torch.int64)
    for token, n in pairs:
        out[token] = n
    return out


REMEDY = "give more bits"
WORKING = Tally(300.0, 100, counts((3, 20), (4, 30), (5, 50)))


def test_a_working_model_is_sane():
    found = verdict(WORKING, Tally(310.0, 100, counts((3, 25), (4, 25), (5, 50))), REMEDY)
    assert not found.degenerate
    assert found.faults == []
    assert found.advice is None
    assert found.perplexity_original == pytest.approx(math.exp(3.0))
    assert found.perplexity_quantized == pytest.approx(math.exp(3.1))


@pytest.mark.parametrize("nll", [400.0, 1e9, float("nan"), float("inf")])
def test_a_lost_model_is_broken(nll):
    found = verdict(WORKING, Tally(nll, 100, WORKING.likeliest), REMEDY)
    assert found.degenerate
    assert "perplexity on calibration text" in found.faults[0]
    assert found.advice == REMEDY


@pytest.mark.parametrize(
    ("done", "words"),
    [
        (
            (False, False, False, False, False),
            [
                "--bits",
                "(--budget model --fit layer --token-weights model --tune-model)",
                "--calib",
                "--basis natural",
            ],
        ),
        ((True, True, True, False, False), ["--bits", "(--tune-model)", "--calib", "--basis natural"]),
        ((False, True, True, True, False), ["--bits", "(--budget model)", "--calib", "--basis natural"]),
        ((True, False, True, True, True), ["--bits", "(--fit layer)", "--calib"]),
        ((True, True, True, True, True), ["--bits", "--calib"]),
    ],
)
def test_advice_names_what_was_not_done(done, words):
    found = sanity.advice(*done)
    places = [found.index(word) for word in words]
    assert places == sorted(places)
    assert ("more time" in found) is not all(done[:4])
    assert ("--basis" in found) is not done[4]


def test_a_model_that_repeats_one_token_is_broken():
    varied = Tally(300.0, 100, torch.full((50,), 2))
    found = verdict(varied, Tally(320.0, 100, counts((0, 95), (1, 5))), REMEDY)
    assert found.faults == ["token 0 is the likeliest at 95% of positions, no token at more than 2% for the original"]
    assert not verdict(WORKING, Tally(320.0, 100, counts((0, 60), (1, 40))), REMEDY).degenerate  # 50% is usual there


@pytest.fixture(scope="module")
def tiny():
    return StreamedModel(SourceModel(TINY_MOE))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1000, 5000])
def test_tally_is_the_models_own_loss(tiny, monkeypatch, rows):
    monkeypatch.setattr(sanity, "VOCABULARY_ROWS", rows)
    windows = torch.randint(0, 4096, (3, 20), generator=torch.Generator().manual_seed(0))
    batches = tiny.embed_windows(torch.cat([windows, windows]), 40)
    for index in range(tiny.num_layers):
        with tiny.layer(index) as module:
            batches = [(tiny.run(module, h, kw), kw) for h, kw in batches]
    found = tally(tiny, windows, [h for h, _ in batches])
    whole = StreamedModel(SourceModel(TINY_MOE)).materialize()
    with torch.no_grad():
        logits = whole(input_ids=windows).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
    assert found.tokens == 3 * 19
    assert found.nll == pytest.approx(float(loss), rel=1e-4)
    assert torch.equal(found.likeliest, torch.bincount(logits.argmax(-1).flatten(), minlength=4096))


@pytest.mark.slow
def test_gradients_equal_autograd_through_the_whole_model(tiny, monkeypatch):
    """Against one backward pass with gradients at every layer's output, tokens drawn by the same generator."""
    monkeypatch.setattr(token_gradients, "BATCH_TOKENS", 24)
    windows = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(1))
    found = token_powers(tiny, windows, seed=7)
    whole = StreamedModel(SourceModel(TINY_MOE)).materialize()
    outputs = []
    for layer in whole.model.layers:
        layer.register_forward_hook(lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    embedded = whole.model.embed_tokens(windows).detach().requires_grad_(True)
    logits = whole(inputs_embeds=embedded, use_cache=False).logits
    logp = logits.float().log_softmax(-1)
    generator = torch.Generator().manual_seed(7)
    drawn = torch.cat([torch.multinomial(row.detach().exp(), 1, generator=generator) for row in logp])
    gradients = torch.autograd.grad(-logp.flatten(0, 1).gather(1, drawn).sum(), outputs)
    assert sorted(found) == list(range(tiny.num_layers))
    for index, power in found.items():
        assert torch.allclose(power, gradients[index].double().square().sum(-1).flatten(), rtol=1e-3)


def test_a_token_counts_by_the_root_of_what_is_felt_of_it():
    """Whatever its size: float32 would not hold the last one."""
    for size in (1.0, 1e60):
        weights = token_weights(size * torch.tensor([1.0, 4.0, 0.0, 25.0]).double())
        assert weights.tolist() == pytest.approx([0.5, 1.0, 0.0, 2.5])
        assert weights.dtype == torch.float32
    assert token_weights(torch.zeros(3).double()).tolist() == [1.0, 1.0, 1.0]
