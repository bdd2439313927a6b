"""Bits for every unit under one budget: a multiple-choice knapsack. Arrays in, choices out.

Minimise sum loss[u, c] over one choice c for each unit u, with sum cost[u, c] <= budget (the integer program of the
BitsMoE paper, arXiv 2606.00079). A price on cost makes the units independent (Lagrangian relaxation): the best price
bounds the optimum from below and leaves few units undecided, and HiGHS settles those exactly. That takes the same
second for one layer and for a whole model of millions of units.
"""

import os
from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import NDArray

from bitsmoe_kernels.errors import BitsmoeError

MAX_NODES = 20_000
"""Bounds the search. Nodes, not seconds: a slower machine must not give another checkpoint."""
MAX_CORE = 2_000
"""Most units HiGHS is given; beyond that the bound of the relaxation is reported."""
RELATIVE_GAP = 1e-6
_BISECTIONS = 200

Losses = NDArray[np.float64]
Costs = NDArray[np.int64]


@dataclass(frozen=True)
class Allocation:
    """Result of one program.

    Attributes:
        choice: [units], index of the choice taken.
        loss: its total loss.
        cost: its total cost, in the units of the budget.
        gap: proven relative gap, (loss - bound) / loss.
    """

    choice: NDArray[np.int64]
    loss: float
    cost: int
    gap: float


def allocate(loss: Losses, cost: Costs, budget: int) -> Allocation:
    """Solve the knapsack.

    Args:
        loss: [units, choices], >= 0; infinite where a unit does not have the choice.
        cost: [units, choices], integers >= 0.
        budget: largest total cost.

    Raises:
        BitsmoeError: losses that are not numbers, a unit without a choice, or a budget below the cheapest choices.
    """
    if np.isnan(loss).any() or not np.isfinite(loss.min(1)).all():
        raise BitsmoeError("allocation: losses are not finite")
    cheapest = int(np.where(np.isfinite(loss), cost, np.iinfo(np.int64).max).min(1).sum())
    if cheapest > budget:
        raise BitsmoeError(f"allocation: budget {budget} is below the smallest possible cost {cheapest}")
    choice, price, bound = _relax(loss, cost, budget)
    choice = _spend(loss, cost, budget, choice)
    total = float(_taken(loss, choice).sum())
    if total - bound > RELATIVE_GAP * total:
        choice, bound = _settle(loss, cost, budget, choice, price, bound)
        total = float(_taken(loss, choice).sum())
    gap = max(0.0, (total - bound) / max(total, 1e-300))
    return Allocation(choice, total, int(_taken(cost, choice).sum()), gap)


def _taken(table: NDArray, choice: NDArray[np.int64]) -> NDArray:
    return table[np.arange(len(table)), choice]


