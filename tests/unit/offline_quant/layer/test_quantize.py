"""The quantizer's mathematics against plain float64 loops and published constants."""

import math
import weakref

import numpy as np
import pytest
import torch

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.schema import Layer, Projection
from bitsmoe_kernels.reference import LayerWeights, moe_forward
from layers import measured_layer
from offline_quant.calibration import moments as moments_module
from offline_quant.calibration.moments import MASSIVE, LayerMoments, RoutedTokens
from offline_quant.config import QuantizeConfig
from offline_quant.decomposition.bases import natural, paper, whitened
from offline_quant.decomposition.ranking import rank_components
from offline_quant.layer import planner
from offline_quant.layer import quantizer as quantizer_module
from offline_quant.layer.outputs import original_output, output_error, quantized_output
from offline_quant.layer.planner import plan_layer
from offline_quant.layer.quantizer import quantize_chunk, quantize_layer
from offline_quant.linalg import DAMPING, add_damping, add_product, factorize, mirrored, on_diagonal, output_energy
from offline_quant.model.expert_inputs import ExpertInputs
from offline_quant.model.expert_weights import ExpertBiases, OneExpert
from offline_quant.report.collect import width_histogram
from offline_quant.rounding.backends.torch_reference import _Rows
from offline_quant.rounding.correction import correct_down
from offline_quant.rounding.error_feedback import RoundingMode, quantize
from offline_quant.rounding.gaussian import gaussian_quantizer
from offline_quant.rounding.grid import Grid, Quantized
from offline_quant.rounding.joint_fit import fit_jointly
from offline_quant.runtime import chunks as chunks_module

# Best uniform quantizers of a unit Gaussian: J. Max, "Quantizing for minimum distortion", 1960, table II.
MAX_1960 = {1: (1.5957, 0.3634), 2: (0.9957, 0.1188), 3: (0.5860, 0.03744), 4: (0.3352, 0.01154), 5: (0.1881, 0.003495)}


def moments(n, size, seed=0, tokens=None):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, size, size, generator=g) * torch.linspace(0.1, 2, size)
    x = torch.randn(n, tokens or 4 * size, size, generator=g) @ mix
    return x.mT @ x / x.shape[1]


def error(F, M, approximation):
    d = (F - approximation).double()
    return (d * (M.double() @ d)).sum((1, 2))


@pytest.mark.parametrize("bits", MAX_1960)
def test_gaussian_quantizers_are_the_published_ones(bits):
    step, loss = gaussian_quantizer(bits)
    assert step == pytest.approx(MAX_1960[bits][0], abs=2e-3)
    assert loss == pytest.approx(MAX_1960[bits][1], rel=2e-3)


def test_feedback_factor_and_conditional_variances():
    raw = moments(2, 9)
    factor = factorize(raw)
    M, U, d = factor.damped(raw), factor.U, factor.variances
    for e in range(2):
        m = M[e].double()
        assert torch.allclose(U[e].double().T @ U[e].double() @ m, torch.eye(9, dtype=torch.float64), atol=1e-3)
        assert torch.equal(U[e], U[e].triu())
        for k in range(9):
            rest, cross = m[k + 1 :, k + 1 :], m[k + 1 :, k]
            schur = m[k, k] - (cross @ torch.linalg.solve(rest, cross) if len(rest) else 0)
            assert float(d[e, k]) == pytest.approx(float(schur), rel=1e-3)
            assert float(U[e, k, k]) ** -2 == pytest.approx(float(schur), rel=1e-3)


def test_a_factor_of_many_components_is_found_by_halves():
    raw = moments(2, 301, tokens=2_000)
    factor = factorize(raw)
    inverse = factor.U.double().mT @ factor.U.double()
    assert torch.equal(factor.U, factor.U.triu())
    expected = torch.linalg.inv(factor.damped(raw).double())
    assert float((inverse - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("size", [1, 63, 64, 65, 130, 1_100])
def test_symmetric_products_equal_whole_ones(size):
    g = torch.Generator().manual_seed(size)
    x, F = torch.randn(2, 5, size, generator=g), torch.randn(2, size, 3, generator=g)
    start = x.mT @ x
    product = start.double() + x.double().mT @ (2 * x.double())
    for total in (mirrored(add_product(start.clone(), x, 2 * x)), [
        mirrored(add_product(start[i].clone(), x[i], 2 * x[i])) for i in range(2)
    ]):  # fmt: skip
        for i in range(2):
            assert torch.allclose(total[i].double(), product[i], rtol=1e-5, atol=1e-5)
    expected = (F.double() * (start.double() @ F.double())).sum((1, 2))
    assert torch.allclose(output_energy(F, start).double(), expected, rtol=1e-5)


def test_moments_that_float32_cannot_factor_are_damped_more():
    """A handful of tokens in many dimensions, of very different strength."""
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.linspace(-4, 4, 64)
    M = x.mT @ x
    M = M - 0.05 * torch.diag_embed(M.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).expand(1, 64))
    assert bool(torch.linalg.cholesky_ex(M + 0.01 * M[0].diagonal().mean() * torch.eye(64)).info.any())
    assert bool(factorize(M).U.isfinite().all())


def test_moments_that_are_not_finite_are_refused():
    M = moments(2, 8)
    M[1, 3, 3] = float("inf")
    with pytest.raises(BitsmoeError, match="not finite"):
        add_damping(M)


def test_correlations_count_for_nine_tenths_and_the_ridge_is_one_percent_of_the_mean_diagonal():
    M = moments(1, 5)
    expected = M * (0.1 * torch.eye(5) + 0.9)
    assert torch.allclose(add_damping(M), expected + DAMPING * M[0].diagonal().mean() * torch.eye(5), atol=1e-5)


def test_energy_under_damped_moments_is_told_from_that_under_theirs():
    F, M = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(5)), moments(2, 9)
    factor = on_diagonal(M)
    found = factor.damped_energy(output_energy(F, M), F, M)
    assert torch.allclose(found, output_energy(F, factor.damped(M)), rtol=1e-4)


