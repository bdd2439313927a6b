"""One budget for the whole model: a program over all layers divides it among them."""

import numpy as np

from offline_quant.allocation.choices import ChoiceTable
from offline_quant.allocation.objectives import measures_layers
from offline_quant.allocation.solver import allocate
from offline_quant.layer.view import LayerView
from offline_quant.pipeline.context import RunContext
from offline_quant.pipeline.moe_layer import examine_layers, layer_choices, try_layer
from offline_quant.pipeline.records import DividedBudget
from offline_quant.pipeline.trials import Trials
from offline_quant.report.schema import ModelBudget


def share_budget(run: RunContext) -> DividedBudget:
    """Divide the budget, on the original model's activations; an earlier run's division is taken where there is one.

    Where losses of layers cannot be compared, every layer is quantized for trial, which tells what they cost.

    Raises:
        BitsmoeError: activations or weights beyond float32, or an impossible budget.
    """
    if (earlier := run.state.model_budget) is not None:
        return earlier
    sensitivity: dict[int, float] = {}
    if measures_layers(run.config):
        tables, sensitivity = _tried_layers(run)
    else:
        tables = examine_layers(run, lambda _, view: layer_choices(view), "Planning")
    budget = _divided(run, tables, sensitivity)
    if run.workers.rank == 0:
        run.state.keep_model_budget(budget)
    run.clock.lap("allocation")
    return budget


def _tried_layers(run: RunContext) -> tuple[dict[int, ChoiceTable], dict[int, float]]:
    """The choices of every layer, and what a unit of their loss costs the model, by layer index."""
    trials = Trials(run.streamed, run.windows, run.workers)

    def look(index: int, view: LayerView) -> tuple[ChoiceTable, float]:
        choices, loss, error = try_layer(view, trials.spans)
        trials.disturb(index, error)
        return choices, loss

    tried = examine_layers(run, look, "Trying", quantized=True)
    divergences = trials.divergences()
    run.clock.lap("trials")
    sensitivity = {index: divergences[index] / max(loss, 1e-300) for index, (_, loss) in tried.items()}
    return {index: choices for index, (choices, _) in tried.items()}, sensitivity


def _divided(run: RunContext, tables: dict[int, ChoiceTable], sensitivity: dict[int, float]) -> DividedBudget:
    """Solve one program over the choices of all layers."""
    shape = run.shape
    loss = np.concatenate([table.loss * sensitivity.get(index, 1.0) for index, table in tables.items()])
    cost = np.concatenate([table.cost for table in tables.values()])
    codes = int(run.config.known_bits * shape.num_weights) - sum(table.overhead for table in tables.values())
    result = run.workers.broadcast_from_first(lambda: allocate(loss, cost, codes))
    bits: dict[str, int] = {}
    start = 0
    for index, table in tables.items():
        choice = result.choice[start : start + len(table.loss)]
        bits[shape.prefix(index)] = table.overhead + int(table.cost[np.arange(len(choice)), choice].sum())
        start += len(choice)
    weights = {shape.prefix(index): shape.of_layer(index).num_weights for index in tables}
    return DividedBudget(
        bits,
        ModelBudget(
            solver_gap=result.gap,
            sensitivity={shape.prefix(index): value for index, value in sorted(sensitivity.items())},
            bits_per_weight={prefix: layer_bits / weights[prefix] for prefix, layer_bits in bits.items()},
        ),
    )
