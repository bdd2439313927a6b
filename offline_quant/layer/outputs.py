"""What a layer's experts give, before and after they are quantized."""

from collections.abc import Iterator
from functools import partial

from torch import Tensor
from torch.nn.functional import linear

from bitsmoe_kernels.format.schema import Layer
from bitsmoe_kernels.reference import LayerWeights, moe_forward
from offline_quant.allocation.objectives import OBJECTIVES
from offline_quant.calibration.output_sample import (
    OutputSample,
    SlotOutputs,
    routed_output,
    sample_step,
    sampled_output,
)
from offline_quant.layer.context import LayerContext
from offline_quant.layer.plan import LayerPlan
from offline_quant.layer.view import LayerView


def original_output(ctx: LayerContext) -> Iterator[Tensor]:
    """What the experts give before they are quantized, as `routed_output`. To be read before `quantize_layer`."""
    return routed_output(
        ctx.moments,
        ctx.workers,
        ctx.local_experts,
        ctx.cache.activations.original,
        lambda e, hidden: ctx.load_balanced(range(e, e + 1)).one(0).output(hidden),
    )


def quantized_output(view: LayerView) -> Iterator[Tensor]:
    """The same after `quantize_layer`."""
    ctx = view.ctx
    return routed_output(
        ctx.moments,
        ctx.workers,
        ctx.local_experts,
        ctx.cache.activations.quantized,
        lambda e, hidden: _quantized_down(view, e, hidden),
    )


def _quantized_down(view: LayerView, expert: int, hidden: Tensor) -> Tensor:
    """Output [n, H] of a quantized down matrix."""
    bias = view.measurements.down_bias
    down = view.ctx.cache.quantized_down.get(expert).to(view.ctx.device)
    return linear(hidden, down, None if bias is None else bias[expert])


def output_of(ctx: LayerContext, layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
    """What the experts give with other tensors than `quantize_layer` made, float32 [T, H]."""
    inputs = ctx.moments.inputs
    weights = LayerWeights(layer, ctx.config.block_size, {k: v.to(ctx.device) for k, v in tensors.items()})
    return moe_forward(weights, inputs.x, inputs.topk_weights, inputs.topk_ids)


def planned_output_error(view: LayerView, plan: LayerPlan) -> float | None:
    """Relative error of the layer's output that a plan predicts: errors of all projections, each by itself.

    None where the objective predicts no errors.
    """
    if not OBJECTIVES[view.config.objective].predicts_errors:
        return None
    frequency, lost = view.routing_frequency.double(), 0.0
    for name, loss in plan.losses.items():
        energy = float((frequency * plan.projections[name].components.total.double()).sum())
        lost += loss * energy * view.unit_energy(name)
    total = float(view.measurements.output.double().square().sum(1).mean())
    return lost * view.ctx.moments.top_k / max(total, 1e-300)


def output_error(view: LayerView, output: Tensor | None = None) -> float:
    """Relative error of the layer's output, on a sample of the tokens.

    Args:
        view: the layer, quantized.
        output: float32 [T, H]; None: what the experts give after `quantize_layer`.
    """
    ctx, original = view.ctx, view.measurements.output

    def sampled(chunk: range) -> list[SlotOutputs]:
        outputs = (
            sampled_output(ctx.moments, e, ctx.cache.activations.quantized(e), partial(_quantized_down, view, e))
            for e in chunk
        )
        return [(slots.cpu(), y.cpu()) for slots, y in outputs]

    if output is None:
        sample = OutputSample(ctx.moments)
        for outputs in ctx.each(sampled, counted=False):
            sample.add(outputs)
        quantized = sample.output()
    else:
        quantized = output[:: sample_step(ctx.moments)]
    lost, total = (y.double().square().sum() for y in (quantized - original, original))
    return float(lost) / max(float(total), 1e-300)