def naive_feedback(F, M, a, c, width):
    """Feedback by definition: after each row, the rows not yet done move to the conditional optimum."""
    F, K = F.double().clone(), F.shape[0]
    codes = np.zeros(F.shape, dtype=int)
    M = M.double()
    for k in range(K):
        b = int(width[k])
        half = (2**b - 1) / 2
        step = a[k].double() * c.double()
        level = torch.clamp(torch.round(F[k] / step + half), 0, 2 * half) - half if b else torch.zeros_like(F[k])
        codes[k] = (level + half).numpy() if b else 0
        delta = F[k] - (step * level if b else 0)
        if k + 1 < K:
            # minimise over the rest r: the change r that offsets delta solves M_rr r = M_rk delta
            F[k + 1 :] += torch.linalg.solve(M[k + 1 :, k + 1 :], M[k + 1 :, k, None] * delta[None])
    return codes


@pytest.mark.parametrize(
    "width", [[2] * 12, [0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 8, 8], [8, 0, 4, 0, 1, 2, 3, 1, 0, 2, 6, 5]]
)
def test_feedback_equals_its_definition(width):
    g = torch.Generator().manual_seed(3)
    F, M = torch.randn(2, 12, 20, generator=g), moments(2, 12, 5)
    widths = torch.tensor([width, width[::-1]], dtype=torch.uint8)
    q = quantize(F, M, widths, "K", RoundingMode(refine=0))
    for e in range(2):
        expected = naive_feedback(F[e], add_damping(M)[e], q.a[e], q.c[e], widths[e])
        # A value within float32 rounding of a boundary may fall either way, and changes what follows in its column.
        wrong_columns = int((q.codes[e].numpy() != expected).any(0).sum())
        assert wrong_columns <= 2


def test_dropped_components_hand_their_part_to_the_others():
    """With the first rows dropped and the others nearly exact, what is lost is the Schur complement's share."""
    F, M = torch.randn(1, 16, 400, generator=torch.Generator().manual_seed(0)), moments(1, 16, 1)
    widths = torch.tensor([[0] * 8 + [8] * 8], dtype=torch.uint8)
    q = quantize(F, M, widths, "K", RoundingMode(refine=0))
    measured = float(error(F, add_damping(M), q.dequantize(widths[:, :, None]))[0])
    m, f = add_damping(M)[0].double(), F[0, :8].double()
    schur = m[:8, :8] - m[:8, 8:] @ torch.linalg.solve(m[8:, 8:], m[8:, :8])
    assert measured == pytest.approx(float((f * (schur @ f)).sum()), rel=0.01)


def test_order_is_ascending_importance():
    F, M = torch.randn(3, 10, 6), moments(3, 10, 2)
    ranked, sorted_moments, factor = rank_components(F, M, "input")
    importance = (M.diagonal(dim1=1, dim2=2) * F.square().sum(-1)).gather(1, ranked.order)
    assert bool((importance.diff(dim=1) >= 0).all())
    assert float(ranked.total[0]) == pytest.approx(float((F[0] * (M[0] @ F[0])).sum()), rel=1e-4)
    assert torch.equal(sorted_moments[1], M[1][ranked.order[1]][:, ranked.order[1]])
    assert torch.equal(factor.variances, ranked.variance)


def test_where_nothing_is_handed_on_components_are_independent():
    F, M = torch.randn(2, 10, 6), moments(2, 10, 2)
    ranked, sorted_moments, factor = rank_components(F, M, "input", feedback=False)
    diagonal = factor.damped(sorted_moments).diagonal(dim1=1, dim2=2)
    assert torch.allclose(ranked.variance, diagonal)
    assert torch.allclose(on_diagonal(M).damped(M), add_damping(M))


@pytest.mark.parametrize("along", ["K", "N"])
def test_refinement_never_makes_it_worse(along):
    F, M = torch.randn(3, 48, 40, generator=torch.Generator().manual_seed(1)), moments(3, 48, 3)
    widths = torch.randint(0, 5, (3, 48 if along == "K" else 40), dtype=torch.uint8)
    shape = widths[:, :, None] if along == "K" else widths[:, None]
    damped_m = add_damping(M)
    errors = [error(F, damped_m, quantize(F, M, widths, along, RoundingMode(p)).dequantize(shape)) for p in (0, 1, 3)]
    assert bool((errors[1] <= errors[0] * 1.0001).all())
    assert bool((errors[2] <= errors[1] * 1.0001).all())
    assert float(errors[2].sum()) < 0.97 * float(errors[0].sum())


