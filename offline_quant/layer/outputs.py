"""What a layer's experts give, before and after they are quantized."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.nn.functional import linear

from bitsmoe_kernels.format.schema import Layer, ProjectionName
from bitsmoe_kernels.reference import LayerWeights, moe_forward
from offline_quant.allocation.objectives import OBJECTIVES
from offline_quant.allocation.objectives.base import output_energy
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


def original_output(ctx: LayerContext, spans: Sequence[range] | None = None) -> Iterator[Tensor]:
    """What the experts give before they are quantized, as `routed_output`. To be read before `quantize_layer`."""
    return routed_output(
        ctx.moments,
        ctx.workers,
        ctx.local_experts,
        ctx.cache.activations.original,
        lambda e, hidden: ctx.load_balanced(range(e, e + 1)).one(0).output(hidden),
        spans,
    )


def quantized_output(view: LayerView, spans: Sequence[range] | None = None) -> Iterator[Tensor]:
    """The same after `quantize_layer`."""
    ctx = view.ctx
    return routed_output(
        ctx.moments,
        ctx.workers,
        ctx.local_experts,
        ctx.cache.activations.quantized,
        lambda e, hidden: _quantized_down(view, e, hidden),
        spans,
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


@dataclass(frozen=True)
class OutputErrors:
    """What losses of projections do to a layer's output: errors of all projections, each by itself.

    Attributes:
        energy: of a projection's output.
        unit_energy: energy at the layer's output of one unit of a projection's error.
        top_k: experts of a token.
        total: energy of the layer's output.
    """

    energy: Mapping[ProjectionName, float]
    unit_energy: Mapping[ProjectionName, float]
    top_k: int
    total: float

    def of(self, losses: Mapping[ProjectionName, float]) -> float:
        """Relative error of the layer's output for relative errors of the projections."""
        lost = 0.0
        for name, loss in losses.items():
            lost += loss * self.energy[name] * self.unit_energy[name]
        return lost * self.top_k / max(self.total, 1e-300)


def output_errors(view: LayerView, plan: LayerPlan) -> OutputErrors | None:
    """What losses under a plan's form do to the output; None where the objective predicts no errors."""
    if not OBJECTIVES[view.config.objective].predicts_errors:
        return None
    frequency = view.routing_frequency
    return OutputErrors(
        {n: output_energy(p, frequency) for n, p in plan.projections.items()},
        {n: view.unit_energy(n) for n in plan.projections},
        view.ctx.moments.top_k,
        float(view.measurements.output.double().square().sum(1).mean()),
    )


def planned_output_error(view: LayerView, plan: LayerPlan) -> float | None:
    """Relative error of the layer's output that a plan predicts; None where the objective predicts no errors."""
    errors = output_errors(view, plan)
    return None if errors is None else errors.of(plan.losses)


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
