"""Bits for every unit under one budget: a multiple-choice knapsack, solved by HiGHS. Arrays in, choices out.

Minimise sum loss[u, c] over one choice c for each unit u, with sum cost[u, c] <= budget (design of the BitsMoE paper,
section 'integer linear program'; units here are blocks of components).
"""

from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import NDArray

from bitsmoe_kernels.errors import BitsmoeError

MAX_NODES = 100_000
"""Bounds the search. Nodes, not seconds: a slower machine must not give another checkpoint."""
RELATIVE_GAP = 1e-6


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


def allocate(loss: NDArray[np.float64], cost: NDArray[np.int64], budget: int) -> Allocation:
    """Solve the knapsack.

    Args:
        loss: [units, choices], >= 0.
        cost: [units, choices], integers >= 0.
        budget: largest total cost.

    Raises:
        BitsmoeError: the budget is below the cheapest choices, or HiGHS found no solution.
    """
    if not np.isfinite(loss).all():
        raise BitsmoeError("allocation: losses are not finite; the calibration statistics are degenerate")
    cheapest = int(cost.min(1).sum())
    if cheapest > budget:
        raise BitsmoeError(f"allocation: budget {budget} is below the smallest possible cost {cheapest}")
    choice = loss.argmin(1)
    bound = float(loss.min(1).sum())
    if int(cost[np.arange(len(loss)), choice].sum()) > budget:
        choice, bound = _solve(loss, cost, budget)
    at = np.arange(len(loss)), choice
    total, spent = float(loss[at].sum()), int(cost[at].sum())
    if spent > budget:
        raise BitsmoeError(f"allocation: HiGHS returned cost {spent}, above the budget {budget}")
    return Allocation(choice, total, spent, max(0.0, (total - bound) / max(total, 1e-300)))


def _solve(loss: NDArray[np.float64], cost: NDArray[np.int64], budget: int) -> tuple[NDArray[np.int64], float]:
    """HiGHS on one binary for each unit and choice; returns choices and the proven bound on the loss."""
    units, choices = loss.shape
    # Scaled so that HiGHS's absolute tolerances are small against both losses and costs.
    scale = float(loss.sum()) or 1.0
    unit_cost = int(np.gcd.reduce(cost, axis=None)) or 1
    model = highspy.HighsModel()
    lp = model.lp_
    n = units * choices
    lp.num_col_, lp.num_row_ = n, units + 1
    lp.col_cost_ = (loss / scale * units).ravel()
    lp.col_lower_, lp.col_upper_ = np.zeros(n), np.ones(n)
    lp.row_lower_ = np.append(np.ones(units), -highspy.kHighsInf)
    lp.row_upper_ = np.append(np.ones(units), budget // unit_cost)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.arange(0, 2 * n + 1, 2)
    lp.a_matrix_.index_ = np.stack([np.repeat(np.arange(units), choices), np.full(n, units)], 1).ravel()
    lp.a_matrix_.value_ = np.stack([np.ones(n), (cost // unit_cost).ravel()], 1).ravel().astype(float)
    lp.integrality_ = [highspy.HighsVarType.kInteger] * n
    solver = highspy.Highs()
    for option, value in (
        ("output_flag", False), ("threads", 1), ("random_seed", 0), ("mip_max_nodes", MAX_NODES),
        ("mip_rel_gap", RELATIVE_GAP),
    ):  # fmt: skip
        solver.setOptionValue(option, value)
    solver.passModel(model)
    solver.run()
    solution = np.array(solver.getSolution().col_value)
    if solver.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        raise BitsmoeError(f"allocation: HiGHS ended with {solver.getModelStatus()} and no solution")
    bound = solver.getInfo().mip_dual_bound * scale / units
    return solution.reshape(units, choices).argmax(1), bound