@pytest.mark.parametrize("along", ["K", "N"])
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("passes", [0, 1, 3])
def test_the_error_that_decides_is_that_of_the_codes(along, feedback, passes):
    """It is followed through every move of every row, not computed again."""
    F, M = torch.randn(3, 150, 40, generator=torch.Generator().manual_seed(1)), moments(3, 150, 3)
    widths = torch.randint(0, 5, (3, 150 if along == "K" else 40), dtype=torch.uint8)
    q = quantize(F, M, widths, along, RoundingMode(passes, feedback))
    found = q.dequantize(widths[:, :, None] if along == "K" else widths[:, None])
    assert torch.allclose(q.error.double(), error(F, add_damping(M), found), rtol=1e-3)
    assert (q.lost is None) == (feedback or passes > 0)
    if q.lost is not None:
        assert torch.allclose(q.lost.double(), error(F, M, found), rtol=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_a_representable_row_comes_back_exactly(bits):
    g = torch.Generator().manual_seed(bits)
    half = (2**bits - 1) / 2
    level = ((torch.randn(3, 512, generator=g) / gaussian_quantizer(bits)[0] + half).round() - half).clamp(-half, half)
    c = torch.rand(3, 512, generator=g).half().float() + 0.5
    scale = torch.tensor([0.125, 1.0, 3.5])  # exact in float16
    row, width = level * scale[:, None] * c, torch.full((3, 1), bits, dtype=torch.uint8)
    rows = _Rows.of(Grid.of(width[:, :, None]), 0)
    a = rows.scale(row, c)
    codes, value = rows.round(row, a, c)
    assert a.tolist() == scale.tolist()
    assert torch.equal(codes, (level + half).to(torch.uint8))
    assert torch.equal(value, row)


def test_more_bits_lose_less_and_top_codes_are_used():
    F, M = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(4)), moments(2, 32, 4)
    last = None
    for bits in (1, 2, 3, 4, 5, 6, 8):
        widths = torch.full((2, 32), bits, dtype=torch.uint8)
        q = quantize(F, M, widths, "K")
        lost = float(error(F, M, q.dequantize(widths[:, :, None])).sum())
        assert int(q.codes.max()) <= 2**bits - 1
        if bits <= 4:
            assert int(q.codes.max()) == 2**bits - 1
            assert int(q.codes.min()) == 0
        assert last is None or lost < last
        last = lost


@pytest.mark.parametrize("along", ["K", "N"])
def test_nothing_in_nothing_out(along):
    F, M = torch.zeros(2, 16, 16), torch.zeros(2, 16, 16)
    widths = torch.full((2, 16), 2, dtype=torch.uint8)
    q = quantize(F, M, widths, along)
    value = q.dequantize(widths[:, :, None] if along == "K" else widths[:, None])
    assert bool(value.isfinite().all())
    assert float(value.abs().max()) < 1e-3
    dropped = quantize(torch.randn(1, 16, 16), moments(1, 16), torch.zeros(1, 16, dtype=torch.uint8), along)
    assert float(dropped.dequantize(torch.zeros(1, 16, 1)).abs().max()) == 0


@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1.0, 1e4])
def test_scales_stay_inside_float16(magnitude):
    F, M = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(9)), moments(1, 16)
    widths = torch.full((1, 16), 3, dtype=torch.uint8)
    lost = [
        float(error(F * m, M, quantize(F * m, M, widths, "K").dequantize(widths[:, :, None]))[0]) / m**2
        for m in (1.0, magnitude)
    ]
    assert lost[1] == pytest.approx(lost[0], rel=0.05)


def test_whitened_basis_whitens_and_loses_nothing():
    W, C = torch.randn(4, 24, 16), moments(1, 16, 6)[0]
    d = whitened("gate_up", (W.double().mT @ W.double()).mean(0), C, 16)
    assert d.basis is not None
    white = d.moments(C[None])[0]
    # Rows are normalised for storage, so the moments are diagonal rather than the identity.
    off = white - torch.diag(white.diagonal())
    assert float(off.abs().max() / white.diagonal().mean()) < 0.02
    assert torch.allclose(d.factors(W).mT @ d.basis, W, atol=2e-3)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("axis", ["input", "output"])
def test_paper_bases_lose_nothing_at_full_rank(axis, bits):
    W = torch.randn(3, 12, 20)
    grams = W.double().mT @ W.double() if axis == "input" else W.double() @ W.double().mT
    d = paper("down", grams.sum(0), axis, bits)
    assert d.basis is not None
    F = d.factors(W)
    again = F.mT @ d.basis if axis == "input" else (F @ d.basis).mT
    assert torch.allclose(again, W, atol=1e-3)
    directions = torch.nn.functional.normalize(d.basis, dim=1)
    assert torch.allclose(directions @ directions.T, torch.eye(len(directions)), atol=0.05)


def inputs(T=200, H=12, E=4, k=2, seed=0, unseen=None):
    g = torch.Generator().manual_seed(seed)
    score = torch.rand(T, E, generator=g)
    if unseen is not None:
        score[:, unseen] = -1
    return ExpertInputs(torch.randn(T, H, generator=g) + 0.3, score.topk(k).indices, torch.rand(T, k, generator=g))


