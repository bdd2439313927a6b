"""Where the errors of a quantized model come from."""

import itertools
import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

from benchmarks.real_model import causes
from bitsmoe_kernels.errors import BitsmoeError
from dense_models import random_llama

EXPERTS = 3


def model_of_three_layers(seed: int = 0) -> Any:
    return random_llama(3, seed).double()


def noisy(model: Any, layers: set[int], size: float = 0.05) -> Any:
    """A copy whose MLPs have errors in some layers, and channels in another order within each expert."""
    g = torch.Generator().manual_seed(7)
    other = deepcopy(model)
    for index, layer in enumerate(other.model.layers):
        order = torch.cat([e * 16 + torch.randperm(16, generator=g) for e in range(EXPERTS)])
        causes.reorder(layer.mlp, order)
        if index in layers:
            for p in layer.mlp.parameters():
                p.data += size * p.data.std() * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return other


def windows() -> torch.Tensor:
    return torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(1))


def test_least_error_of_equal_components() -> None:
    assert causes.least_error(torch.full((10,), 3.0), 2.5) == pytest.approx(2**-5)


def test_least_error_is_that_of_the_best_choice_of_components() -> None:
    variances, bits = torch.tensor([9.0, 4.0, 0.5, 0.1, 0.0]), 0.8
    found = math.inf
    for count in range(1, 5):
        for kept in itertools.combinations(range(4), count):
            v = variances[list(kept)].double()
            # Equal distortion; the rates sum to the budget.
            rates = bits * len(variances) / count + 0.5 * (v.log2() - v.log2().mean())
            if bool((rates >= 0).all()):
                found = min(found, float((v * (-2 * rates).exp2()).sum() + variances.sum() - v.sum()))
    assert causes.least_error(variances, bits) == pytest.approx(found / variances.sum().item())


def test_no_rounding_of_a_gaussian_layer_is_below_the_bound() -> None:
    g = torch.Generator().manual_seed(0)
    weight, mix = torch.randn(512, 8, generator=g), torch.randn(8, 8, generator=g)
    x = torch.randn(4096, 8, generator=g) @ mix
    levels = torch.tensor([-1.51, -0.4528, 0.4528, 1.51])  # the best four of a Gaussian, 2 bits
    rounded = levels[(weight[..., None] - levels).abs().argmin(-1)]
    error = ((x @ (rounded - weight).T).square().sum() / (x @ weight.T).square().sum()).item()
    assert causes.least_linear_error(weight, x.T @ x, 2.0) < error
    white = torch.eye(8)
    assert causes.least_linear_error(weight, white, 2.0) == pytest.approx(1 / 16, rel=0.02)


def test_a_model_in_another_order_has_no_errors() -> None:
    model = model_of_three_layers()
    for layer in causes.causes(model, noisy(model, set()), windows(), EXPERTS, 2.0)[0]:
        errors = [layer.own, layer.own_gate_up, layer.own_down, layer.drift, layer.total, layer.state, layer.gate_up,
                  layer.down, layer.kl_alone, layer.kl_without]  # fmt: skip
        assert max(map(abs, errors)) < 1e-12


def test_errors_of_one_layer_are_its_own_before_and_drift_behind() -> None:
    model = model_of_three_layers()
    (before, broken, behind), kl = causes.causes(model, noisy(model, {1}), windows(), EXPERTS, 2.0)
    assert max(before.own, before.drift, before.state, before.kl_alone) < 1e-12
    assert min(broken.own, broken.own_gate_up, broken.own_down, broken.state, broken.gate_up, broken.down) > 1e-5
    assert broken.drift < 1e-12
    assert broken.total == pytest.approx(broken.own)
    assert behind.own < 1e-12
    assert behind.total == pytest.approx(behind.drift)
    assert behind.drift > 1e-5
    assert broken.kl_alone == pytest.approx(before.kl_without) == pytest.approx(behind.kl_without)
    assert broken.kl_without < 1e-12 < behind.kl_without
    assert kl == pytest.approx(broken.kl_alone)


def test_divergence_is_that_of_the_whole_models() -> None:
    model = model_of_three_layers()
    other = noisy(model, {0, 2}, 0.3)
    with torch.no_grad():
        p, q = (log_softmax(m(windows(), use_cache=False).logits, -1) for m in (model, other))
        expected = (p.exp() * (p - q)).sum(-1).mean().item()
        found = causes.divergence(other, 0, other.model.embed_tokens(windows()), list(p))
    assert found == pytest.approx(expected)
    alone, _ = causes.causes(model, noisy(model, {2}, 0.3), windows(), EXPERTS, 2.0)
    assert alone[2].kl_alone == pytest.approx(alone[0].kl_without)
    assert alone[0].kl_without > 1e-4


def test_experts_of_another_model_are_refused() -> None:
    with pytest.raises(BitsmoeError, match="is it a checkpoint of this model"):
        causes.causes(model_of_three_layers(0), model_of_three_layers(1), windows(), EXPERTS, 2.0)
