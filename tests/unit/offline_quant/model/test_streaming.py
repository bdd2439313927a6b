"""Layer-by-layer execution and evaluation against transformers' own model, loaded whole."""

import inspect
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.scale import MODELS
from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.schema import TensorSpec
from bitsmoe_kernels.models.families import moe_shape
from builders import TINY_MOE
from offline_quant.allocation.objectives import may_share_bases
from offline_quant.calibration.sources.self_written import sample_windows, sampling_bytes
from offline_quant.calibration.windows import load_tokenizer
from offline_quant.config import QuantizeConfig
from offline_quant.evaluation.evaluate import evaluate
from offline_quant.layer.context import LayerContext
from offline_quant.model.sizes import RunSizes
from offline_quant.model.source import SourceModel
from offline_quant.model.streaming import StreamedModel
from offline_quant.pipeline.memory import estimate_memory
from offline_quant.runtime.distributed import Workers
from offline_quant.runtime.malloc import LARGE_MATRIX, trim

TEXT = "The old man looked at the sea, and said nothing for a long while. " * 120


@pytest.fixture(scope="module")
def whole():
    return AutoModelForCausalLM.from_pretrained(str(TINY_MOE), dtype=torch.float32).eval()


@pytest.fixture
def streamed():
    return StreamedModel(SourceModel(TINY_MOE))


def run_all(model, ids):
    hidden, kwargs = model.embed(ids)
    for index in range(model.num_layers):
        with model.layer(index) as module:
            hidden = model.run(module, hidden, kwargs)
    return hidden


def test_logits_equal_the_whole_model(whole, streamed):
    ids = torch.randint(0, 4096, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole(ids).logits
    got = streamed.logits(run_all(streamed, ids), streamed.head)
    assert torch.allclose(got, expected, atol=2e-4)


def test_products_may_be_bfloat16(streamed):
    """As while gradients are taken where the device is faster with it; routing weights are bfloat16 then too."""
    hidden, kwargs = streamed.embed(torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(0)))
    with streamed.layer(0) as module, torch.no_grad():
        expected = streamed.run(module, hidden, kwargs)
        with torch.autocast("cpu", torch.bfloat16):
            found = streamed.run(module, hidden, kwargs)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert float((found - expected).norm()) < 0.02 * float((expected - hidden).norm())


def test_a_tokenizer_of_another_model_is_refused(streamed):
    with pytest.raises(BitsmoeError, match="token id 5000, but the model's vocab_size is 4096"):
        streamed.embed(torch.tensor([[1, 5000]]))


def test_layers_are_released(streamed):
    with streamed.layer(1) as module:
        # Experts stay in the checkpoint until they are called.
        assert {n for n, p in module.named_parameters() if p.is_meta} == {
            "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
        }  # fmt: skip
    assert all(p.is_meta for layer in streamed.decoder.layers for p in layer.parameters())


def test_captured_inputs_are_those_of_the_experts(whole, streamed):
    ids = torch.randint(0, 4096, (2, 30), generator=torch.Generator().manual_seed(1))
    expected = []
    handle = whole.model.layers[2].mlp.experts.register_forward_pre_hook(lambda _, args: expected.append(args))
    with torch.no_grad():
        whole(ids)
    handle.remove()
    hidden, kwargs = streamed.embed(ids)
    for index in range(2):
        with streamed.layer(index) as module:
            hidden = streamed.run(module, hidden, kwargs)
    with streamed.layer(2) as module:
        seen, rest = streamed.expert_inputs(module, hidden, kwargs)
        full = streamed.run(module, hidden, kwargs)
        with torch.no_grad():
            share = whole.model.layers[2].mlp.experts(seen.x, seen.topk_ids, seen.topk_weights)
            (together,) = streamed.through(module, [(hidden, kwargs)])
    assert torch.allclose(rest + share.view_as(full), full, atol=1e-4)
    assert torch.allclose(together, full, atol=1e-4)
    x, topk_ids, weights = expected[0]
    assert torch.allclose(seen.x, x.reshape(-1, 256), atol=1e-4)
    assert torch.equal(seen.topk_ids, topk_ids)
    assert torch.allclose(seen.topk_weights, weights, atol=1e-5)


def test_a_materialized_model_generates_like_the_whole_one(whole, streamed):
    ids = torch.tensor([[0, 17, 99]])
    with torch.no_grad():
        assert torch.allclose(streamed.materialize()(ids).logits, whole(ids).logits, atol=2e-4)