def weighed_tokens(data, stats, e, count=None):
    """Inputs and masses of an expert's tokens and of the sample that stands for all tokens, in float64."""
    T = len(data.x)
    count = torch.ones(T) if count is None else count
    slots = [(t, s) for t in range(T) for s in range(2) if data.topk_ids[t, s] == e]
    rows = [(data.x[t], count[t] * data.topk_weights[t, s] ** 2) for t, s in slots]
    own = len(rows)
    sample = range(0, T, T // data.x.shape[1])
    prior = data.topk_weights.square().mean() * stats.pseudo_count / len(sample)
    rows += [(data.x[t], count[t] * prior) for t in sample]
    x, mass = torch.stack([r[0] for r in rows]).double(), torch.stack([r[1] for r in rows]).double()
    return x, mass / (own + stats.pseudo_count), own


def swigluoai(outputs):
    """As transformers' GptOssExperts computes it, of gate and up one behind the other."""
    gate, up = outputs.chunk(2, -1)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def swiglu(outputs):
    gate, up = outputs.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize("hidden_act", ["silu", "swigluoai"])
def test_expert_moments_weigh_by_the_jacobian_of_the_output(hidden_act, monkeypatch):
    """Against autograd: d(w D h)/d(gate, up) of every token. With swigluoai there are biases, and clamps bite."""
    monkeypatch.setattr(moments_module, "PLANNING_STEP", 1)
    data, E, intermediate = inputs(), 4, 5
    stats = LayerMoments(data, E, hidden_act)
    g = torch.Generator().manual_seed(3)
    W, D = torch.randn(E, 2 * intermediate, 12, generator=g), torch.randn(E, 12, intermediate, generator=g)
    b = torch.randn(E, 2 * intermediate, generator=g) if hidden_act == "swigluoai" else torch.zeros(E, 2 * intermediate)

    activated = {"silu": swiglu, "swigluoai": swigluoai}[hidden_act]
    for e in range(E):
        measured = stats.measure_expert(e, OneExpert(W[e], D[e], b[e] if hidden_act == "swigluoai" else None))
        x, mass, own = weighed_tokens(data, stats, e)
        assert own == int(stats.counts[e])

        outputs = x @ W[e].double().T + b[e].double()
        assert (outputs.abs() > 7).any()
        jacobians = [torch.autograd.functional.jacobian(activated, row) for row in outputs]
        felt = torch.stack([(D[e].double() @ j).square().sum(0) for j in jacobians])
        assert torch.allclose(measured.output_weights.double(), mass @ felt, rtol=1e-4)
        token = mass * felt.sum(1)
        token = token.clamp(max=20 * token.mean())
        assert torch.allclose(measured.inputs.double(), (x.T * token) @ x / token.sum(), atol=1e-4)
        h = activated(outputs)
        assert torch.allclose(measured.down.double(), (h.T * mass) @ h, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighed", [False, True])
def test_a_massive_token_counts_as_much_as_a_thousand_others(weighed, monkeypatch):
    """In moments of the inputs and of what enters down, and in weights of outputs. Others count as ever, or as told."""
    monkeypatch.setattr(moments_module, "PLANNING_STEP", 1)
    g = torch.Generator().manual_seed(3)
    W, D = torch.randn(10, 12, generator=g), torch.randn(12, 5, generator=g)
    order = torch.arange(5)
    for size in (1.0, 300.0):
        data = inputs(T=1500)
        token = int((data.topk_ids == 1).any(1).nonzero()[7])
        data.x[token] *= size
        count = torch.rand(1500, generator=g) * 2 if weighed else None
        stats = LayerMoments(data, 4, token_weights=count)
        measured = stats.measure_expert(1, OneExpert(W, D))
        x, mass, own = weighed_tokens(data, stats, 1, count)
        h = swiglu(x @ W.double().T)
        energy = h.square().sum(1)
        assert len(energy) < moments_module.BLOCK_TOKENS
        cut = (1000 * energy.median() / energy).clamp(max=1)
        assert (cut < 1).sum() == (size > 1)
        mass = mass * cut
        assert torch.allclose(measured.down.double(), (h.T * mass) @ h, rtol=1e-4, atol=1e-4)
        jacobians = [torch.autograd.functional.jacobian(swiglu, row) for row in x @ W.double().T]
        felt = torch.stack([(D.double() @ j).square().sum(0) for j in jacobians])
        assert torch.allclose(measured.output_weights.double(), mass @ felt, rtol=1e-4)
        # Tokens are weighed by what they were before quantizing.
        found = stats.measure_quantized(1, OneExpert(0.5 * W, D), order, measured.activations)
        seen = swiglu(x @ (0.5 * W).double().T)
        assert torch.allclose(found.moments.double(), (seen.T * mass) @ seen, rtol=1e-4, atol=1e-4)
        assert torch.allclose(found.missing.double(), ((h - seen).T * mass) @ seen, rtol=1e-3, atol=1e-3)
        # What fits down together counts them alike, but for the little that quantizing did to the energies.
        routed = stats.routed_tokens(1, measured.activations)
        assert torch.allclose((routed.weight.square() * routed.share / routed.mass).double(), mass[:own], rtol=0.05)


def test_tokens_that_activate_nothing_do_not_silence_the_others():
    """With relu2 most tokens may be zeros, and their median is zero."""
    data = inputs()
    W, D = torch.zeros(5, 12), torch.ones(12, 5)
    W[:, 0] = 1.0
    W[:, 1] = -1.5
    stats = LayerMoments(data, 4, "relu2")
    measured = stats.measure_expert(1, OneExpert(W, D))
    x, mass, _ = weighed_tokens(data, stats, 1)
    h = (x @ W.double().T).clamp(min=0).square()
    assert h.square().sum(1).median() == 0 < h.max()
    found = stats.measure_quantized(1, OneExpert(W, D), torch.arange(5), measured.activations)
    assert torch.allclose(found.moments.double(), (h.T * mass) @ h, rtol=1e-4)


def test_a_massive_token_takes_few_bits_of_the_others(monkeypatch):
    """As in layer 11 of SmolLM2: one token of a window has a million times the energy of others."""
    g = torch.Generator().manual_seed(0)
    E, H, I, T = 4, 48, 32, 600  # noqa: E741
    gate_up, down = torch.randn(E, 2 * I, H, generator=g) / H**0.5, torch.randn(E, H, I, generator=g) / I**0.5
    x = torch.randn(T, H, generator=g)
    routing = torch.arange(E).expand(T, E).contiguous(), torch.full((T, E), 1 / E)
    errors, bits = [], []
    for size, limit in ((1.0, MASSIVE), (100.0, MASSIVE), (1.0, math.inf)):
        monkeypatch.setattr("offline_quant.calibration.moments.MASSIVE", limit)
        x[0] *= size
        view = measured_layer(gate_up, down, ExpertInputs(x, *routing), QuantizeConfig(bits=2.5))
        plan = plan_layer(view)
        wanted = torch.cat(list(original_output(view.ctx)))
        quantize_layer(view, plan)
        found = torch.cat(list(quantized_output(view)))
        lost = (found - wanted).square().sum(1) / wanted.square().sum(1)
        errors.append(float(lost[1:].median()))
        bits.append(float(plan.bits["down"].float().mean()))
        assert len(errors) == 1 or lost[0] < 0.1
    assert errors[1] < 1.3 * errors[0]
    assert errors[2] > 2 * errors[0]
    assert abs(bits[1] - bits[0]) <= abs(bits[2] - bits[0]) / 2


def test_corrected_down_is_the_least_squares_fit_to_quantized_activations():
    data = inputs(T=500)
    stats = LayerMoments(data, 4)
    g = torch.Generator().manual_seed(4)
    original, down = torch.randn(10, 12, generator=g), torch.randn(12, 5, generator=g)
    quantized = original * 0.8 + 0.1 * torch.randn(10, 12, generator=g)
    order = torch.tensor([3, 0, 4, 1, 2])
    activations = stats.measure_expert(1, OneExpert(original, down)).activations
    original, down = original[torch.cat([order, order + 5])], down[:, order]
    found = stats.measure_quantized(1, OneExpert(quantized, down), order, activations)
    M, missing = found.moments, found.missing
    x, mass, _ = weighed_tokens(data, stats, 1)

    def hidden(W):
        return swiglu(x @ W.double().T) * mass.sqrt()[:, None]

    h, seen = hidden(original), hidden(quantized)
    assert torch.allclose(M.double(), seen.T @ seen, rtol=1e-4, atol=1e-4)
    fitted = correct_down(down, M, missing).double()
    best = torch.linalg.lstsq(seen, h @ down.double().T).solution.T

    def lost(D):
        return float((h @ down.double().T - seen @ D.T).square().sum())

    assert lost(best) <= lost(fitted) < 1.02 * lost(best)
    assert lost(fitted) < 0.5 * lost(down.double())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("basis", ["natural", "whitened", "paper"])
def test_what_experts_add_and_its_error_are_those_of_the_layer(basis, biased):
    """Before and after quantization, including an expert that no token reaches. With biases the layer is gpt-oss's."""
    bits = 4.5 if basis == "natural" else 7.0
    gate_up, down, view, config = view_of(basis, bits, unseen=1, biased=biased)
    data, activated = view.ctx.moments.inputs, swigluoai if biased else swiglu
    loaded = view.ctx.load(range(4))
    of_gate_up, of_down = loaded.biases if biased else (torch.zeros(4, 64), torch.zeros(4, 48))
    original = torch.zeros_like(data.x, dtype=torch.float64)
    for slot in range(2):
        for e in range(4):
            rows = data.topk_ids[:, slot] == e
            outputs = data.x[rows].double() @ gate_up[e].double().T + of_gate_up[e]
            y = activated(outputs) @ down[e].double().T + of_down[e]
            original[rows] += data.topk_weights[rows, slot, None] * y
    plan = plan_layer(view)
    assert torch.allclose(torch.cat(list(original_output(view.ctx))).double(), original, atol=1e-5)
    spans, some = [range(3, 40), range(90, 91)], [*range(3, 40), 90]
    assert torch.allclose(torch.cat(list(original_output(view.ctx, spans))).double(), original[some], atol=1e-5)
    with pytest.raises(RuntimeError, match="not been quantized yet"):
        list(quantized_output(view))
    tensors = quantize_layer(view, plan).tensors
    with pytest.raises(RuntimeError, match="quantized gate and up by now"):
        list(original_output(view.ctx))
    weights = LayerWeights(plan.layer, config.block_size, tensors)
    expected = moe_forward(weights, data.x, data.topk_weights, data.topk_ids)
    assert torch.allclose(torch.cat(list(quantized_output(view))), expected, atol=1e-5)
    assert torch.allclose(torch.cat(list(quantized_output(view, spans))), expected[some], atol=1e-5)
    assert output_error(view) == pytest.approx(
        float((expected - original).square().sum() / original.square().sum()), rel=1e-3
    )


def test_nothing_missing_leaves_down_as_it_is():
    down = torch.randn(6, 4)
    assert torch.equal(correct_down(down, torch.eye(4), torch.zeros(4, 4)), down)
    assert torch.equal(correct_down(down, torch.zeros(4, 4), torch.zeros(4, 4)), down)


def test_an_unseen_expert_gets_statistics_of_all_tokens():
    data = inputs(unseen=1)
    stats = LayerMoments(data, 4)
    assert int(stats.counts[1]) == 0
    measured = stats.measure_expert(1, OneExpert(torch.randn(8, 12), torch.randn(12, 4)))
    assert measured.is_finite
    assert int(torch.linalg.matrix_rank(measured.inputs)) == 12
    assert float(measured.output_weights.min()) > 0
    assert float(measured.down.trace()) > 0
    assert float(stats.routing_frequency[1]) > 0


def view_of(basis, bits, block_size=16, unseen=None, E=4, H=48, I=32, rank=None, biased=False, tokens=600, **options):  # noqa: E741
    """With a rank, all experts' gate and up matrices read little more than that many directions of the input.

    Biased: the layer is one of gpt-oss.
    """
    g = torch.Generator().manual_seed(8)
    gate_up, down = torch.randn(E, 2 * I, H, generator=g) / 7, torch.randn(E, H, I, generator=g) / 7
    if rank is not None:
        directions = torch.linalg.qr(torch.randn(H, H, generator=g)).Q[:rank]
        gate_up = (gate_up @ directions.T) @ directions + 1e-3 * gate_up
    config = QuantizeConfig(bits=bits, basis=basis, block_size=block_size, **options)
    biases = ExpertBiases(torch.randn(E, 2 * I, generator=g), torch.randn(E, H, generator=g)) if biased else None
    return gate_up, down, measured_layer(gate_up, down, inputs(tokens, H, E, unseen=unseen), config, biases), config


def layer(*args, **options):
    gate_up, down, view, config = view_of(*args, **options)
    plan = plan_layer(view)
    quantized = quantize_layer(view, plan)
    return gate_up, down, view.ctx.moments, plan, quantized.tensors, quantized.errors, config


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "best"), [(2, "whitened"), (None, "natural")])
def test_a_sample_of_many_experts_chooses_their_form(rank, best, monkeypatch):
    """The same plan as where all experts try both forms; most experts try one."""

    def planned():
        tried = []
        monkeypatch.setattr(
            planner, "_rank", lambda v, f, s: tried.append((f.name, s.num_experts)) or rank_all(v, f, s)
        )
        return plan_layer(view_of("auto", 4.0, E=48, rank=rank)[2]), tried

    rank_all = planner._rank
    plan, tried = planned()
    assert plan.basis == best
    assert tried == [("natural", 16), ("whitened", 16), (best, 48)]
    monkeypatch.setattr(planner, "SAMPLE_EXPERTS", 24)
    expected, tried = planned()
    assert tried == [("natural", 48), ("whitened", 48)]
    assert plan.pilot_error == expected.pilot_error
    assert plan.bits.keys() == expected.bits.keys()
    assert all(torch.equal(plan.bits[name], expected.bits[name]) for name in plan.bits)


