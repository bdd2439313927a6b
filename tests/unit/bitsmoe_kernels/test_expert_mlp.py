"""The activation's one owner gives the bits that each formula, written out, gives."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitsmoe_kernels.expert_mlp import ACTIVATIONS, HiddenAct, activation_with_slope_, gated, gated_
from bruteforce import activation

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
    assert torch.equal(gated(gate, up), F.silu(gate) * up)
    assert torch.equal(gate, before)


def test_gradients_of_tuning() -> None:
    gate, up = (v.clone().requires_grad_() for v in gate_and_up(33, 40))
    got = torch.autograd.grad(gated(gate, up).square().sum(), (gate, up))
    want = torch.autograd.grad((F.silu(gate) * up).square().sum(), (gate, up))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("n", "inner"), SIZES)
def test_gated_in_place_of_the_hidden_moments(n: int, inner: int) -> None:
    gate, up = (v.contiguous() for v in gate_and_up(n, inner))
    want, value, out = F.silu(gate) * up, F.silu(gate), torch.empty(n + 2, inner)
    got = gated_(gate, up, out=out[1:-1])
    assert torch.equal(got, want)
    assert torch.equal(out[1:-1], want)
    assert torch.equal(gate, value)


@pytest.mark.parametrize(("n", "inner"), SIZES)
def test_value_and_slope_of_the_expert_moments(n: int, inner: int) -> None:
    g, u = (v.contiguous() for v in gate_and_up(n, inner))
    sigmoid = g.sigmoid()
    silu = g * sigmoid
    h = silu * u
    squared_slope = ((torch.addcmul(sigmoid, silu, sigmoid, value=-1) + silu) * u).square()

    gate = g.clone()
    value, slope = activation_with_slope_(gate)
    assert value is gate
    assert torch.equal(value, silu)
    assert torch.equal(value * u, h)
    assert torch.equal(slope.mul_(u).square_(), squared_slope)
    assert torch.equal(value.square_(), silu.square())


def test_the_slope_is_the_derivative() -> None:
    g = gate_and_up(64, 64)[0].double().requires_grad_()
    (want,) = torch.autograd.grad(F.silu(g).sum(), g)
    _, slope = activation_with_slope_(g.detach().clone())
    torch.testing.assert_close(slope, want, rtol=1e-12, atol=1e-12)


def test_value_with_slope_is_not_the_other_value() -> None:
    """They round differently, so one must not stand in for the other."""
    gate, _ = gate_and_up(1024, 96)
    value, _ = activation_with_slope_(gate.clone())
    torch.testing.assert_close(value, F.silu(gate))
    assert not torch.equal(value, F.silu(gate))


@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
def test_all_forms_of_an_activation(hidden_act: HiddenAct) -> None:
    """Against an independent statement of it in float64, and its slope against autograd's."""
    gate, up = (v.double() for v in gate_and_up(64, 48))
    want = torch.from_numpy(activation(gate.numpy(), hidden_act))
    torch.testing.assert_close(gated(gate, up, hidden_act), want * up)
    torch.testing.assert_close(gated_(gate.clone(), up, torch.empty_like(up), hidden_act), want * up)
    g = gate.clone().requires_grad_()
    (slope,) = torch.autograd.grad(gated(g, torch.ones_like(up), hidden_act).sum(), g)
    found = activation_with_slope_(gate.clone(), hidden_act)
    torch.testing.assert_close(found[0], want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[1], slope, rtol=1e-9, atol=1e-12)
