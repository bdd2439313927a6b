"""One MoE layer from weights and statistics to format tensors: decompose, allocate, quantize."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.packing import code_dtype, pack_codes
from bitsmoe_kernels.format.schema import Basis, Layer, Projection, ProjectionName, num_blocks, order_dtype
from bitsmoe_kernels.reference import LayerWeights
from offline_quant.allocation import Allocation, allocate
from offline_quant.basis import Decomposition, natural, paper, whitened
from offline_quant.config import QuantizeConfig
from offline_quant.distortion import Components, kappa, permuted, rank_components
from offline_quant.model_adapter import MoEShape
from offline_quant.quantize import quantize
from offline_quant.statistics import LayerStatistics, corrected

CHUNK_VALUES = 1 << 28
"""Float32 values of one chunk of experts in the quantizer: bounds its memory."""


@dataclass(frozen=True)
class ProjectionPlan:
    """A projection's decomposition and the importance of its components, before bits are chosen."""

    decomposition: Decomposition
    components: Components

    @property
    def name(self) -> ProjectionName:
        """Which projection."""
        return self.decomposition.name


@dataclass(frozen=True)
class LayerPlan:
    """What was decided for a layer.

    Attributes:
        layer: schema, code_rows filled in.
        projections: plans by name.
        bits: uint8 [E, B] by name.
        allocation: the solver's result; losses are shares of the projections' output energy, summed over projections.
        basis: the form chosen.
    """

    layer: Layer
    projections: dict[ProjectionName, ProjectionPlan]
    bits: dict[ProjectionName, Tensor]
    allocation: Allocation
    basis: str


def schema_of(form: str, shape: MoEShape, config: QuantizeConfig) -> Layer:
    """A layer's schema under one form, with no codes yet: natural, whitened or paper."""
    basis = Basis(rank=shape.hidden_size, bits=config.basis_bits)
    # Intermediate channels without a basis are permuted with the expert's other matrices instead, at no cost.
    natural_down = Projection(code_rows=0)
    inputs = Projection(code_rows=0, order="expert", basis=None if form == "natural" else basis)
    projections: dict[ProjectionName, Projection] = (
        {
            "gate": inputs,
            "up": inputs,
            "down": Projection(code_rows=0, order="expert", basis=basis, component_axis="output"),
        }
        if form == "paper"
        else {"gate_up": inputs, "down": natural_down}
    )
    return Layer(
        num_experts=shape.num_experts,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        projections=projections,
    )


def decompositions(
    form: str, gate_up: Tensor, down: Tensor, stats: LayerStatistics, config: QuantizeConfig
) -> dict[ProjectionName, Decomposition]:
    """The decomposition of every projection under one form: natural, whitened or paper."""
    if form == "natural":
        return {"gate_up": natural("gate_up"), "down": natural("down")}
    if form == "whitened":
        basis = whitened("gate_up", gate_up, stats.pooled, stats.share, config.basis_bits)
        return {"gate_up": basis, "down": natural("down")}
    gate, up = gate_up.chunk(2, 1)
    return {
        "gate": paper("gate", gate, "input", config.basis_bits),
        "up": paper("up", up, "input", config.basis_bits),
        "down": paper("down", down, "output", config.basis_bits),
    }