@pytest.mark.slow
@pytest.mark.parametrize("basis", ["natural", "whitened", "paper", "auto"])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("unseen", [None, 2])
def test_a_layer_keeps_its_budget_and_its_function(basis, block_size, unseen):
    bits = 12.0 if basis == "paper" else 9.0  # four experts of 48 x 32: scales and bases weigh much
    gate_up, down, stats, plan, tensors, errors, _ = layer(basis, bits, block_size, unseen)
    assert 8 * plan.layer.nbytes(block_size) <= bits * plan.layer.num_weights
    assert {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()} == {
        k: (s.dtype, s.shape) for k, s in plan.layer.tensor_specs(block_size).items()
    }
    weights = LayerWeights(plan.layer, block_size, tensors)
    x = stats.inputs.x
    for e in range(4):
        gate, up, out = weights.expert_weights(e)
        h = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        g0, u0 = gate_up[e].chunk(2)
        y0 = (torch.nn.functional.silu(x @ g0.T) * (x @ u0.T)) @ down[e].T
        assert float((h @ out.T - y0).square().sum() / y0.square().sum()) < (0.02 if e != unseen else 0.1)
    assert all(0 <= v < 0.02 for v in errors.values())


@pytest.mark.parametrize(
    ("rank", "bits", "alone", "better", "taken"),
    [
        (None, 6.0, None, "natural", "natural"),
        (16, 6.0, None, "whitened", "whitened"),
        (31, 6.0, "SHARED_BASIS_HANDICAP", "whitened", "natural"),  # 1.08 times better
        (16, 7.0, "SHARED_BASIS_GAIN", "whitened", "natural"),  # six times better, where there is little to win
    ],
)
def test_a_shared_basis_must_pay_clearly(rank, bits, alone, better, taken, monkeypatch):
    """By either rule alone."""
    for rule, nothing in {"SHARED_BASIS_HANDICAP": 1.0, "SHARED_BASIS_GAIN": 0.0}.items():
        if alone not in (None, rule):
            monkeypatch.setattr(f"offline_quant.layer.planner.{rule}", nothing)

    def plan(basis, **options):
        return plan_layer(view_of(basis, bits, rank=rank, **options)[2])

    errors = {basis: plan(basis).pilot_error for basis in ("natural", "whitened")}
    assert min(errors, key=errors.get) == better
    assert plan("auto").basis == taken
    assert plan("auto", tune=True).basis == better


