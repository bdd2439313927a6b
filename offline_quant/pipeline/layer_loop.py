"""The layer loop: hidden states pass from layer to layer, and every MoE layer is planned and quantized.

A layer is calibrated on the output of the quantized layers before it, so that it can make up for their error. A few
windows pass through the original layers too, to judge the result by.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from bitsmoe_kernels.format.schema import Layer
from offline_quant.allocation.objectives import budget_scope
from offline_quant.evaluation import sanity
from offline_quant.evaluation.forecast import Forecast, divergence, first_windows, forecast, forecast_windows
from offline_quant.pipeline.context import RunContext
from offline_quant.pipeline.model_tuning import tuned_states
from offline_quant.pipeline.moe_layer import LayerProgress, layer_bar, quantize_moe_layer
from offline_quant.pipeline.records import DividedBudget, LayerRecord, MoELayerRecord, PickedBits
from offline_quant.report.schema import LayerPicture, LayerReport
from offline_quant.runtime.progress import bar


@dataclass(frozen=True)
class FinishedLayers:
    """The results of all MoE layers, but for their tensors, in order.

    Attributes:
        schemas: by tensor prefix.
        reports: of each.
        pictures: what the report page draws, by tensor prefix.
    """

    schemas: dict[str, Layer] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    pictures: dict[str, LayerPicture] = field(default_factory=dict)


def quantize_layers(run: RunContext, budget: DividedBudget | None) -> FinishedLayers:
    """Quantize every MoE layer, and pass dense ones. Layers that an earlier run finished are read from the disk.

    Args:
        run: the run.
        budget: one for the model; None: `--bits` holds for each layer.

    Raises:
        BitsmoeError: activations or weights beyond float32, or an impossible budget.
    """
    layers = FinishedLayers()
    finished = run.workers.broadcast_from_first(run.state.finished)
    if finished == 0 and budget is None:  # dividing a budget has written them already
        run.embed()
    run.workers.barrier()
    with layer_bar(run, "Quantizing") as progress:
        for index in range(run.num_layers):
            progress.describe(f"Quantizing layer {index + 1}/{run.num_layers}")
            if index >= finished:
                _finish_layer(run, index, budget, progress)
            record = run.state.layer_record(index)
            if index == finished - 1:
                run.clock.restore(record.figures)
            if record.moe:
                prefix = run.shape.prefix(index)
                layers.schemas[prefix] = record.moe.schema
                layers.reports.append(record.moe.report)
                layers.pictures[prefix] = record.moe.picture
            progress.round_off(index + 1)
    return layers


def _finish_layer(run: RunContext, index: int, budget: DividedBudget | None, progress: LayerProgress) -> None:
    """Take hidden states through a layer, quantize its experts if it has any, and keep the result."""
    run.state.open_layer(index)
    tensors: dict[str, Tensor] = {}
    moe: MoELayerRecord | None = None
    if index in run.shape.layers:
        bits = None if budget is None else budget.bits[run.shape.prefix(index)]
        tensors, moe = quantize_moe_layer(run, index, bits, progress)
    else:
        run.calibration.propagate(index)
        run.originals.propagate(index)
        run.clock.lap("calibration")
    run.workers.barrier()  # hidden states of all processes are kept now
    if run.workers.rank == 0:
        run.state.close_layer(index, tensors, LayerRecord(run.clock.figures, moe))
    run.workers.barrier()
    run.clock.lap("write")


def expected_quality(run: RunContext, layers: FinishedLayers, picked: PickedBits | None) -> Forecast | None:
    """The forecast that bits were picked by, with what was measured; of a plan its own; else None."""
    if picked is None:
        return _forecast_plan(run, layers)
    if run.plan_only:
        return picked.forecast
    count, last = len(forecast_windows(run.judged)), run.num_layers - 1
    wanted, found = (first_windows(s, count) for s in (run.originals.read_all(last), _quantized_states(run)))
    measured = divergence(run.original, wanted, found, run.streamed)
    run.clock.lap("forecast")
    return picked.forecast.model_copy(update={"measured": measured})


def _forecast_plan(run: RunContext, layers: FinishedLayers) -> Forecast | None:
    """The quality to expect of a plan; None where nothing was only planned, or no errors are predicted."""
    planned = [report.planned_output_error for report in layers.reports]
    known = [error for error in planned if error is not None]
    if not run.plan_only or len(known) < len(planned):
        return None
    states = run.calibration.read_all(run.num_layers - 1)
    with bar("Forecasting", run.num_layers) as on_layer:
        errors = dict(zip(run.shape.layers, known, strict=True))
        found = forecast(run.streamed, run.judged, states, errors, run.config.known_bits, run.config.seed, on_layer)
    run.clock.lap("forecast")
    return found


def sanity_check(run: RunContext, layers: FinishedLayers) -> sanity.SanityVerdict | None:
    """The verdict on the quantized model, see `sanity.verdict`; None where nothing was quantized."""
    if run.plan_only:
        return None
    last = run.num_layers - 1
    original = sanity.tally(run.original, run.judged, run.originals.read_all(last))
    quantized = sanity.tally(run.streamed, run.judged, _quantized_states(run))
    natural = all(report.basis == "natural" for report in layers.reports)
    config = run.config
    shared = budget_scope(config) == "model" or len(layers.reports) == 1
    remedy = sanity.advice(shared, config.fits_layer, config.token_weights == "model", config.tunes_model, natural)
    verdict = sanity.verdict(original, quantized, remedy)
    run.clock.lap("sanity")
    return verdict


def _quantized_states(run: RunContext) -> Iterator[Tensor]:
    """Hidden states in batches that leave the quantized model's last layer, of the judged windows at least."""
    if (tuning := run.state.tuning) is not None and tuning.kept:
        return iter([tuned_states(run)])
    return run.calibration.read_all(run.num_layers - 1)