@pytest.mark.slow
def test_perplexity_and_divergence_equal_a_plain_computation(whole, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    ids = load_tokenizer(TINY_MOE)(TEXT)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 512 * 512]).view(-1, 512)
    with torch.no_grad():
        logp = whole(windows).logits[:, :-1].double().log_softmax(-1)
    nll = -logp.gather(-1, windows[:, 1:, None]).mean()
    result = evaluate(TINY_MOE, text, TINY_MOE)
    assert result.tokens == windows[:, 1:].numel()
    assert result.window == 512
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert result.perplexity_reference == result.perplexity
    assert result.kl == pytest.approx(0, abs=1e-9)
    assert result.top1_agreement == 1.0
    assert result.excess == result.excess_stderr == result.top1_agreement_stderr == 0
    assert result.bpw == 16


@pytest.mark.slow
def test_standard_errors_are_those_of_means_over_independent_windows(whole, tmp_path):
    path, other = tmp_path / "text.txt", tmp_path / "other"
    words, generator = TEXT.split()[:14], np.random.default_rng(0)
    text = " ".join(w for n in range(8) for w in generator.choice(words[: n + 4], 450))  # no two windows are alike
    path.write_text(text, encoding="utf-8")
    source = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32)
    with torch.no_grad():
        source.model.norm.weight *= 1 + 0.1 * torch.randn(256, generator=torch.Generator().manual_seed(0))
    source.save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_MOE / name, other)
    ids = load_tokenizer(TINY_MOE)(text)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 512 * 512]).view(-1, 512)
    with torch.no_grad():
        ref, logp = (m(windows).logits[:, :-1].double().log_softmax(-1).numpy() for m in (whole, source))
    target = windows[:, 1:].numpy()
    pick = np.arange(len(target))[:, None], np.arange(511)[None], target
    result = evaluate(other, path, TINY_MOE)
    assert len(windows) > 6
    assert result.excess == pytest.approx(np.exp(-logp[pick].mean()) - np.exp(-ref[pick].mean()), rel=1e-3)

    # Each window left out in turn: the jackknife knows nothing of derivatives and of pairs.
    def jackknife(statistic):
        n = len(windows)
        left_out = np.array([statistic(np.arange(n) != i) for i in range(n)])
        return math.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())

    divergence, agree = (np.exp(ref) * (ref - logp)).sum(-1), ref.argmax(-1) == logp.argmax(-1)
    losses, ref_losses = -logp[pick], -ref[pick]
    assert result.perplexity_stderr == pytest.approx(jackknife(lambda k: np.exp(losses[k].mean())), rel=0.1)
    assert result.kl_stderr == pytest.approx(jackknife(lambda k: divergence[k].mean()), rel=1e-3)
    assert result.top1_agreement_stderr == pytest.approx(jackknife(lambda k: agree[k].mean()), rel=1e-3)
    expected = jackknife(lambda k: np.exp(losses[k].mean()) - np.exp(ref_losses[k].mean()))
    assert result.excess_stderr == pytest.approx(expected, rel=0.1)
    assert result.excess_stderr < result.perplexity_stderr / 3


def test_one_window_has_no_standard_error(tmp_path):
    text, tokenizer = tmp_path / "text.txt", load_tokenizer(TINY_MOE)
    text.write_text(tokenizer.decode(tokenizer(TEXT)["input_ids"][:600]), encoding="utf-8")
    figures = evaluate(TINY_MOE, text, TINY_MOE).as_dict()
    assert figures["tokens"] == 511
    assert not [name for name in figures if name.endswith("_stderr")]


@pytest.mark.slow
def test_sampled_text_is_the_models_own_and_repeats_with_its_seed(whole):
    tokenizer = load_tokenizer(TINY_MOE)

    def sample(seed):
        return sample_windows(StreamedModel(SourceModel(TINY_MOE)), tokenizer, 8, 48, seed)

    first = sample(0)
    assert first.shape == (8, 48)
    assert torch.equal(first, sample(0))
    assert not torch.equal(first, sample(1))
    assert first[:, 0].tolist() == [tokenizer.bos_token_id] * 8
    with torch.no_grad():
        logp = whole(first).logits[:, :-1].log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1).mean()
    nll = -logp.gather(-1, first[:, 1:, None]).mean()
    # Text drawn at temperature 1 is as surprising as the model expects it to be.
    assert float(nll) == pytest.approx(float(entropy), rel=0.1)


