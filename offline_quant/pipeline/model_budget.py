"""One budget for the whole model: a program over all layers divides it among them."""

from functools import partial

import numpy as np

from offline_quant.allocation.choices import ChoiceTable
from offline_quant.allocation.objectives import measures_layers
from offline_quant.allocation.solver import allocate
from offline_quant.calibration.sensitivity import output_gradients, windows_together
from offline_quant.layer.view import LayerView
from offline_quant.pipeline.context import RunContext
from offline_quant.pipeline.moe_layer import examine_layers, layer_choices, tried_layer
from offline_quant.pipeline.records import DividedBudget
from offline_quant.report.schema import ModelBudget
from offline_quant.runtime.progress import bar

_GRADIENT = "gradient"


def share_budget(run: RunContext) -> DividedBudget:
    """Divide the budget, on the original model's activations; an earlier run's division is taken where there is one.

    Where losses of layers cannot be compared, every layer is quantized once, and gradients tell what its error costs.

    Raises:
        BitsmoeError: activations or weights beyond float32, or an impossible budget.
    """
    if (earlier := run.state.model_budget) is not None:
        return earlier
    if measures_layers(run.config):
        run.workers.broadcast_from_first(lambda: _keep_gradients(run))
        tried = examine_layers(run, partial(_tried, run), "Trying", quantized=True)
        tables = {index: table for index, (table, _) in tried.items()}
        sensitivity = {index: value for index, (_, value) in tried.items()}
    else:
        tables, sensitivity = examine_layers(run, lambda _, view: layer_choices(view), "Planning"), {}
    budget = _divided(run, tables, sensitivity)
    if run.workers.rank == 0:
        run.state.keep_model_budget(budget)
    run.clock.lap("allocation")
    return budget


def _keep_gradients(run: RunContext) -> None:
    with bar("Measuring sensitivities", 2 * run.num_layers) as on_progress:
        windows = run.windows[: windows_together(run.windows)]
        for index, gradient in output_gradients(run.streamed, windows, run.config.seed, on_progress):
            run.state.open_layer(index)
            run.state.put_hidden(index, _GRADIENT, gradient)
    run.clock.lap("sensitivities")


def _tried(run: RunContext, index: int, view: LayerView) -> tuple[ChoiceTable, float]:
    return tried_layer(view, run.state.hidden(index, _GRADIENT, (-1, run.shape.hidden_size)))


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
