"""One layer with routed experts: calibrate, plan, quantize. All uses of `layer/` in a run are here."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.allocation.choices import ChoiceTable
from offline_quant.calibration.moments import LayerMoments
from offline_quant.layer.cache import LayerCache
from offline_quant.layer.context import LayerContext
from offline_quant.layer.first_pass import measure_layer
from offline_quant.layer.outputs import original_output, output_error, output_of, planned_output_error, quantized_output
from offline_quant.layer.plan import LayerPlan
from offline_quant.layer.planner import pass_count, plan_layer
from offline_quant.layer.quantizer import quantize_layer
from offline_quant.layer.view import LayerView
from offline_quant.model.expert_weights import ExpertWeights
from offline_quant.pipeline.context import RunContext
from offline_quant.pipeline.hidden_states import target_output
from offline_quant.pipeline.records import MoELayerRecord
from offline_quant.report.collect import layer_picture, layer_report
from offline_quant.rounding.tuning import tune
from offline_quant.runtime.chunks import gpu_share
from offline_quant.runtime.offload import OffloadCache
from offline_quant.runtime.progress import Bar, bar

Result = TypeVar("Result")


def examine_layers(
    run: RunContext, look: Callable[[int, LayerView], Result], description: str, plans: int = 1, quantized: bool = False
) -> dict[int, Result]:
    """Look at every MoE layer on the original model's activations, before bits are decided; by layer index.

    The hidden states that leave its last layer stay on the disk, and those that enter the first one.

    Args:
        run: the run.
        look: at the layer of an index, after its first pass.
        description: of the progress.
        plans: that `look` makes of a layer.
        quantized: whether it quantizes the layer.

    Raises:
        BitsmoeError: activations or weights beyond float32, or an impossible budget.
    """
    found = {}
    run.embed()
    with layer_bar(run, description, plans, quantized) as progress:
        for index in range(run.num_layers):
            run.state.open_layer(index)
            if index in run.shape.layers:
                with _finite_or_refuse(run.shape.prefix(index)):
                    view = _measured_layer(run, index, progress)
                    # Before `look`: a layer that is quantized does not give it any more.
                    run.calibration.add_expert_output(index, original_output(view.ctx), run.windows_read_after(index))
                    found[index] = look(index, view)
                view.ctx.cache.clear()
            else:
                run.calibration.propagate(index)
            run.workers.barrier()  # nobody may drop hidden states that another process reads
            if index and run.workers.rank == 0:  # the quantized layers begin with what enters the first
                run.state.drop_hidden(index - 1)
            progress.round_off(index + 1)
    run.clock.lap("calibration")
    return found


def layer_choices(view: LayerView) -> ChoiceTable:
    """The choices of a layer for one budget over the model, without its components."""
    return _without_components(plan_layer(view, trim=False))


def try_layer(view: LayerView, spans: Sequence[range]) -> tuple[ChoiceTable, float, Tensor]:
    """Quantize a layer for trial.

    Args:
        view: the layer, not quantized.
        spans: tokens whose error is wanted.

    Returns:
        Its choices, without its components; the loss of those that were taken; the error of what its experts give for
        these tokens, float32 [n, H] on the CPU.
    """
    plan = plan_layer(view, trim=False)
    original = torch.cat(list(original_output(view.ctx, spans)))
    quantize_layer(view, plan)
    error = torch.cat(list(quantized_output(view, spans))).sub_(original).cpu()
    return _without_components(plan), plan.allocation.loss, error


def _without_components(plan: LayerPlan) -> ChoiceTable:
    return replace(plan.table, projections={})


def quantize_moe_layer(
    run: RunContext, index: int, budget: int | None, on_progress: "LayerProgress"
) -> tuple[dict[str, Tensor], MoELayerRecord]:
    """Plan and quantize a layer; its hidden states go on as the quantized experts make them.

    With `run.plan_only` nothing is quantized, and hidden states go on as in the original model.

    Args:
        run: the run.
        index: of the decoder layer.
        budget: all-in bits of the layer; None: `--bits` for each of its weights.
        on_progress: called after every chunk of every pass.

    Returns:
        Tensors by their names in the checkpoint, none with `plan_only`; and the record.

    Raises:
        BitsmoeError: activations or weights beyond float32, or an impossible budget.
    """
    prefix = run.shape.prefix(index)
    with _finite_or_refuse(prefix):
        view = _measured_layer(run, index, on_progress)
        plan = plan_layer(view, budget)
        run.clock.lap("allocation")
        run.originals.propagate(index)
        run.clock.lap("original model")
        tensors: dict[str, Tensor] = {}
        errors = error = None
        if run.plan_only:
            output = original_output(view.ctx)
        else:
            target = _target(run, index, view).to(run.streamed.device) if run.config.fits_layer else None
            # Fitting overwrites the target; tuning has the same one.
            kept = target.clone() if run.config.tune and target is not None else None
            quantized = quantize_layer(view, plan, target)
            tensors, errors = quantized.tensors, quantized.errors
            run.clock.lap("quantization")
            if kept is None:
                error, output = output_error(view), quantized_output(view)
            else:
                given = {name: tensor.to(kept.device) for name, tensor in tensors.items()}
                tensors = tune(plan.layer, run.config.block_size, given, view.ctx.moments.inputs, kept, run.config.seed)
                run.clock.lap("tuning")
                tuned = output_of(view.ctx, plan.layer, tensors)
                error, output = output_error(view, tuned), iter([tuned])
        run.calibration.add_expert_output(index, output, run.windows_read_after(index))
        view.ctx.cache.clear()
        run.clock.lap("calibration")
        counts, extreme = view.ctx.moments.counts, view.measurements.extreme_experts()
        report = layer_report(
            prefix, plan, counts, run.config, errors, error, planned_output_error(view, plan), extreme
        )
        record = MoELayerRecord(plan.layer, report, layer_picture(plan, counts))
        return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}, record


def _target(run: RunContext, index: int, view: LayerView) -> Tensor:
    """What a layer's experts should put out, float32 [T, H]."""
    factor = run.streamed.expert_factor(index)
    if factor is None:  # errors of the layers before it then stay as they are
        return torch.cat(list(original_output(view.ctx)))
    run.workers.barrier()  # original hidden states of all processes are kept now
    return target_output(run.originals, run.calibration, index, factor)