class LayerQuantizer:
    """Plans and quantizes the experts of one layer.

    Errors of gate and up are weighed by what the layer's output feels of them: rows of their weights are scaled by the
    root of that weight before quantization, and feature scales divided by it afterwards. Down is fitted to the
    activations of the quantized gate and up, and makes up for their error.

    Args:
        gate_up: float32 [E, 2 I, H].
        down: float32 [E, H, I].
        stats: the layer's calibration statistics.
        shape: sizes of the model's experts.
        config: options.
        subject: the layer's tensor prefix, for messages.
    """

    def __init__(
        self,
        gate_up: Tensor,
        down: Tensor,
        stats: LayerStatistics,
        shape: MoEShape,
        config: QuantizeConfig,
        subject: str,
    ):
        self.stats, self.shape, self.config, self.subject = stats, shape, config, subject
        self.E, self.I, self.H = shape.num_experts, shape.intermediate_size, shape.hidden_size
        self.gate_up, self.down = gate_up.clone(), down.clone()
        self.input_moments = torch.empty(self.E, self.H, self.H, device=gate_up.device)
        self.output_root = torch.empty(self.E, 2 * self.I, device=gate_up.device)
        """Root of the weight of each gate and up output, in units of the layer's mean weight."""
        self.channels = self._survey()

    def _chunks(self, size: int) -> list[range]:
        """Ranges of experts whose [size, size] matrices fit a chunk."""
        step = max(1, CHUNK_VALUES // (6 * size * size))
        return [range(i, min(i + step, self.E)) for i in range(0, self.E, step)]

    def _survey(self) -> Components:
        """Moments and output weights; sorts the intermediate channels of every expert by ascending importance.

        Sorting channels in place costs the file nothing.

        Returns:
            The channels as components of the down projection.
        """
        ranked = []
        for chunk in self._chunks(self.I):
            part = slice(chunk.start, chunk.stop)
            D = torch.empty(len(chunk), self.I, self.I, device=self.down.device)
            for i, e in enumerate(chunk):
                self.input_moments[e], self.output_root[e], D[i] = self.stats.expert_moments(
                    e, self.gate_up[e], self.down[e]
                )
            found = rank_components(self.down[part].mT, D, "input")
            rows = torch.cat([found.order, found.order + self.I], 1)
            self.gate_up[part] = self.gate_up[part].gather(1, rows[:, :, None].expand(-1, -1, self.H))
            self.output_root[part] = self.output_root[part].gather(1, rows)
            self.down[part] = self.down[part].gather(2, found.order[:, None].expand(-1, self.H, -1))
            ranked.append(found)
        self.output_root = (self.output_root / self.output_root.mean()).sqrt()
        channels = _concatenate(ranked)
        identity = torch.arange(self.I, device=self.down.device).expand_as(channels.order)
        return Components(identity, channels.energy, channels.total)

    def _roots(self, name: ProjectionName) -> Tensor | None:
        """Roots of the weights of a projection's outputs [E, N]; None for down, whose outputs all weigh the same."""
        gate, up = self.output_root.chunk(2, 1)
        return {"gate_up": self.output_root, "gate": gate, "up": up}.get(name)

    def _weights(self, name: ProjectionName) -> Tensor:
        """W [E, N, K] of a projection, rows scaled by the roots of their weights."""
        if name == "down":
            return self.down
        gate, up = self.gate_up.chunk(2, 1)
        W = {"gate_up": self.gate_up, "gate": gate, "up": up}[name]
        roots = self._roots(name)
        assert roots is not None
        return W * roots[:, :, None]

    def _rank(self, d: Decomposition) -> ProjectionPlan:
        if d.name == "down" and d.basis is None:
            return ProjectionPlan(d, self.channels)
        W = self._weights(d.name)
        parts = []
        for chunk in self._chunks(W.shape[2]):
            if d.name == "down":
                M = torch.stack([self.stats.hidden_moments(e, self.gate_up[e], self.gate_up[e])[0] for e in chunk])
            else:
                M = self.input_moments[chunk.start : chunk.stop]
            parts.append(rank_components(d.factors(W[chunk.start : chunk.stop]), d.moments(M), d.component_axis))
        return ProjectionPlan(d, _concatenate(parts))

    def plan(self) -> LayerPlan:
        """Choose a decomposition and the bits of every block.

        With `basis="auto"` every candidate gets its own allocation under the same all-in budget, and the one with the
        smallest predicted loss is taken.
        """
        forms = ("natural", "whitened") if self.config.basis == "auto" else (self.config.basis,)
        plans, refusals = [], []
        for form in forms:
            schema = schema_of(form, self.shape, self.config)
            try:
                budget = budget_bits(schema, self.config, self.subject)
            except BitsmoeError as e:
                refusals.append(e)
                continue
            decomposed = decompositions(form, self._weights("gate_up"), self.down, self.stats, self.config)
            projections = {name: self._rank(d) for name, d in decomposed.items()}
            plans.append(self._allocate(form, schema, projections, budget))
        if not plans:
            raise refusals[0]
        return min(plans, key=lambda p: p.allocation.loss)

    def _allocate(
        self, form: str, schema: Layer, projections: dict[ProjectionName, ProjectionPlan], budget: int
    ) -> LayerPlan:
        G, widths = self.config.block_size, np.array(self.config.widths)
        ratio = np.array([kappa(b) for b in widths])
        share = self.stats.share.double().cpu()
        losses, costs = [], []
        for name, plan in projections.items():
            c = plan.components
            energy = c.energy.double().cpu() * share[:, None]
            C = energy.shape[1]
            blocks = torch.zeros(self.E, num_blocks(C, G) * G, dtype=torch.float64)
            blocks[:, :C] = energy
            weight = blocks.view(self.E, -1, G).sum(-1) / (c.total.double().cpu() * share).sum().clamp(min=1e-300)
            losses.append(weight.flatten().numpy()[:, None] * ratio)
            costs.append(np.tile(widths * G * schema.features(name), (weight.numel(), 1)))
        result = allocate(np.concatenate(losses), np.concatenate(costs), budget)
        chosen = torch.from_numpy(widths[result.choice]).to(torch.uint8)
        bits, at, filled = {}, 0, {}
        for name in projections:
            B = num_blocks(schema.components(name), G)
            bits[name] = chosen[at : at + self.E * B].view(self.E, B)
            at += self.E * B
            filled[name] = schema.projections[name].model_copy(update={"code_rows": int(bits[name].sum())})
        return LayerPlan(schema.model_copy(update={"projections": filled}), projections, bits, result, form)

    def quantize(
        self, plan: LayerPlan, tick: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Codes, scales and metadata of every projection.

        Args:
            plan: what `plan` returned.
            tick: called after each expert of each projection.

        Returns:
            Tensors `{projection}_{part}` on the CPU, and the relative output error of each projection as measured on
            the calibration statistics.
        """
        tensors: dict[str, Tensor] = {}
        errors: dict[str, float] = {}
        for name, projection in plan.projections.items():
            # The down projection comes last: it is fitted to the activations of the quantized gate and up.
            quantized = self._dequantized_gate_up(plan.layer, tensors) if name == "down" else None
            parts, errors[name] = self._quantize_projection(plan, projection, quantized, tick)
            tensors |= {f"{name}_{k}": v for k, v in parts.items()}
        return tensors, errors

    def _dequantized_gate_up(self, layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
        weights = LayerWeights(
            layer, self.config.block_size, {k: v.to(self.gate_up.device) for k, v in tensors.items()}
        )
        names: list[ProjectionName] = [n for n in ("gate_up", "gate", "up") if n in layer.projections]
        out = torch.empty_like(self.gate_up)
        for e in range(self.E):
            out[e] = torch.cat([weights.projections[n].weight(e) for n in names])
        return out

    def _targets(self, name: ProjectionName, chunk: range, quantized: Tensor | None) -> tuple[Tensor, Tensor]:
        """What to quantize, W [n, N, K], and the moments [n, K, K] its error is measured with."""
        if quantized is None:
            part = slice(chunk.start, chunk.stop)
            return self._weights(name)[part], self.input_moments[part]
        W, M = [], []
        for e in chunk:
            moments, missing = self.stats.hidden_moments(e, quantized[e], self.gate_up[e])
            W.append(corrected(self.down[e], moments, missing))
            M.append(moments)
        return torch.stack(W), torch.stack(M)

    def _quantize_projection(
        self, plan: LayerPlan, projection: ProjectionPlan, quantized: Tensor | None, tick: Callable[[], None]
    ) -> tuple[dict[str, Tensor], float]:
        d, name, G = projection.decomposition, projection.name, self.config.block_size
        on_input = d.component_axis == "input"
        C, N = plan.layer.components(name), plan.layer.features(name)
        codes, scales, features = [], torch.empty(self.E, C), torch.empty(self.E, N)
        share = self.stats.share
        lost = total = 0.0
        for chunk in self._chunks(plan.layer.side(name, "input")):
            part = slice(chunk.start, chunk.stop)
            order = projection.components.order[part]
            bits = plan.bits[name][part].to(order.device)
            W, M = self._targets(name, chunk, quantized)
            F, M = d.factors(W), d.moments(M)
            width = bits.repeat_interleave(G, 1)[:, :C]
            if on_input:
                F = F.gather(1, order[:, :, None].expand_as(F))
                M = permuted(M, order)
            else:
                F = F.gather(2, order[:, None].expand_as(F))
            q = quantize(F, M, width, "K" if on_input else "N", self.config.refine)
            residual = F - q.dequantize(width[:, :, None] if on_input else width[:, None])
            for i, e in enumerate(chunk):
                matrix = q.codes[i] if on_input else q.codes[i].T
                codes.append(pack_codes(matrix.cpu(), bits[i].cpu(), G))
                lost += float(share[e] * (residual[i] * (M[i] @ residual[i])).sum())
                total += float(share[e] * (F[i] * (M[i] @ F[i])).sum())
                tick()
            scales[part], features[part] = (q.a.cpu(), q.c.cpu()) if on_input else (q.c.cpu(), q.a.cpu())
        live = plan.bits[name].repeat_interleave(G, 1)[:, :C] > 0
        if (roots := self._roots(name)) is not None:
            features /= roots.cpu()
        parts = {
            "codes": torch.cat(codes) if codes else torch.empty(0, N, dtype=code_dtype(G)),
            "bits": plan.bits[name].clone(),
            "component_scale": (scales * live).half(),
            "feature_scale": features.half(),
        }
        if plan.layer.projections[name].order == "expert":
            parts["order"] = projection.components.order.cpu().to(order_dtype(C))
        parts |= {k: v.cpu() for k, v in d.tensors.items()}
        return parts, lost / max(total, 1e-300)


def _concatenate(parts: list[Components]) -> Components:
    return Components(*(torch.cat([getattr(p, f) for p in parts]) for f in ("order", "energy", "total")))


def budget_bits(schema: Layer, config: QuantizeConfig, subject: str) -> int:
    """Bits left for codes under the all-in budget of one layer.

    Raises:
        BitsmoeError: scales, metadata and basis alone exceed it; names the smallest possible budget.
    """
    overhead = 8 * schema.nbytes(config.block_size)
    budget = int(config.bits * schema.num_weights)
    if overhead > budget:
        least = overhead / schema.num_weights
        raise BitsmoeError(
            f"--bits {config.bits}: impossible for {subject}: scales, metadata and basis alone take {least:.4f} bits "
            f"per weight; use at least --bits {np.ceil(least * 1000) / 1000:.3f}"
        )
    return budget - overhead
