"""Fitting all experts of a layer to one target: in closed form, and by gradients."""

from dataclasses import replace

import pytest
import torch

from bitsmoe_kernels.reference import LayerWeights, moe_forward
from layers import measured_layer
from offline_quant.calibration.moments import RoutedTokens
from offline_quant.config import QuantizeConfig
from offline_quant.layer.planner import plan_layer
from offline_quant.layer.quantizer import quantize_layer
from offline_quant.model.expert_inputs import ExpertInputs
from offline_quant.rounding import tuning as tune_module
from offline_quant.rounding.joint_fit import fit_jointly
from offline_quant.rounding.tuning import tune

E, H, I, TOP = 4, 48, 32, 2  # noqa: E741
ROUGH = {"feedback": False, "refine": 0, "without": ("correction",)}
"""Every row rounded on its own: what tuning can make up for, on a layer too small for the rest to be left to it."""


def tokens(count: int, seed: int, unseen: int | None = None) -> ExpertInputs:
    """Inputs of few strong directions, so that moments matter, and their routing."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(H, H, generator=torch.Generator().manual_seed(99)) * torch.logspace(0, -1, H)[:, None]
    score = torch.rand(count, E, generator=g)
    if unseen is not None:
        score[:, unseen] = -1
    weights = torch.rand(count, TOP, generator=g)
    return ExpertInputs(torch.randn(count, H, generator=g) @ mix, score.topk(TOP).indices, weights)


def experts() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(8)
    return torch.randn(E, 2 * I, H, generator=g) / 5, torch.randn(E, H, I, generator=g) / 5


def output(gate_up: torch.Tensor, down: torch.Tensor, data: ExpertInputs) -> torch.Tensor:
    """By definition, in float64."""
    y = torch.zeros(len(data.x), H, dtype=torch.float64)
    for t, x in enumerate(data.x.double()):
        for e, w in zip(data.topk_ids[t].tolist(), data.topk_weights[t].double(), strict=True):
            gate, up = (gate_up[e].double() @ x).chunk(2)
            y[t] += w * (down[e].double() @ (gate * torch.sigmoid(gate) * up))
    return y


def drifted(data: ExpertInputs) -> torch.Tensor:
    """A target that is not the experts' own output: it differs by what a matrix makes of their input."""
    drift = torch.randn(H, H, generator=torch.Generator().manual_seed(7)) * 0.1
    return output(*experts(), data) + (data.x @ drift).double()


def quantized(basis: str, bits: float, data: ExpertInputs, target: torch.Tensor | None = None, **options: object):
    gate_up, down = experts()
    config = QuantizeConfig(bits=bits, basis=basis, widths=(0, 1, 2, 3, 4), **options)
    view = measured_layer(gate_up, down, data, config)
    plan = plan_layer(view)
    return plan, quantize_layer(view, plan, target=target).tensors


def lost(plan, tensors, data: ExpertInputs, wanted: torch.Tensor) -> float:
    found = moe_forward(LayerWeights(plan.layer, 16, tensors), data.x, data.topk_weights, data.topk_ids)
    return float((found.double() - wanted).square().sum() / wanted.square().sum())


def test_an_expert_without_tokens_stays_and_one_with_few_moves_little():
    data, g = tokens(400, 1, unseen=2), torch.Generator().manual_seed(2)
    target = torch.randn(400, 5, generator=g)
    routed = []
    for e in range(E):
        token, slot = (data.topk_ids == e).nonzero(as_tuple=True)
        hidden = torch.randn(len(token), 6, generator=g) + 0.5
        share = torch.ones(len(token))
        routed.append(RoutedTokens(token, data.topk_weights[token, slot], share, hidden, float(len(token))))
    moments = [(r.hidden * r.weight[:, None] ** 2).T @ r.hidden / max(r.mass, 1) for r in routed]
    moments[2] = torch.eye(6)
    down = torch.randn(E, 5, 6, generator=g)

    def fitted(given: list[RoutedTokens]) -> torch.Tensor:
        out = down.clone()
        fit_jointly(
            lambda: range(E), given.__getitem__, moments.__getitem__, out.__getitem__, out.__setitem__, target.clone()
        )
        return out

    found = fitted(routed)
    assert torch.equal(found[2], down[2])
    assert not torch.equal(found[1], down[1])
    moved = fitted([replace(r, mass=100 * r.mass) for r in routed]) - down
    assert float(moved.norm()) < 0.1 * float((found - down).norm())