def _measured_layer(run: RunContext, index: int, on_progress: "LayerProgress") -> LayerView:
    """A layer after its first pass, calibrated on the hidden states that enter it."""
    prefix, device = run.shape.prefix(index), run.streamed.device
    inputs = run.calibration.enter_experts(index, run.workers)
    if not bool(inputs.x.isfinite().all()):
        raise BitsmoeError(
            f"{prefix}: activations on the calibration text are beyond float32; weights before them are far too "
            "large, or config.json is wrong, so look at both, or download the model again"
        )
    run.clock.lap("calibration")
    share = gpu_share(device)
    offload = OffloadCache(run.state.directory, device_bytes=share)
    shape = run.shape.of_layer(index)
    moments = LayerMoments(inputs, shape.num_experts, shape.hidden_act, run.token_weights.get(index))

    def load(chunk: range) -> ExpertWeights:
        return run.source.experts(index, chunk).to(device)

    ctx = LayerContext(
        load, moments, shape, run.config, prefix, run.workers, LayerCache(offload), run.workers.smallest(share),
        on_progress,
    )  # fmt: skip
    return LayerView(ctx, measure_layer(ctx))


@contextmanager
def _finite_or_refuse(prefix: str) -> Iterator[None]:
    """Turn a failure of linear algebra into a refusal: finite weights were too large for what is computed."""
    try:
        yield
    except torch.linalg.LinAlgError as e:
        raise BitsmoeError(
            f"{prefix}: its experts' weights are too large to be computed with in float32 ({e})"
        ) from None


class LayerProgress:
    """A bar that counts experts in every pass of a layer; a layer may need fewer passes than were planned.

    Args:
        inner: the bar.
        each: experts of a layer, times its passes.
    """

    def __init__(self, inner: Bar, each: int):
        self._inner, self._each, self._done = inner, each, 0
        self.describe = inner.describe

    def __call__(self, experts: int) -> None:
        """Advance by experts of one pass."""
        self._done += experts
        self._inner(experts)

    def round_off(self, layers: int) -> None:
        """Advance to the end of a number of layers."""
        self(layers * self._each - self._done)


@contextmanager
def layer_bar(run: RunContext, description: str, plans: int = 1, quantized: bool = True) -> Iterator[LayerProgress]:
    """A bar over all layers, of each of which some plans are made; it may be quantized."""
    each = run.shape.num_experts * pass_count(run.config, plans, quantized)
    with bar(description, run.num_layers * each) as inner:
        yield LayerProgress(inner, each)
