"""A measured layer as planning and quantizing see it: channels sorted, outputs weighed, moments in stored order."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from bitsmoe_kernels.format.schema import ProjectionName
from bitsmoe_kernels.models.families import MoEShape
from offline_quant.calibration.moments import MeasuredExpert
from offline_quant.config import QuantizeConfig
from offline_quant.decomposition.ranking import RankedProjection
from offline_quant.layer.context import LayerContext
from offline_quant.layer.first_pass import LayerMeasurements
from offline_quant.linalg import CholeskyFactor, factorize, on_diagonal, permute
from offline_quant.model.expert_weights import ExpertWeights
from offline_quant.rounding.error_feedback import RoundingMode, quantize
from offline_quant.rounding.grid import Quantized

Result = TypeVar("Result")


@dataclass(frozen=True)
class RoundingProblem:
    """One projection of some experts, as it is rounded. Rows are in stored order.

    Attributes:
        projection: decomposition and order of components.
        chunk: the experts.
        F: float32 [n, K, N], spectral factors of the weights, rows scaled by the root of the weight of their outputs.
        M: float32 [n, K, K], moments of what enters the contraction.
        factor: of M, where it is known.
        sqrt_output_weight: float32 [n, N], those roots; None for down, whose outputs all weigh the same.
    """

    projection: RankedProjection
    chunk: range
    F: Tensor
    M: Tensor
    factor: CholeskyFactor | None
    sqrt_output_weight: Tensor | None

    @property
    def order(self) -> Tensor:
        """Component of every row, or of every column where components are outputs, int64 [n, C]."""
        return self.projection.order(self.chunk)

    @property
    def on_input(self) -> bool:
        """Whether components are on the side of the inputs."""
        return self.projection.decomposition.component_axis == "input"

    def round(self, width: Tensor, mode: RoundingMode) -> Quantized:
        """Codes and scales.

        Args:
            width: uint8, of every component, [n, K, 1] or [n, 1, N].
            mode: how much work it takes.
        """
        return quantize(self.F, self.M, width.flatten(1), "K" if self.on_input else "N", mode, self.factor)


@dataclass(frozen=True)
class LayerView:
    """A layer after the first pass; what objectives ask of it is `allocation.objectives.base.ValuedLayer`.

    Errors of gate and up are weighed by what the layer's output feels of them: rows of their weights are scaled by the
    root of that weight before quantization, and feature scales divided by it afterwards. Intermediate channels of every
    expert are sorted by ascending importance, which costs the file nothing.

    Attributes:
        ctx: the layer.
        measurements: of the first pass.
    """

    ctx: LayerContext
    measurements: LayerMeasurements

    @property
    def config(self) -> QuantizeConfig:
        """Options."""
        return self.ctx.config

    @property
    def shape(self) -> MoEShape:
        """Sizes of the layer's experts, and their number here."""
        return replace(self.ctx.shape, num_experts=self.ctx.chunks[-1].stop)

    @property
    def routing_frequency(self) -> Tensor:
        """See `LayerMoments.routing_frequency`."""
        return self.ctx.moments.routing_frequency[: self.shape.num_experts]

    def with_bits(self, bits: float) -> "LayerView":
        """The layer with other bits per weight; what is kept between passes is shared."""
        return replace(self, ctx=replace(self.ctx, config=self.config.with_bits(bits)))

    def sample(self, experts: int) -> "LayerView":
        """The layer with its first experts only, see `LayerContext.sample`."""
        ctx, down = self.ctx.sample(experts), self.measurements.down
        own = slice(ctx.chunks[-1].stop)
        down = replace(down, components=down.components.part(own), ridge=down.ridge[own])
        return LayerView(ctx, replace(self.measurements, down=down))

    def each(self, work: Callable[[range], Result]) -> Iterator[Result]:
        """See `LayerContext.each`."""
        return self.ctx.each(work)

    def load(self, chunk: range) -> ExpertWeights:
        """Experts of a chunk, their intermediate channels sorted."""
        return self.ctx.load_balanced(chunk).permuted(self.channel_order(chunk))

    def channel_order(self, chunk: range) -> Tensor:
        """The model's intermediate channel at each place, int64 [n, I]."""
        return self.measurements.channel_order[chunk.start : chunk.stop]

    def sqrt_output_weight(self, name: ProjectionName, chunk: range) -> Tensor | None:
        """Roots of the weights of outputs [n, N]; None for down, whose outputs all weigh the same."""
        roots = self.measurements.sqrt_output_weight[chunk.start : chunk.stop]
        if name == "down":
            return None
        if name == "gate_up" or not self.shape.family.gated:
            return roots
        gate, up = roots.chunk(2, 1)
        return gate if name == "gate" else up

    def scaled_weights(self, name: ProjectionName, chunk: range, experts: ExpertWeights) -> Tensor:
        """W [n, N, K] of a projection, rows scaled by the root of the weight of their outputs."""
        W, roots = experts.projection(name), self.sqrt_output_weight(name, chunk)
        return W if roots is None else W * roots[:, :, None]

    def problem(self, projection: RankedProjection, chunk: range, experts: ExpertWeights) -> RoundingProblem:
        """One projection of some experts, to be rounded for its original inputs."""
        M = self.moments(projection, chunk)
        W = self.scaled_weights(projection.name, chunk, experts)
        return self.problem_of(projection, chunk, W, M, self.factor(projection, chunk, M))

    def problem_of(
        self, projection: RankedProjection, chunk: range, W: Tensor, M: Tensor, factor: CholeskyFactor | None = None
    ) -> RoundingProblem:
        """The same for other weights or moments.

        Args:
            projection: decomposition and order of components.
            chunk: experts.
            W: [n, N, K], rows scaled.
            M: [n, K, K], in stored order.
            factor: of M, where it is known.
        """
        order = projection.order(chunk)
        F = projection.decomposition.factors(W)
        if projection.decomposition.component_axis == "input":
            F = F.gather(1, order[:, :, None].expand_as(F))
        else:
            F = F.gather(2, order[:, None].expand_as(F))
        return RoundingProblem(projection, chunk, F, M, factor, self.sqrt_output_weight(projection.name, chunk))

    def unit_energy(self, name: ProjectionName) -> float:
        """Energy at the layer's output of one unit of a projection's error."""
        return 1.0 if name == "down" else self.measurements.output_unit

    def moments(self, projection: RankedProjection, chunk: range) -> Tensor:
        """Moments [n, K, K] of what enters the original projection's contraction, rows in stored order.

        What there was no room to keep is computed again, to the same bits.
        """
        if (kept := self.ctx.cache.moments(projection.key).stacked(chunk, self.ctx.device)) is not None:
            return kept
        decomposition = projection.decomposition
        if projection.name == "down":
            down = self._measure_again(chunk, lambda measured: measured.down)
            return permute(down, self.channel_order(chunk))
        M = decomposition.moments(self.input_moments(chunk))
        return permute(M, projection.order(chunk)) if decomposition.component_axis == "input" else M

    def factor(self, projection: RankedProjection, chunk: range, M: Tensor) -> CholeskyFactor:
        """Factor of `moments`, or independent components where errors are not handed on."""
        if not self.config.feedback:
            return on_diagonal(M)
        U = self.ctx.cache.factors(projection.key).stacked(chunk, self.ctx.device)
        return factorize(M) if U is None else CholeskyFactor(projection.ridge[chunk.start : chunk.stop], U)

    def input_moments(self, chunk: range) -> Tensor:
        """Moments [n, H, H] of what enters gate and up."""
        kept = self.ctx.cache.input_moments.stacked(chunk, self.ctx.device)
        return self._measure_again(chunk, lambda measured: measured.inputs) if kept is None else kept

    def _measure_again(self, chunk: range, picked: Callable[[MeasuredExpert], Tensor]) -> Tensor:
        """What the first pass found of some experts, stacked; channels are not sorted."""
        experts = self.ctx.load_balanced(chunk)
        return torch.stack([picked(self.ctx.measure_expert(e, experts.one(i))) for i, e in enumerate(chunk)])