def _relax(loss: Losses, cost: Costs, budget: int) -> tuple[NDArray[np.int64], float, float]:
    """Choices within the budget at the best price, the price, and the bound it proves."""

    def respond(price: float) -> tuple[NDArray[np.int64], int, float]:
        priced = loss + price * cost
        least = priced.min(1)
        # Among equally good choices the cheapest.
        choice = np.where(priced <= least[:, None], cost, np.iinfo(np.int64).max).argmin(1)
        return choice, int(_taken(cost, choice).sum()), float(least.sum()) - price * budget

    choice, spent, bound = respond(0.0)
    if spent <= budget:
        return choice, 0.0, bound
    low, high = 0.0, 1.0
    finite = np.where(np.isfinite(loss), loss, 0.0)
    high = float(finite.max()) / max(1, int(np.gcd.reduce(cost, axis=None))) + 1e-300
    choice, spent, best = respond(high)
    while spent > budget:
        low, high = high, 2 * high
        choice, spent, best = respond(high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        tried, spent, bound = respond(middle)
        best = max(best, bound)
        if spent <= budget:
            choice, high = tried, middle
        else:
            low = middle
    return choice, high, best


def _spend(loss: Losses, cost: Costs, budget: int, choice: NDArray[np.int64]) -> NDArray[np.int64]:
    """Spend what is left of the budget on the best single improvements, one for each unit."""
    choice = choice.copy()
    left = budget - int(_taken(cost, choice).sum())
    extra = cost - _taken(cost, choice)[:, None]
    gain = _taken(loss, choice)[:, None] - loss
    fits = (gain > 0) & (extra <= left)
    rate = np.where(fits, gain / np.maximum(extra, 1e-9), -np.inf)
    pick = rate.argmax(1)
    for unit in np.argsort(-_taken(rate, pick), kind="stable"):
        if rate[unit, pick[unit]] == -np.inf or left <= 0:
            break
        if extra[unit, pick[unit]] <= left:
            left -= int(extra[unit, pick[unit]])
            choice[unit] = pick[unit]
    return choice


def _settle(
    loss: Losses, cost: Costs, budget: int, choice: NDArray[np.int64], price: float, bound: float
) -> tuple[NDArray[np.int64], float]:
    """Let HiGHS decide the units that the price leaves open; returns choices and the proven bound.

    A choice whose reduced cost exceeds the gap cannot be part of a better solution, so it is left out.
    """
    total = float(_taken(loss, choice).sum())
    priced = loss + price * cost
    reduced = priced - priced.min(1, keepdims=True)
    relaxed = float(priced.min(1).sum()) - price * budget
    open_choice = reduced <= (total - relaxed) * (1 + 1e-9)
    others = open_choice.sum(1) > 1
    core = np.flatnonzero(others)
    exact = len(core) <= MAX_CORE
    if not exact:
        second = np.partition(reduced, 1, axis=1)[:, 1]
        core = np.sort(core[np.argsort(second[core], kind="stable")[:MAX_CORE]])
    fixed = np.ones(len(loss), bool)
    fixed[core] = False
    # Outside the core, a unit has one open choice, or keeps what it has.
    settled = np.where(others, choice, priced.argmin(1))
    rest = budget - int(_taken(cost, settled)[fixed].sum())
    picked, core_bound = _solve(loss[core], cost[core], open_choice[core], rest)
    if picked is None:
        return choice, bound
    found = settled.copy()
    found[core] = picked
    fixed_loss = float(_taken(loss, settled)[fixed].sum())
    if float(_taken(loss, found).sum()) > total or int(_taken(cost, found).sum()) > budget:
        found = choice
    if exact:
        # What was left out can only be worse than the solution at hand.
        bound = max(bound, min(total, fixed_loss + core_bound))
    return found, bound


def _solve(
    loss: Losses, cost: Costs, allowed: NDArray[np.bool_], budget: int
) -> tuple[NDArray[np.int64] | None, float]:
    """HiGHS on one binary for each unit and allowed choice; returns choices, or None, and the bound on the loss."""
    units, choices = loss.shape
    unit, choice = np.nonzero(allowed)
    # Scaled so that HiGHS's absolute tolerances are small against both losses and costs.
    base = np.where(allowed, loss, np.inf).min(1)
    value = loss[unit, choice] - base[unit]
    scale = float(value.max()) or 1.0
    weight = cost[unit, choice]
    divisor = int(np.gcd.reduce(weight)) or 1
    n = len(unit)
    model = highspy.HighsModel()
    lp = model.lp_
    lp.num_col_, lp.num_row_ = n, units + 1
    lp.col_cost_ = value / scale
    lp.col_lower_, lp.col_upper_ = np.zeros(n), np.ones(n)
    lp.row_lower_ = np.append(np.ones(units), -highspy.kHighsInf)
    lp.row_upper_ = np.append(np.ones(units), budget // divisor)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.arange(0, 2 * n + 1, 2)
    lp.a_matrix_.index_ = np.stack([unit, np.full(n, units)], 1).ravel()
    lp.a_matrix_.value_ = np.stack([np.ones(n), weight // divisor], 1).ravel().astype(float)
    lp.integrality_ = [highspy.HighsVarType.kInteger] * n
    solver = _solver()
    for option, setting in (
        ("output_flag", False), ("threads", 1), ("random_seed", 0), ("mip_max_nodes", MAX_NODES),
        ("mip_rel_gap", RELATIVE_GAP),
    ):  # fmt: skip
        solver.setOptionValue(option, setting)
    solver.passModel(model)
    solver.run()
    if solver.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None, -np.inf
    taken = np.array(solver.getSolution().col_value)
    table = np.full((units, choices), -1.0)
    table[unit, choice] = taken
    return table.argmax(1), float(base.sum()) + solver.getInfo().mip_dual_bound * scale


def _solver() -> highspy.Highs:
    """A new HiGHS, whose greeting on standard output, where results go, no option turns off."""
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        return highspy.Highs()
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
