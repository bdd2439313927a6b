"""Objectives against independent computations: exponents, compensators, whole programs by brute force."""

import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.reference import LayerWeights
from layers import measured_layer
from offline_quant.allocation.heavy_tail import alpha_hill, tail_length
from offline_quant.allocation.objectives import forms_of
from offline_quant.allocation.objectives.bitsmoe import INPUT_WEIGHT
from offline_quant.config import QuantizeConfig
from offline_quant.layer.planner import choice_tables, plan_layer
from offline_quant.layer.quantizer import quantize_layer
from offline_quant.linalg import add_damping
from offline_quant.model.expert_inputs import ExpertInputs
from offline_quant.rounding import compensator
from offline_quant.rounding.error_feedback import RoundingMode
from offline_quant.rounding.gaussian import kappa

E, H, I = 3, 48, 32  # noqa: E741


def view_of(objective, bits=4.0, **options):
    g = torch.Generator().manual_seed(1)
    scale = torch.linspace(0.5, 2, E)[:, None, None]
    gate_up = torch.randn(E, 2 * I, H, generator=g) / 7 * scale
    down = torch.randn(E, H, I, generator=g) / 7
    score = torch.rand(900, E, generator=g) * torch.tensor([1.0, 1.0, 0.6])
    data = ExpertInputs(
        torch.randn(900, H, generator=g), score.topk(2).indices, torch.rand(900, 2, generator=g).softmax(1)
    )
    config = QuantizeConfig(bits=bits, objective=objective, **options)
    return measured_layer(gate_up, down, data, config), gate_up, down