def test_what_a_chunk_gave_is_let_go_when_others_follow(monkeypatch):
    """Its codes are in their place by then."""
    monkeypatch.setattr(chunks_module, "CHUNK_EXPERTS", 1)
    *_, view, _ = view_of("natural", 9.0)
    given, alive, copies = [], [], []

    def watched(view, plan, chunk):
        alive.append(sum(ref() is not None for ref in given))
        quantized = quantize_chunk(view, plan, chunk)
        given.extend(map(weakref.ref, quantized.tensors.values()))
        copies.append({name: tensor.clone() for name, tensor in quantized.tensors.items()})
        return quantized

    monkeypatch.setattr(quantizer_module, "quantize_chunk", watched)
    tensors = quantize_layer(view, plan_layer(view)).tensors
    assert alive == [0, len(tensors), len(tensors), len(tensors)]
    assert all(torch.equal(tensors[name], torch.cat([c[name] for c in copies])) for name in tensors)


@pytest.mark.parametrize(
    ("basis", "bits", "rank", "options"),
    [
        ("natural", 4.5, None, {}),
        ("natural", 4.5, None, {"feedback": False, "refine": 0}),
        ("auto", 12.0, None, {"objective": "bt-moe", "ranks": (0, 8), "feedback": False, "refine": 0}),
        ("whitened", 4.5, 10, {}),
        ("whitened", 9.0, 40, {}),
    ],
)
def test_reported_error_is_what_the_stored_weights_lose(basis, bits, rank, options):
    gate_up, down, stats, plan, tensors, errors, config = layer(basis, bits, rank=rank, **options)
    weights = LayerWeights(plan.layer, config.block_size, tensors)
    names = [n for n in errors if n != "down"]
    lost, total = (dict.fromkeys(names, 0.0) for _ in range(2))
    for e in range(4):
        measured = stats.measure_expert(e, OneExpert(gate_up[e], down[e]))
        M, outputs = measured.inputs, measured.output_weights
        # Channels were permuted: compare with the permuted original, found by matching energies of rows.
        gate, up, _ = weights.expert_weights(e)
        again, reference = torch.cat([gate, up]).double(), gate_up[e].double()
        nearest = torch.cdist(again, reference).argmin(1)
        feel, share = outputs.double()[nearest], float(stats.routing_frequency[e])
        d, r = again - reference[nearest], reference[nearest]
        for name, rows in zip(names, torch.arange(2 * len(gate)).tensor_split(len(names)), strict=True):
            lost[name] += share * float((feel * ((d @ M.double()) * d).sum(1))[rows].sum())
            total[name] += share * float((feel * ((r @ M.double()) * r).sum(1))[rows].sum())
    assert {n: errors[n] for n in names} == pytest.approx({n: lost[n] / total[n] for n in names}, rel=0.02)
    assert plan.ranks is None or int(plan.ranks.sum()) > 0


