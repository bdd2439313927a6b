"""Allocation against exhaustive search and dynamic programming."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.allocation import solver as allocation
from offline_quant.allocation.solver import allocate


def exhaustive(loss, cost, budget):
    best = np.inf
    for choice in itertools.product(range(loss.shape[1]), repeat=len(loss)):
        at = np.arange(len(loss)), np.array(choice)
        if cost[at].sum() <= budget:
            best = min(best, loss[at].sum())
    return best


def dynamic(loss, cost, budget):
    """Least loss for every budget from 0 to `budget`, unit by unit."""
    table = np.zeros(budget + 1)
    for row, price in zip(loss, cost, strict=True):
        new = np.full(budget + 1, np.inf)
        for value, c in zip(row, price, strict=True):
            if c <= budget:
                new[c:] = np.minimum(new[c:], table[: budget + 1 - c] + value)
        table = new
    return table[budget]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(2, 4), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_equals_exhaustive_search(units, choices, seed, tightness):
    rng = np.random.default_rng(seed)
    loss = rng.lognormal(0, 2, (units, choices))
    cost = rng.integers(0, 20, (units, choices)) * 32
    low, high = int(cost.min(1).sum()), int(cost.max(1).sum())
    budget = low + round(tightness * (high - low)) + int(rng.integers(0, 31))
    found = allocate(loss, cost, budget)
    assert found.cost <= budget
    assert found.loss == pytest.approx(exhaustive(loss, cost, budget), rel=1e-5)
    assert found.loss == pytest.approx(loss[np.arange(units), found.choice].sum())


@pytest.mark.parametrize("budget", [0, 137, 400, 1000])
def test_equals_dynamic_programming_at_a_real_size(budget):
    rng = np.random.default_rng(1)
    energy = rng.lognormal(0, 1.5, 200)
    loss = energy[:, None] * np.array([1, 0.36, 0.12, 0.037, 0.0115])
    cost = np.tile(np.arange(5), (200, 1))
    found = allocate(loss, cost, budget)
    assert found.cost <= budget
    assert found.loss == pytest.approx(dynamic(loss, cost, budget), rel=1e-5)
    assert 0 <= found.gap <= 1e-5


def test_scale_of_losses_does_not_matter():
    rng = np.random.default_rng(2)
    loss = np.sort(rng.lognormal(0, 2, (50, 4)), 1)[:, ::-1]
    cost = np.tile(np.arange(4) * 8192, (50, 1))
    reference = allocate(loss, cost, 8192 * 70).loss
    for scale in (1e-12, 1e12):
        assert allocate(loss * scale, cost, 8192 * 70).loss == pytest.approx(reference * scale, rel=1e-5)


def test_a_budget_that_holds_everything_takes_the_widest():
    loss, cost = np.array([[1.0, 0.5, 0.1]] * 3), np.array([[0, 1, 2]] * 3)
    found = allocate(loss, cost, 6)
    assert found.choice.tolist() == [2, 2, 2]
    assert found.gap == 0


def test_no_loss_at_all_is_solved():
    found = allocate(np.zeros((4, 3)), np.array([[0, 1, 2]] * 4), 3)
    assert found.cost <= 3
    assert found.loss == 0


def test_impossible_budget_names_the_smallest():
    with pytest.raises(BitsmoeError, match="budget 5 is below the smallest possible cost 6"):
        allocate(np.ones((3, 2)), np.array([[2, 4]] * 3), 5)


def test_degenerate_losses_are_refused():
    with pytest.raises(BitsmoeError, match="not finite"):
        allocate(np.array([[np.nan, 1.0]]), np.array([[0, 1]]), 1)


def test_a_search_that_ends_without_a_solution_keeps_the_relaxed_one_and_its_gap(monkeypatch):
    """HiGHS then returns zeros, which would read as no bits anywhere."""
    rng = np.random.default_rng(3)
    loss = rng.lognormal(0, 1.5, (300, 4))
    cost = rng.integers(0, 1000, (300, 4))
    budget = int(cost.min(1).sum()) + 30_001
    best = allocate(loss, cost, budget)
    run = allocation.highspy.Highs.run

    def stopped(self):
        self.setOptionValue("time_limit", 0.0)
        return run(self)

    monkeypatch.setattr(allocation.highspy.Highs, "run", stopped)
    found = allocate(loss, cost, budget)
    assert found.cost <= budget
    assert found.loss * (1 - found.gap) <= best.loss * (1 + 1e-9) <= found.loss * (1 + 1e-9)
    assert found.gap < 0.01


def test_a_choice_that_a_unit_does_not_have_is_not_taken():
    loss = np.array([[9.0, np.inf, 0.2], [1.0, 0.9, 0.2]])
    assert allocate(loss, np.array([[0, 1, 2], [0, 1, 2]]), 1).choice.tolist() == [0, 1]


@pytest.mark.nightly
@pytest.mark.slow
def test_a_million_units_are_solved_with_a_proven_gap():
    rng = np.random.default_rng(4)
    loss = rng.lognormal(0, 1.5, (1_000_000, 1)) * np.array([1, 0.36, 0.12, 0.037, 0.0115])
    cost = np.tile(np.arange(5) * 24_576, (1_000_000, 1))
    found = allocate(loss, cost, 2 * 1_000_000 * 24_576)
    assert found.cost <= 2 * 1_000_000 * 24_576
    assert found.gap < 1e-5


def test_equal_units_share_a_budget_without_a_long_search():
    loss, cost = np.tile([1.0, 0.36, 0.12], (500, 1)), np.tile([0, 1, 2], (500, 1))
    found = allocate(loss, cost, 777)
    assert found.cost == 777
    assert found.loss == pytest.approx(277 * 0.12 + 223 * 0.36)


def test_the_solver_does_not_greet_where_results_go():
    """In a process of its own: it greets once."""
    code = "from offline_quant.allocation.solver import _solver; _solver(); print('result')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "result\n"