def resident():
    """Anonymous memory of this process, kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def scattered():
    """A twentieth of 200 MB in blocks small enough for the heap; what lies between them was freed."""
    return [torch.ones(25_000) for _ in range(2_000)][::20]


def test_freed_memory_is_given_back_from_between_blocks_in_use():
    trim()  # what other tests have freed
    before = resident()
    kept = scattered()
    trim(LARGE_MATRIX - 1)  # small matrices: not worth it
    full = resident() - before
    trim()
    assert full > 150_000
    assert resident() - before < 0.2 * full
    assert len(kept) == 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("matrix", "size"),
    [(0, 28_000_000), (1_000_000, 28_000_000), (100_000_000, 28_000_000), (768 * 2048 * 4, 768 * 2048 * 4)],
)
def test_large_blocks_go_back_as_soon_as_they_are_freed(matrix, size):
    # A process of its own: the heap of this one holds free room from earlier tests, and large blocks then lie there.
    script = f"""
from pathlib import Path
import numpy as np
from offline_quant.runtime.malloc import keep_large_blocks_apart

{inspect.getsource(resident)}
keep_large_blocks_apart({matrix})
before = resident()
blocks = [np.ones({size}, np.uint8) for _ in range({560_000_000 // size})]
full = resident() - before
kept = blocks[::5]
del blocks
print(full, resident() - before, len(kept))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    full, left, kept = map(int, done.stdout.split())
    assert full > 500_000
    assert left < 150_000
    assert kept >= 4


@pytest.mark.slow
def test_a_chunk_of_experts_leaves_nothing_behind_for_the_next_one():
    trim()
    before, kept, found = resident(), [], []

    def work(chunk):
        found.append(resident() - before)
        kept.append(scattered())

    chunks = [range(e, e + 1) for e in range(4)]
    shape = SimpleNamespace(hidden_size=2048, intermediate_size=768)
    large = SimpleNamespace(shape=shape, chunks=chunks, workers=Workers(), on_progress=lambda experts: None)
    assert len(list(LayerContext.each(large, work))) == 4
    assert max(found) < 60_000  # three times a twentieth, not three times 200 MB
    assert len(kept) == 4


def expert_specs(shape):
    """Tensors of all experts of a model, bfloat16."""
    H, inner = shape.hidden_size, shape.intermediate_size
    return {
        name: TensorSpec(torch.bfloat16, size)
        for layer in shape.layers
        for e in range(shape.num_experts)
        for name, size in zip(shape.expert_names(layer, e), ((inner, H), (inner, H), (H, inner)), strict=True)
    }


@pytest.mark.parametrize(
    ("options", "shared"),
    [({}, True), ({"basis": "natural"}, False), ({"basis": "paper"}, True), ({"objective": "alphaq"}, False)],
)
def test_memory_of_shared_bases_is_asked_for_where_they_may_be_chosen(options, shared):
    config = MODELS["qwen3-235b-a22b"].config | {"num_hidden_layers": 1, "num_experts": 8}
    shape = moe_shape(config, "test")
    specs, H = expert_specs(shape), shape.hidden_size

    def peak(bases):
        return estimate_memory(RunSizes(shape, specs, config, 2.125, 4096, 2048, 2048), 0, bases=bases).peak

    assert may_share_bases(QuantizeConfig(bits=2.125, **options)) is shared
    assert peak(False) < peak(True) <= peak(False) + 8 * 8 * H * H  # eight double-precision matrices


def test_memory_of_the_whole_model_and_of_gradients_is_asked_for():
    config = MODELS["qwen3-30b-a3b"].config | {"num_hidden_layers": 24, "num_experts": 16}
    shape = moe_shape(config, "test")
    H = shape.hidden_size
    sizes = RunSizes(shape, expert_specs(shape), config, 2.125, 4096, 2048, 2048)

    def peak(**more):
        return estimate_memory(sizes, 0, **more).peak

    assert peak(text=sampling_bytes(sizes)) > max(peak(), 4 * shape.num_weights)
    head_and_logits = 4 * config["vocab_size"] * (H + 2048)
    assert peak(weighed=True) > max(peak(), head_and_logits)
    assert peak(tried=True) > peak() + 4 * len(shape.layers) * 2048 * H
    # Hidden states of all windows pass through the original model too, and a layer's target is held beside them.
    sizes = RunSizes(shape, expert_specs(shape), config, 2.125, 1 << 18, 2048, 2048)
    assert peak() + 4 * sizes.tokens * H < peak(fit_layer=True) <= peak(fit_layer=True, tune=True)
