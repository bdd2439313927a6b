"""The real language model of the benchmarks: its cuts into experts, and the rows that are run on them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralForCausalLM

from benchmarks.baselines.driver import BASELINES, check_request
from benchmarks.quality import OURS
from benchmarks.real_model import all_active, routed, routing
from benchmarks.real_model.rows import GROUPS
from dense_models import random_llama
from offline_quant.config import QuantizeConfig

EXPERTS, ACTIVE = 6, 4


def random_weights(intermediate: int, hidden: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    gate, up, down = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes)
    return gate, up, down


def dense_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def exact_llama() -> Any:
    """A tiny model whose weights bfloat16 holds exactly."""
    return rounded(random_llama(2))


def rounded(model: Any) -> Any:
    """A model in float64 whose parameters bfloat16 holds exactly."""
    for p in model.double().parameters():
        p.data = p.data.bfloat16().double()
    return model


def mixtral(directory: Path) -> Any:
    """A written model in transformers' plain computation, float64."""
    return MixtralForCausalLM.from_pretrained(directory, dtype=torch.float64, experts_implementation="eager")


def random_ids(windows: int) -> Tensor:
    return torch.randint(0, 64, (windows, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def first_cut(tmp_path: Path) -> Path:
    all_active.write(exact_llama(), tmp_path / "first", experts=4)
    return tmp_path / "first"


@pytest.mark.parametrize("experts", [1, 3, 8])
def test_experts_have_the_dense_mlp_as_their_mean(experts: int) -> None:
    dense = random_weights(24, 16, experts)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    parts = all_active.cut(*dense, experts)
    assert [tuple(w.shape for w in part) for part in parts] == [
        ((24 // experts, 16), (24 // experts, 16), (16, 24 // experts))
    ] * experts
    assert torch.allclose(sum(dense_mlp(x, *part) for part in parts) / experts, dense_mlp(x, *dense))


def test_the_first_cut_computes_the_dense_model_and_gives_it_back(first_cut: Path) -> None:
    ids, expected = random_ids(2), exact_llama()
    with torch.no_grad():
        logits = expected(ids).logits
        written = mixtral(first_cut)(ids).logits
        back = routed.dense_model(first_cut).double()(ids).logits
    # Mixtral's routing weights are float32.
    assert torch.allclose(written, logits, rtol=1e-5, atol=1e-5)
    assert torch.allclose(back, logits)


def test_all_experts_active_are_the_dense_mlp() -> None:
    dense = random_weights(24, 16, 0)
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mlp = routing.route(*dense, x.flatten(0, 1), EXPERTS, EXPERTS)
    mlp.router.data.zero_()
    with torch.no_grad():
        assert torch.allclose(mlp(x), dense_mlp(x, *dense))
    parts = mlp.experts()
    assert torch.allclose(sum(dense_mlp(x, *part) for part in parts) / EXPERTS, dense_mlp(x, *dense))


def test_chosen_experts_are_weighed_as_a_mixtral_weighs_them() -> None:
    dense = random_weights(24, 16, 0)
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mlp = routing.route(*dense, x, EXPERTS, ACTIVE)
    mlp.channel_scale.data = torch.linspace(0.5, 2, 24, dtype=torch.float64)
    parts, seen = mlp.experts(), set()
    for token in x:
        logits = (mlp.router @ token).tolist()
        chosen = sorted(range(EXPERTS), key=lambda e: -logits[e])[:ACTIVE]
        weights = torch.tensor([logits[e] for e in chosen], dtype=torch.float64).softmax(0)
        expected = sum(w * dense_mlp(token, *parts[e]) for w, e in zip(weights, chosen, strict=True))
        with torch.no_grad():
            assert torch.allclose(mlp(token), expected)
        seen.add(frozenset(chosen))
    assert len(seen) > 1


def test_clusters_are_the_channels_that_are_active_together() -> None:
    g = torch.Generator().manual_seed(0)
    owner = torch.randperm(40, generator=g) % 5
    # For every token one group of 8 channels of 40 is loud.
    loud = torch.randint(0, 5, (200,), generator=g)
    contribution = torch.rand(200, 40, generator=g) + 10 * (owner == loud[:, None])
    order = routing.cluster_channels(contribution, 5, seed=0)
    assert order.sort().values.equal(torch.arange(40))
    assert sorted(owner[cluster].unique().tolist() for cluster in order.chunk(5)) == [[g] for g in range(5)]
    assert order.equal(routing.cluster_channels(contribution, 5, seed=0))


@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_balanced_even_if_all_items_want_the_same(seed: int) -> None:
    similarity = torch.rand(30, 5, generator=torch.Generator().manual_seed(seed))
    similarity[:, 2] += 1
    assigned = routing.assign_balanced(similarity)
    assert assigned.bincount(minlength=5).tolist() == [6] * 5
    # The popular one got those that wanted it most.
    assert set((assigned == 2).nonzero().flatten().tolist()) == set(similarity[:, 2].topk(6).indices.tolist())


def test_energies_are_those_of_the_experts_outputs() -> None:
    gate, up, down = random_weights(24, 16, 0)
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    parts = zip(gate.chunk(4), up.chunk(4), down.chunk(4, 1), strict=True)
    expected = torch.stack([dense_mlp(x, *part).square().sum(1) for part in parts], 1)
    assert torch.allclose(routing.output_energies(hidden, down, 4), expected)


def test_the_router_ranks_experts_as_their_energies() -> None:
    g = torch.Generator().manual_seed(0)
    x, true = torch.randn(500, 16, generator=g).double(), torch.randn(6, 16, generator=g).double()
    # A factor common to all experts of a token does not matter.
    energies = (x @ true.T + torch.randn(500, 1, generator=g)).exp()
    logits = x @ routing.fit_router(x, energies).T
    assert logits.argsort(1).equal(energies.argsort(1)) or (
        (logits.topk(3).indices.sort().values == energies.topk(3).indices.sort().values).double().mean() > 0.97
    )


def test_the_written_model_computes_and_routes_as_the_trained_one(first_cut: Path, tmp_path: Path) -> None:
    student, ids = routed.dense_model(first_cut), random_ids(3)
    routed.put_experts(student, ids, EXPERTS, ACTIVE, seed=0)
    for layer in student.model.layers:
        layer.mlp.channel_scale.data[::3] = 0.5
    student = rounded(student)
    (first_cut / "tokenizer.json").write_text("{}")
    routed.write(student, first_cut, tmp_path / "second")
    made = mixtral(tmp_path / "second")
    chosen: list[Tensor] = []
    for layer in made.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, args, out: chosen.append(out[2]))
    with torch.no_grad():
        logits, expected = made(ids).logits, student(ids).logits
    # Mixtral's routing weights are float32.
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert [tuple(c.shape) for c in chosen] == [(ids.numel(), ACTIVE)] * 2
    for of_layer in chosen:
        assert 0 < of_layer.flatten().bincount(minlength=EXPERTS).min() < ids.numel()
    assert (tmp_path / "second" / "tokenizer.json").is_file()


def test_distillation_trains_routers_norms_and_scales_alone(first_cut: Path) -> None:
    teacher, student, ids = routed.dense_model(first_cut), routed.dense_model(first_cut), random_ids(1)
    routed.put_experts(student, ids, EXPERTS, ACTIVE, seed=0)
    before = {name: p.clone() for name, p in student.named_parameters()}
    losses = routing.distill(student, teacher, ids.expand(20, -1), rate=0.02)
    assert losses[-1] < 0.7 * losses[0]
    changed = {name for name, p in student.named_parameters() if not p.equal(before[name])}
    assert changed == {name for name in before if name.endswith(("router", "channel_scale", "norm.weight"))}


def test_every_row_can_be_asked_for() -> None:
    rows = [row for group in GROUPS.values() for row in group]
    for row in rows:
        if row.method == OURS:
            QuantizeConfig.model_validate({"bits": row.bits, "seed": row.seed, **row.options})
        elif not BASELINES[row.method]:  # the others want calibration text
            check_request(row.method, None, int(row.bits), row.options)
    for group in GROUPS.values():
        assert len({row.key for row in group}) == len(group)


@pytest.mark.parametrize("cut", [all_active, routed])
def test_a_model_that_is_there_is_not_made_again(cut: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_active, "_pip", lambda *_: pytest.fail("downloads"))
    monkeypatch.setattr(routed, "dense_model", lambda *_: pytest.fail("trains"))
    (tmp_path / cut.MODEL).mkdir()
    (tmp_path / cut.MODEL / "config.json").write_text("{}")
    cut.make(tmp_path)