@pytest.mark.parametrize(("basis", "name"), [("whitened", "gate_up"), ("paper", "gate"), ("paper", "up")])
def test_components_that_no_expert_gives_bits_are_not_stored(basis, name):
    """Their rows of the basis, scales and order cost bits that others put to use; weights are those of the codes."""
    bits = {"whitened": 4.5, "paper": 5.0}[basis]
    _, _, view, _ = view_of(basis, bits, rank=10)
    whole, plan = plan_layer(view, trim=False), plan_layer(view)
    rank = plan.layer.projections[name].basis.rank
    assert (whole.layer.projections[name].basis.rank, rank) == (48, 32)
    assert len(plan.table.unused[name]) == 16
    assert 8 * plan.layer.nbytes(16) <= bits * plan.layer.num_weights
    assert plan.allocation.loss < whole.allocation.loss
    tensors = quantize_layer(view, plan).tensors
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {
        k: s.shape for k, s in plan.layer.tensor_specs(16).items()
    }
    assert len(tensors[f"{name}_codes"]) == int(tensors[f"{name}_bits"].sum())
    order = tensors[f"{name}_order"].long()
    assert torch.equal(order.sort(1).values, torch.arange(32).expand(4, 32))
    # Every stored row with bits is the row it was among all components, with its own row of the basis.
    kept = [k for k in range(48) if k not in plan.table.unused[name].tolist()]
    basis_rows = plan.projections[name].decomposition.tensors["basis"]
    assert torch.equal(tensors[f"{name}_basis"], basis_rows[kept])
    for e in range(4):
        before = plan.bits[name][e].repeat_interleave(16)
        after = tensors[f"{name}_bits"][e].repeat_interleave(16)
        components = plan.projections[name].components.order[e]
        assert [kept[k] for k in order[e][after > 0].tolist()] == components[before > 0].tolist()
        assert torch.equal(after[after > 0], before[before > 0])


def test_where_every_component_is_used_all_are_stored():
    plan = plan_layer(view_of("whitened", 9.0)[2])
    assert plan.layer.projections["gate_up"].basis.rank == 48
    assert not plan.table.unused


@pytest.mark.parametrize("basis", ["natural", "whitened"])
def test_down_makes_up_for_gate_and_up(basis, monkeypatch):
    """The layer's output is nearer to the original's than with a down fitted to its original weights."""

    def lost():
        gate_up, down, stats, plan, tensors, _, config = layer(basis, 4.5 if basis == "natural" else 5.5)
        data = stats.inputs
        again = moe_forward(
            LayerWeights(plan.layer, config.block_size, tensors), data.x, data.topk_weights, data.topk_ids
        )
        y = torch.zeros_like(again)
        for slot in range(2):
            for e in range(4):
                rows = data.topk_ids[:, slot] == e
                gate, up = (data.x[rows] @ gate_up[e].T).chunk(2, 1)
                h = torch.nn.functional.silu(gate) * up
                y[rows] += data.topk_weights[rows, slot, None] * (h @ down[e].T)
        return float((again - y).square().sum() / y.square().sum())

    with_correction = lost()
    monkeypatch.setattr(quantizer_module, "correct_down", lambda down, moments, missing: down)
    assert with_correction < 0.95 * lost()


