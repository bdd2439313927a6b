"""The activation's one owner gives the bits that each formula, written out, gives."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitsmoe_kernels.expert_mlp import (
    ACTIVATIONS,
    HiddenAct,
    activated,
    activated_,
    activated_with_slopes_,
    input_matrices,
)
from bruteforce import gated as brute_gated

SIZES = [(1, 1), (3, 40), (257, 131), (1024, 96)]
"""Tokens and channels: scalars, vector registers with a rest, whole blocks of calibration."""


def gate_and_up(n: int, inner: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Columns of one matrix, as a product with gate and up together gives them; some gates are extreme."""
    gen = torch.Generator().manual_seed(n)
    both = torch.randn(n, 2 * inner, generator=gen) * 4
    both[0, 0] = 1e4
    both[-1, inner - 1] = -1e4
    gate, up = both.to(dtype).chunk(2, -1)
    return gate, up


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("n", "inner"), SIZES)
def test_gated_of_the_reference_of_tuning_and_of_streaming(n: int, inner: int, dtype: torch.dtype) -> None:
    gate, up = gate_and_up(n, inner, dtype)
    before = gate.clone()
    assert torch.equal(activated((gate, up)), F.silu(gate) * up)
    assert torch.equal(gate, before)


def test_gradients_of_tuning() -> None:
    gate, up = (v.clone().requires_grad_() for v in gate_and_up(33, 40))
    got = torch.autograd.grad(activated((gate, up)).square().sum(), (gate, up))
    want = torch.autograd.grad((F.silu(gate) * up).square().sum(), (gate, up))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("n", "inner"), SIZES)
def test_gated_in_place_of_the_hidden_moments(n: int, inner: int) -> None:
    gate, up = (v.contiguous() for v in gate_and_up(n, inner))
    want, value, out = F.silu(gate) * up, F.silu(gate), torch.empty(n + 2, inner)
    got = activated_((gate, up), out=out[1:-1])
    assert torch.equal(got, want)
    assert torch.equal(out[1:-1], want)
    assert torch.equal(gate, value)


@pytest.mark.parametrize(("n", "inner"), SIZES)
def test_value_and_slopes_of_the_expert_moments(n: int, inner: int) -> None:
    g, u = (v.contiguous() for v in gate_and_up(n, inner))
    sigmoid = g.sigmoid()
    silu = g * sigmoid
    by_gate = (torch.addcmul(sigmoid, silu, sigmoid, value=-1) + silu) * u

    out = torch.empty_like(u)
    found = activated_with_slopes_((g.clone(), u.clone()), out)
    assert torch.equal(out, silu * u)
    assert torch.equal(found[0], by_gate)
    assert torch.equal(found[1], silu)


def test_value_with_slopes_is_not_the_other_value() -> None:
    """They round differently, so one must not stand in for the other."""
    gate, _ = gate_and_up(1024, 96)
    _, value = activated_with_slopes_((gate.clone(), torch.ones_like(gate)), torch.empty_like(gate))
    torch.testing.assert_close(value, F.silu(gate))
    assert not torch.equal(value, F.silu(gate))


@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
def test_all_forms_of_an_activation(hidden_act: HiddenAct) -> None:
    """Against an independent statement of it in float64, and its slopes against autograd's."""
    gate, up = (v.double() * 2 for v in gate_and_up(64, 48))
    before, want = (gate.clone(), up.clone()), torch.from_numpy(brute_gated(gate.numpy(), up.numpy(), hidden_act))
    pre = (gate, up)[-input_matrices(hidden_act) :]
    torch.testing.assert_close(activated(pre, hidden_act), want)
    assert torch.equal(gate, before[0])
    assert torch.equal(up, before[1])
    out = torch.empty_like(up)
    assert activated_([v.clone() for v in pre], out, hidden_act) is out
    assert torch.equal(out, activated(pre, hidden_act))
    leaves = [v.clone().requires_grad_() for v in pre]
    slopes = torch.autograd.grad(activated(leaves, hidden_act).sum(), leaves)
    found = activated_with_slopes_([v.clone() for v in pre], out, hidden_act)
    torch.testing.assert_close(out, want)
    for got, slope in zip(found, slopes, strict=True):
        torch.testing.assert_close(got, slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
def test_the_degree_of_an_activation(hidden_act: HiddenAct) -> None:
    """Up times c gives c^degree times h, exactly for powers of two."""
    gate, up = (v * 4 for v in gate_and_up(64, 48))
    degree, pre = ACTIVATIONS[hidden_act].degree, (gate, up)[-input_matrices(hidden_act) :]
    h, scaled = activated(pre, hidden_act), activated((*pre[:-1], up * 4), hidden_act)
    fitting = [d for d in range(4) if torch.equal(scaled, h * 4.0**d)]
    assert fitting == ([] if degree is None else [degree])


@pytest.mark.parametrize(("hidden_act", "limit"), [("swigluoai", 7.0), ("silu_clamp10", 10.0)])
def test_clamps_bite(hidden_act: HiddenAct, limit: float) -> None:
    """Beyond its limits an activation stays where it is, and its slopes are zero."""
    gate, up = limit * torch.tensor([[1.2, 0.1, 1.1, -1.2]]), limit * torch.tensor([[0.1, 1.2, -1.1, 0.2]])
    at_limit = activated((gate.clamp(max=limit), up.clamp(-limit, limit)), hidden_act)
    assert torch.equal(activated((gate, up), hidden_act), at_limit)
    by_gate, by_up = activated_with_slopes_((gate, up), torch.empty_like(up), hidden_act)
    assert (by_gate == 0).tolist() == [[True, False, True, False]]
    assert (by_up == 0).tolist() == [[False, True, True, False]]