@pytest.mark.slow
@pytest.mark.parametrize("basis", ["natural", "whitened", "paper"])
def test_a_layer_follows_its_target(basis):
    """What earlier layers went wrong by is made up for, on tokens that calibration did not see."""
    bits = 8.0 if basis == "paper" else 6.0
    data, fresh = tokens(1500, 5), tokens(300, 6)
    wanted = drifted(fresh)
    errors = [lost(*quantized(basis, bits, data, aim), fresh, wanted) for aim in (None, drifted(data).float())]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("basis", ["natural", "whitened", "paper"])
def test_tuning_lowers_the_error_on_tokens_it_did_not_see(basis):
    bits = {"natural": 2.75, "whitened": 4.75, "paper": 6.0}[basis]
    data, fresh = tokens(1500, 5), tokens(300, 6)
    target, wanted = drifted(data).float(), drifted(fresh)
    plan, tensors = quantized(basis, bits, data, **ROUGH)
    tensors["gate_up_component_scale" if basis != "paper" else "up_component_scale"] *= 1.2
    tuned = tune(plan.layer, 16, tensors, data, target)
    assert lost(plan, tuned, fresh, wanted) < 0.97 * lost(plan, tensors, fresh, wanted)

    assert {k: (v.dtype, v.shape) for k, v in tuned.items()} == {k: (v.dtype, v.shape) for k, v in tensors.items()}
    changed = {k.rpartition("_")[2] for k in tuned if not torch.equal(tuned[k], tensors[k])}
    assert changed == {"codes", "scale"}
    weights = LayerWeights(plan.layer, 16, tuned)
    dropped = 0
    for name, projection in weights.projections.items():
        for e in range(E):
            width = tuned[f"{name}_bits"][e].repeat_interleave(16)[: plan.layer.components(name)]
            assert bool((projection.codes(e) < 2 ** width.int()[:, None]).all())
            assert not bool(projection.matrix(e)[width == 0].any())
            dropped += int((width == 0).sum())
    assert dropped > 0 or basis == "natural"  # whose components weigh too much alike here


def test_tuning_is_repeatable():
    data = tokens(200, 5)
    target = drifted(data).float()
    plan, tensors = quantized("natural", 2.75, data, **ROUGH)
    first, again, other = (tune(plan.layer, 16, tensors, data, target, seed, steps=8) for seed in (0, 0, 1))
    assert all(torch.equal(again[k], first[k]) for k in first)
    assert any(not torch.equal(other[k], first[k]) for k in first)


@pytest.mark.slow
def test_compensators_stay_and_are_part_of_what_is_tuned():
    data, fresh = tokens(1500, 5), tokens(300, 6)
    gate_up, down = experts()
    target, wanted = output(gate_up, down, data).float(), output(gate_up, down, fresh)
    plan, tensors = quantized("auto", 6.0, data, objective="bt-moe", ranks=(0, 4), **ROUGH)
    assert plan.ranks is not None
    assert int(plan.ranks.sum()) > 0
    tuned = tune(plan.layer, 16, tensors, data, target)
    assert lost(plan, tuned, fresh, wanted) < 0.97 * lost(plan, tensors, fresh, wanted)
    assert all(torch.equal(tuned[k], tensors[k]) for k in tensors if "lowrank" in k)


@pytest.mark.slow
def test_tuning_that_does_not_help_is_undone(monkeypatch):
    data = tokens(400, 5)
    gate_up, down = experts()
    plan, tensors = quantized("natural", 4.5, data)
    monkeypatch.setattr(tune_module, "CODE_RATE", 50.0)
    tuned = tune(plan.layer, 16, tensors, data, output(gate_up, down, data).float())
    assert all(torch.equal(tuned[k], tensors[k]) for k in tensors)


@pytest.mark.slow
def test_an_expert_that_no_token_reaches_is_not_tuned():
    data = tokens(400, 5, unseen=1)
    gate_up, down = experts()
    plan, tensors = quantized("natural", 4.5, data, **ROUGH)
    tuned = tune(plan.layer, 16, tensors, data, output(gate_up, down, data).float())
    before, after = (LayerWeights(plan.layer, 16, t).expert_weights(1) for t in (tensors, tuned))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert any(not torch.equal(tuned[k], tensors[k]) for k in tensors)
