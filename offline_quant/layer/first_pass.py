"""The first pass over a layer's experts: what an error of each weight costs at the layer's output."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.allocation.objectives import forms_of
from offline_quant.calibration.output_sample import OutputSample, SlotOutputs, sampled_output
from offline_quant.decomposition.bases import natural
from offline_quant.decomposition.forms.base import Grams, MeasuredWeights, add_grams
from offline_quant.decomposition.ranking import Components, RankedProjection, rank_components
from offline_quant.layer.context import LayerContext
from offline_quant.linalg import CholeskyFactor
from offline_quant.model.expert_weights import OneExpert

DOWN = "down"
"""Key of the moments of down without a basis, which several forms share."""
LEAST_ROOT = 1e-6
"""Least root of an output's weight, relative to the layer's mean: scales of an expert that adds next to nothing must
fit float16 too."""
EXTREME = 100.0
"""Output energy, relative to the layer's median expert, from which an expert is reported as extreme."""


@dataclass(frozen=True)
class LayerMeasurements:
    """What the first pass finds.

    Attributes:
        output_unit: mean weight of a gate or up output.
        sqrt_output_weight: float32 [E, 2 I], or [E, I] of up alone, root of the weight of every gate and up
            output relative to that mean, channels sorted.
        channel_order: int64 [E, I], the model's intermediate channel at each place, by ascending importance.
        down: the components of down without a basis, in that order.
        grams: sums by form, what shared bases are found from.
        output: float32 [n, H], the layer's output at the tokens of `calibration.output_sample`.
        down_bias: float32 [E, H], of down as files store it; None: there is none.
    """

    output_unit: float
    sqrt_output_weight: Tensor
    channel_order: Tensor
    down: RankedProjection
    grams: dict[str, Grams]
    output: Tensor
    down_bias: Tensor | None

    def extreme_experts(self) -> list[int]:
        """Experts whose mean output energy is EXTREME times the layer's median ('super experts').

        Nothing treats them specially: their weight in the program earns them more bits.
        """
        energy = self.down.components.total
        return (energy > EXTREME * energy.median()).nonzero()[:, 0].tolist()


@dataclass(frozen=True)
class _ChunkMeasurements:
    """Of some experts, on the CPU; attributes as those of `LayerMeasurements`."""

    sqrt_output_weight: Tensor
    channel_order: Tensor
    channels: Components
    ridge: Tensor
    grams: dict[str, Grams]
    output: list[SlotOutputs]
    down_bias: Tensor | None


def measure_layer(ctx: LayerContext) -> LayerMeasurements:
    """Measure all experts of a layer; their moments and activations are kept in the context's cache.

    Raises:
        BitsmoeError: what an expert computes is beyond float32.
    """
    parts: list[_ChunkMeasurements] = []
    grams: dict[str, Grams] = {form.name: {} for form in forms_of(ctx.config)}
    sample = OutputSample(ctx.moments)
    for found in ctx.each(lambda chunk: _measure_chunk(ctx, chunk)):
        for form, total in grams.items():
            add_grams(total, found.grams[form])
        sample.add(found.output)
        parts.append(replace(found, grams={}, output=[]))
    roots = torch.cat([p.sqrt_output_weight for p in parts]).to(ctx.device)
    output_unit = float(roots.square().mean())
    biases = [p.down_bias for p in parts if p.down_bias is not None]
    return LayerMeasurements(
        output_unit=output_unit,
        sqrt_output_weight=(roots / output_unit**0.5).clamp(min=LEAST_ROOT),
        channel_order=torch.cat([p.channel_order for p in parts]).to(ctx.device),
        down=RankedProjection(
            natural("down"),
            Components.concatenate([p.channels for p in parts], ctx.device),
            DOWN,
            torch.cat([p.ridge for p in parts]).to(ctx.device),
        ),
        grams={form: {name: gram.to(ctx.device) for name, gram in total.items()} for form, total in grams.items()},
        output=sample.output(),
        down_bias=torch.cat(biases).to(ctx.device) if biases else None,
    )


def _measure_chunk(ctx: LayerContext, chunk: range) -> _ChunkMeasurements:
    """Measure some experts, and sort their intermediate channels by ascending importance."""
    experts = ctx.load_balanced(chunk)
    down, intermediate_size = experts.down, experts.down.shape[2]
    matrices = experts.gate_up.shape[1] // intermediate_size
    weights, moments, outputs = experts.gate_up.new_empty(experts.gate_up.shape[:2]), [], []
    forms, frequency = forms_of(ctx.config), ctx.moments.routing_frequency[chunk.start : chunk.stop].tolist()
    grams: dict[str, Grams] = {form.name: {} for form in forms}
    for i, e in enumerate(chunk):
        one = experts.one(i)
        measured = ctx.measure_expert(e, one)
        if not measured.is_finite:
            raise BitsmoeError(_overflow(ctx, e, one))
        weights[i] = measured.output_weights
        moments.append(measured.down)
        ctx.cache.activations.put_original(e, measured.activations)
        ctx.cache.input_moments.put(e, measured.inputs)
        outputs.append(sampled_output(ctx.moments, e, measured.activations, one.output))
        expert = MeasuredWeights(one.gate_up, one.down, weights[i], frequency[i])
        for form in forms:
            add_grams(grams[form.name], form.grams(expert))
    channels, M, factor = rank_components(down.mT, torch.stack(moments), "input", feedback=ctx.config.feedback)
    keep_moments(ctx, DOWN, chunk, M, factor)
    # Sorted by now: the components of down are its channels in their new order.
    order = torch.arange(intermediate_size, device=down.device).expand_as(channels.order)
    rows = torch.cat([channels.order + i * intermediate_size for i in range(matrices)], 1)
    roots = weights.gather(1, rows).sqrt()
    return _ChunkMeasurements(
        sqrt_output_weight=roots.cpu(),
        channel_order=channels.order.cpu(),
        channels=replace(channels, order=order).cpu(),
        ridge=factor.ridge.cpu(),
        grams={form: {name: gram.cpu() for name, gram in total.items()} for form, total in grams.items()},
        output=[(slots.cpu(), y.cpu()) for slots, y in outputs],
        down_bias=None if (bias := experts.stored_bias("down", ctx.prefix, chunk)) is None else bias.float().cpu(),
    )


def keep_moments(ctx: LayerContext, key: str, chunk: range, M: Tensor | None, factor: CholeskyFactor) -> None:
    """Keep moments and their factor, rows in stored order, as far as there is room."""
    if M is not None:
        ctx.cache.moments(key).put_all(chunk, M)
    if ctx.config.feedback:
        ctx.cache.factors(key).put_all(chunk, factor.U)


def _overflow(ctx: LayerContext, expert: int, weights: OneExpert) -> str:
    """What to say of an expert whose weights are finite, but not what they compute."""
    matrices = weights.inputs | {"down": weights.down}
    sizes = ", ".join(f"{name} {float(w.abs().max()):.3g}" for name, w in matrices.items())
    return (
        f"{ctx.prefix}: what expert {expert} computes on the calibration text is beyond float32 (largest weights: "
        f"{sizes}); no model is trained to such values: mend the expert's weights, or set them to zero"
    )