def mixture(weights, data):
    return moe_forward(weights, data.x, data.topk_weights, data.topk_ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("basis", "biased"), [("natural", False), ("natural", True), ("whitened", False), ("paper", False)]
)
def test_fitted_together_experts_come_nearer_to_a_target_of_the_whole_layer(basis, biased):
    """The experts' own output, and that with an error of earlier layers, which they can only partly make up for."""
    bits = 6.5 if basis == "natural" else 10.0  # enough that rounding does not hide it
    _, _, view, config = view_of(basis, bits, unseen=1, biased=biased, tokens=4800)
    data = view.ctx.moments.inputs
    original = torch.cat(list(original_output(view.ctx)))
    drift = 0.1 * data.x @ torch.randn(48, 48, generator=torch.Generator().manual_seed(5)) / 7

    def lost(target, fitted):
        _, _, fresh, _ = view_of(basis, bits, unseen=1, biased=biased, tokens=4800)
        plan = plan_layer(fresh)
        tensors = quantize_layer(fresh, plan, target.clone() if fitted else None).tensors
        output = mixture(LayerWeights(plan.layer, config.block_size, tensors), data)
        assert torch.allclose(torch.cat(list(quantized_output(fresh))), output, atol=1e-5)
        return float((output - target).square().sum())

    assert lost(original, True) <= lost(original, False)  # equal where other experts tell nothing of an error
    assert lost(original + drift, True) < 0.95 * lost(original + drift, False)


def test_a_joint_fit_is_the_least_squares_solution_of_all_experts_together():
    """Sweeps converge to what one solve over all experts' activations finds, in float64. Tokens count differently."""
    T, E, I, H = 400, 3, 5, 4  # noqa: E741
    g = torch.Generator().manual_seed(1)
    ids = torch.rand(T, E, generator=g).topk(2).indices
    weight, target = torch.rand(T, 2, generator=g).double(), torch.randn(T, H, generator=g).double()
    share = torch.rand(T, generator=g).double() + 0.1
    routed, features = [], torch.zeros(T, E * I, dtype=torch.float64)
    for e in range(E):
        token, slot = (ids == e).nonzero(as_tuple=True)
        hidden = torch.randn(len(token), I, generator=g).double()
        routed.append(RoutedTokens(token, weight[token, slot], share[token], hidden, float(len(token))))
        features[token, e * I : (e + 1) * I] = hidden * weight[token, slot, None]
    matrices = {e: torch.zeros(H, I, dtype=torch.float64) for e in range(E)}
    moments = [(r.hidden * (r.weight.square() * r.share)[:, None]).T @ r.hidden / r.mass for r in routed]
    left = target.clone()
    fit_jointly(
        lambda: range(E),
        routed.__getitem__,
        moments.__getitem__,
        matrices.__getitem__,
        matrices.__setitem__,
        left,
        sweeps=400,
        chance=0,
    )
    root = share.sqrt()[:, None]
    best = torch.linalg.lstsq(features * root, target * root).solution
    assert torch.allclose(torch.cat([matrices[e] for e in range(E)], 1).T, best, atol=1e-6)
    assert torch.allclose(left, target - features @ best, atol=1e-6)


@pytest.mark.parametrize(("told", "share"), [(0.0, 0.25), (0.05, 0.5)])
def test_a_joint_fit_trusts_no_chance(told, share):
    """Of a target that activations tell little or nothing of, on other tokens; a few tokens have far larger errors."""
    T, E, I, H = 1200, 3, 24, 16  # noqa: E741
    g = torch.Generator().manual_seed(3)
    scale = torch.linspace(3, 0.1, I, dtype=torch.float64)
    true = torch.zeros(E, H, I, dtype=torch.float64)
    true[:, :, :3] = torch.randn(E, H, 3, generator=g).double() / scale[:3] / (3 * E) ** 0.5 * told**0.5

    def sampled(n):
        return torch.randn(E, n, I, generator=g).double() * scale

    hidden, token = sampled(T), torch.arange(T)
    noise = torch.randn(T, H, generator=g).double() * (1 + 9 * (torch.rand(T, 1, generator=g) < 0.02))
    target = torch.einsum("eti,ehi->th", hidden, true) + noise
    ones = torch.ones(T).double()
    routed = [RoutedTokens(token, ones, ones, h, float(T)) for h in hidden]
    moments = [h.T @ h / T for h in hidden]
    fresh = sampled(4000)

    def wrong(chance):
        found = torch.zeros_like(true)
        fit_jointly(
            lambda: range(E),
            routed.__getitem__,
            moments.__getitem__,
            found.__getitem__,
            found.__setitem__,
            target.clone(),
            chance=chance,
        )
        return float(torch.einsum("eti,ehi->th", fresh, found - true).square().sum(1).mean())

    assert wrong(1) < share * wrong(0)
    nothing = float(torch.einsum("eti,ehi->th", fresh, true).square().sum(1).mean())
    assert wrong(1) < max(0.7 * nothing, 0.25 * wrong(0))


def test_natural_has_no_basis_and_the_file_orders_no_intermediate_channels():
    _, _, _, plan, tensors, _, _ = layer("natural", 9.0)
    assert natural("down").basis is None
    assert "down_order" not in tensors
    assert "gate_up_basis" not in tensors
    assert plan.basis == "natural"
    assert isinstance(quantize(torch.randn(1, 4, 4), moments(1, 4), torch.ones(1, 4), "K"), Quantized)


def test_histogram_counts_no_padding_and_no_kept_experts():
    made = Layer(
        num_experts=3,
        hidden_size=20,
        intermediate_size=5,
        projections={
            "gate_up": Projection(code_rows=9, kept_experts=(1,)),
            "down": Projection(code_rows=0),
        },
    )
    bits = torch.tensor([[2, 3], [0, 0], [0, 4]], dtype=torch.uint8)
    assert width_histogram(made, "gate_up", bits, 16) == {"0": 160, "2": 160, "3": 40, "4": 40}