@pytest.mark.parametrize(("rows", "columns"), [(48, 32), (300, 140)])
def test_alpha_is_hills_estimate_of_the_gram_matrixs_eigenvalues(rows, columns):
    W = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k = max(10, min(rows, columns) // 10)
    for i in range(2):
        values = np.sort(np.linalg.eigvalsh((W[i].T @ W[i] if rows >= columns else W[i] @ W[i].T).numpy()))
        n = len(values)
        expected = 1 + k / sum(np.log(values[n - j] / values[n - k - 1]) for j in range(1, k + 1))
        assert float(alpha_hill(W)[i]) == pytest.approx(expected, rel=1e-9)


def test_alpha_finds_the_exponent_of_a_power_law():
    """Eigenvalues at the quantiles of a Pareto law of density exponent 3."""
    n = 600
    values = (1 - (torch.arange(n, dtype=torch.float64) + 0.5) / n) ** (-1 / 2.0)
    assert float(alpha_hill(torch.diag(values.sqrt())[:, :])) == pytest.approx(3.0, rel=0.05)


def test_too_small_a_matrix_has_no_tail():
    assert tail_length(11) == 10
    with pytest.raises(BitsmoeError, match="more than 10 rows"):
        tail_length(10)


def test_compensator_is_the_best_of_its_rank_and_leaves_what_was_said():
    g = torch.Generator().manual_seed(2)
    R, x = torch.randn(2, 12, 9, generator=g), torch.randn(2, 60, 12, generator=g) * torch.linspace(0.2, 3, 12)
    M = add_damping(x.mT @ x / 60)
    tail = compensator.tail_energies(R, M)
    assert tail.shape == (2, 10)
    for rank in (0, 1, 4, 9):
        V, U = compensator.fit(R, M, rank)
        d = R - V.mT @ U
        left = (d * (M @ d)).sum((1, 2))
        assert torch.allclose(left, tail[:, rank], rtol=1e-3, atol=1e-3 * float(tail[:, 0].max()))
    for e in range(2):  # Eckart-Young in the metric of M, by numpy in float64
        root = np.linalg.cholesky(M[e].double().numpy())
        values = np.linalg.svd(root.T @ R[e].double().numpy(), compute_uv=False)
        assert float(tail[e, 4]) == pytest.approx((values[4:] ** 2).sum(), rel=1e-3)


def brute_force(plan):
    table = plan.table
    budget = plan.allocation.cost
    return min(
        sum(table.loss[u, c] for u, c in enumerate(choice))
        for choice in itertools.product(range(table.loss.shape[1]), repeat=len(table.loss))
        if sum(table.cost[u, c] for u, c in enumerate(choice)) <= budget
    )


@pytest.mark.parametrize("objective", ["alphaq", "bt-moe", "frequency", "uniform"])
def test_programs_equal_brute_force(objective):
    view, *_ = view_of(objective, widths=(0, 2, 4) if objective == "bt-moe" else (2, 4), ranks=(0, 4))
    plan = plan_layer(view)
    assert plan.allocation.loss == pytest.approx(brute_force(plan), rel=1e-6)
    assert 8 * plan.layer.nbytes(16) <= 4.0 * plan.layer.num_weights


def test_alphaq_values_matrices_as_its_paper_does():
    view, gate_up, down = view_of("alphaq", gamma=2.0)
    (table,) = choice_tables(view, forms_of(view.config))
    matrices = [*gate_up[:, :I], *gate_up[:, I:], *down]
    expected = [float(alpha_hill(W)) ** -2 * float(W.double().var(correction=0)) for W in matrices]
    for bits, choice in zip(table.width, table.loss.T, strict=True):
        assert choice == pytest.approx(np.array(expected) * 4.0 ** -float(bits), rel=1e-5)
    assert table.schema.projections["gate"].basis is None


def test_bt_moe_measures_what_a_choice_costs_at_the_layers_output():
    """A dropped expert's loss is its frequency times the L2 norm of its output, to first order in gate and up."""
    view, *_ = view_of("bt-moe", ranks=(0, 4, 8))
    (table,) = choice_tables(view, forms_of(view.config))
    zero = (table.width == 0) & (table.rank == 0)
    share = view.ctx.moments.routing_frequency.numpy()
    experts = view.load(range(E))
    gate_up, down = experts.gate_up, experts.down
    for e in range(E):
        m = view.ctx.moments.measure_expert(e, experts.one(e))
        M, outputs, D = m.inputs, m.output_weights, m.down
        expected = (outputs[:, None] * gate_up[e] @ M * gate_up[e]).sum() + (down[e] @ D * down[e]).sum()
        assert table.loss[e, zero][0] == pytest.approx(float(share[e] * expected.sqrt()), rel=0.05)
    for bits in (2, 3):
        by_rank = table.loss[:, table.width == bits]
        assert (np.diff(by_rank, axis=1) < 0).all()
    at_rank_4 = table.loss[:, table.rank == 4]
    assert (np.diff(at_rank_4, axis=1) < 0).all()


def test_bt_moe_tries_widths_as_the_layer_is_rounded_later():
    view, *_ = view_of("bt-moe", ranks=(0, 4))
    (table,) = choice_tables(view, forms_of(view.config))
    plan, chunk = plan_layer(view), range(E)
    experts, lost = view.load(chunk), torch.zeros(E)
    for name, projection in plan.projections.items():
        width = torch.full((*projection.order(chunk).shape, 1), 2, dtype=torch.uint8)
        rounded = view.problem(projection, chunk, experts).round(width, RoundingMode(refine=0))
        lost += view.unit_energy(name) * rounded.error
    expected = view.ctx.moments.routing_frequency * lost.sqrt()
    found = table.loss[:, (table.width == 2) & (table.rank == 0)][:, 0]
    assert found == pytest.approx(expected.numpy(), rel=1e-4)


def test_bt_moe_compensators_reach_the_stored_weights():
    view, gate_up, _ = view_of("bt-moe", bits=14.0, widths=(0, 1), ranks=(0, 16))
    plan = plan_layer(view)
    assert plan.ranks.tolist() == [16] * E
    quantized = quantize_layer(view, plan)
    tensors, errors = quantized.tensors, quantized.errors
    weights = LayerWeights(plan.layer, 16, tensors)
    bare = {k: torch.zeros_like(v) if "lowrank_" in k and "rank" not in k[-4:] else v for k, v in tensors.items()}
    for e in range(E):
        with_it, without = weights.expert_weights(e)[0], LayerWeights(plan.layer, 16, bare).expert_weights(e)[0]
        nearest = torch.cdist(with_it, gate_up[e, :I]).argmin(1)
        reference = gate_up[e, :I][nearest]
        assert float((with_it - reference).norm()) < 0.8 * float((without - reference).norm())
    assert {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()} == {
        k: (s.dtype, s.shape) for k, s in plan.layer.tensor_specs(16).items()
    }
    assert all(0 < v < 0.3 for v in errors.values())


def test_uniform_and_frequency_differ_as_they_should():
    bits = {}
    for objective in ("uniform", "frequency"):
        view, *_ = view_of(objective, bits=3.6)
        plan = plan_layer(view)
        bits[objective] = torch.cat([b.float().mean(1, keepdim=True) for b in plan.bits.values()], 1).mean(1)
        assert all(int(b.min()) == int(b.max()) for m in plan.bits.values() for b in m)
    assert float(bits["uniform"].max() - bits["uniform"].min()) <= 1
    assert int(view.ctx.moments.counts.argmin()) == 2
    assert float(bits["frequency"][2]) <= float(bits["frequency"][:2].min())


@pytest.mark.parametrize("feedback", [True, False])
def test_without_feedback_every_row_is_rounded_on_its_own(feedback):
    view, *_ = view_of("bitsmoe", bits=6.0, basis="natural", feedback=feedback, refine=0)
    plan = plan_layer(view)
    quantized = quantize_layer(view, plan)
    tensors, errors = quantized.tensors, quantized.errors
    assert tensors["gate_up_codes"].numel() > 0
    assert 0 < errors["gate_up"] < 0.1


def test_feedback_lowers_the_error():
    found = {}
    for feedback in (True, False):
        view, *_ = view_of("bitsmoe", bits=4.0, basis="natural", feedback=feedback, refine=0)
        plan = plan_layer(view)
        errors = quantize_layer(view, plan).errors
        found[feedback] = sum(plan.table.weight[name] * error for name, error in errors.items())
    assert found[True] < found[False]


def test_projections_count_by_their_energy_at_the_output():
    view, *_ = view_of("bitsmoe", basis="natural")
    (table,) = choice_tables(view, forms_of(view.config))
    experts, share = view.load(range(E)), view.ctx.moments.routing_frequency.double()
    energy = {"gate_up": 0.0, "down": 0.0}
    for e in range(E):
        m = view.ctx.moments.measure_expert(e, experts.one(e))
        gate_up, down = experts.gate_up[e].double(), experts.down[e].double()
        weighed = m.output_weights.double()[:, None] * gate_up @ m.inputs.double() * gate_up
        energy["gate_up"] += float(share[e] * weighed.sum())
        energy["down"] += float(share[e] * (down @ m.down.double() * down).sum())
    assert table.weight["gate_up"] / table.weight["down"] == pytest.approx(
        INPUT_WEIGHT * energy["gate_up"] / energy["down"], rel=1e-3
    )
    assert sum(table.weight.values()) == pytest.approx(2)
    alike, *_ = view_of("bitsmoe", basis="natural", ablations=("output-weights",))
    (table,) = choice_tables(alike, forms_of(alike.config))
    assert set(table.weight.values()) == {1.0}


def test_losses_are_relative_errors_however_projections_count():
    view, *_ = view_of("bitsmoe", basis="natural")
    plan = plan_layer(view)
    losses, weight = plan.losses, plan.table.weight
    assert sum(weight[name] * loss for name, loss in losses.items()) == pytest.approx(plan.allocation.loss, rel=1e-9)
    frequency = view.ctx.moments.routing_frequency.double()[:, None]
    for name, projection in plan.projections.items():
        widths = plan.widths(name, range(E), 16, torch.device("cpu")).flatten(1)
        lost = torch.tensor([[kappa(int(b)) for b in row] for row in widths], dtype=torch.float64)
        components = projection.components
        total = float((components.total.double() * frequency[:, 0]).sum())
        expected = float((lost * components.energy.double() * frequency).sum()) / total
        assert losses[name] == pytest.approx(expected, rel=1e-6)


def test_prediction_scales_with_kappa():
    view, *_ = view_of("bitsmoe", basis="natural")
    (table,) = choice_tables(view, forms_of(view.config))
    zero = table.loss[:, table.width == 0]
    for b in (1, 2, 3):
        assert table.loss[:, table.width == b] == pytest.approx(zero * kappa(b))


def test_an_extreme_expert_is_found_and_earns_bits():
    view, gate_up, down = view_of("bitsmoe", bits=4.0, basis="natural")
    assert view.measurements.extreme_experts() == []
    down = down.clone()
    down[1] *= 40
    extreme = measured_layer(gate_up, down, view.ctx.moments.inputs, view.config)
    assert extreme.measurements.extreme_experts() == [1]
    bits = [p.bits["down"].float().mean(1) for p in (plan_layer(view), plan_layer(extreme))]
    assert float(bits[1][1]) > float(bits[0][1]) + 1
    assert float(bits[1][1]) > float(bits[1][0]) + 2


def test_contradicting_options_are_refused():
    with pytest.raises(ValidationError, match="works on whole matrices"):
        QuantizeConfig(bits=2, objective="alphaq", basis="whitened")
    with pytest.raises(ValidationError, match="must begin with 0 and ascend"):
        QuantizeConfig(bits=2, ranks=(16, 8))
