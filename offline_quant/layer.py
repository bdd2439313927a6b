"""One MoE layer from weights and statistics to format tensors: decompose, allocate, quantize."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.families import MoEShape
from bitsmoe_kernels.format.packing import code_dtype, pack_codes
from bitsmoe_kernels.format.schema import Basis, Layer, Projection, ProjectionName, order_dtype
from bitsmoe_kernels.reference import LayerWeights
from offline_quant import compensator
from offline_quant.allocation import Allocation, allocate
from offline_quant.basis import Decomposition, natural, paper, whitened
from offline_quant.config import QuantizeConfig
from offline_quant.distortion import Components, damped, permuted, rank_components
from offline_quant.objectives import OBJECTIVES, Table, table
from offline_quant.quantize import Quantized, quantize
from offline_quant.statistics import LayerStatistics, corrected

CHUNK_VALUES = 1 << 28
"""Float32 values of one chunk of experts in the quantizer: bounds its memory."""
EXTREME = 100.0
"""Output energy, relative to the layer's median expert, from which an expert is reported as extreme."""
TRIAL = -1
"""Stands for the rounds of refinement in a first pass: none, and scales by one guess."""
COMPENSATOR_ROUNDS = 2
"""How often codes and compensator are fitted to what the other leaves over."""


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
        layer: schema, code_rows and ranks filled in.
        bits: uint8 [E, B] by projection.
        ranks: compensators' ranks int32 [E]; None without compensators.
        allocation: the solver's result.
        table: the choices it was made from.
        trial: measured relative error of a first pass, summed over projections; None if there was none.
    """

    layer: Layer
    bits: dict[ProjectionName, Tensor]
    ranks: Tensor | None
    allocation: Allocation
    table: Table
    trial: float | None = None

    @property
    def basis(self) -> str:
        """The form chosen."""
        return self.table.form

    @property
    def projections(self) -> dict[ProjectionName, ProjectionPlan]:
        """Components of every projection."""
        return self.table.projections


def schema_of(form: str, shape: MoEShape, config: QuantizeConfig) -> Layer:
    """A layer's schema under one form, with no codes yet: natural, whitened, paper, or split (gate and up apart)."""
    basis = Basis(rank=shape.hidden_size, bits=config.basis_bits)
    # Intermediate channels without a basis are permuted with the expert's other matrices instead, at no cost.
    natural_down = Projection(code_rows=0)
    inputs = Projection(code_rows=0, order="expert", basis=basis)
    forms: dict[str, dict[ProjectionName, Projection]] = {
        "natural": {"gate_up": Projection(code_rows=0, order="expert"), "down": natural_down},
        "whitened": {"gate_up": inputs, "down": natural_down},
        "paper": {
            "gate": inputs,
            "up": inputs,
            "down": Projection(code_rows=0, order="expert", basis=basis, component_axis="output"),
        },
        # One width for a matrix: nothing to sort.
        "split": {"gate": Projection(code_rows=0), "up": Projection(code_rows=0), "down": natural_down},
    }
    return Layer(
        num_experts=shape.num_experts,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        projections=forms[form],
    )


def forms_of(config: QuantizeConfig) -> tuple[str, ...]:
    """The forms that may be chosen from."""
    return OBJECTIVES[config.objective].forms if config.basis == "auto" else (config.basis,)


def decompositions(
    form: str, gate_up: Tensor, down: Tensor, stats: LayerStatistics, config: QuantizeConfig
) -> dict[ProjectionName, Decomposition]:
    """The decomposition of every projection under one form, see `schema_of`."""
    if form == "natural":
        return {"gate_up": natural("gate_up"), "down": natural("down")}
    if form == "whitened":
        basis = whitened("gate_up", gate_up, stats.pooled, stats.share, config.basis_bits)
        return {"gate_up": basis, "down": natural("down")}
    if form == "split":
        return {"gate": natural("gate"), "up": natural("up"), "down": natural("down")}
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
        self.hidden_moments = torch.empty(self.E, self.I, self.I, device=gate_up.device)
        self.output_root = torch.empty(self.E, 2 * self.I, device=gate_up.device)
        """Root of the weight of each gate and up output, in units of the layer's mean weight."""
        self.channel_order = torch.empty(self.E, self.I, dtype=torch.int64, device=gate_up.device)
        """The intermediate channel of the model that stands at each place here."""
        self.channels = self._survey()

    def chunks(self, size: int) -> list[range]:
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
        for chunk in self.chunks(self.I):
            part = slice(chunk.start, chunk.stop)
            D = self.hidden_moments[part]
            for i, e in enumerate(chunk):
                self.input_moments[e], self.output_root[e], D[i] = self.stats.expert_moments(
                    e, self.gate_up[e], self.down[e]
                )
                if "output-weights" in self.config.without:
                    self.input_moments[e], self.output_root[e] = self.stats.plain_moments(e), 1.0
            found = rank_components(self.down[part].mT, D, "input")
            self.channel_order[part] = found.order
            self.hidden_moments[part] = permuted(D, found.order)
            rows = torch.cat([found.order, found.order + self.I], 1)
            self.gate_up[part] = self.gate_up[part].gather(1, rows[:, :, None].expand(-1, -1, self.H))
            self.output_root[part] = self.output_root[part].gather(1, rows)
            self.down[part] = self.down[part].gather(2, found.order[:, None].expand(-1, self.H, -1))
            ranked.append(found)
        self.output_unit = float(self.output_root.mean())
        self.output_root = (self.output_root / self.output_unit).sqrt()
        channels = _concatenate(ranked)
        return replace(channels, order=torch.arange(self.I, device=self.down.device).expand_as(channels.order))

    def extreme_experts(self) -> list[int]:
        """Experts whose mean output energy is EXTREME times the layer's median ('super experts').

        Nothing treats them specially: their weight in the program earns them more bits.
        """
        energy = self.channels.total
        return (energy > EXTREME * energy.median()).nonzero()[:, 0].tolist()

    def _roots(self, name: ProjectionName) -> Tensor | None:
        """Roots of the weights of a projection's outputs [E, N]; None for down, whose outputs all weigh the same."""
        gate, up = self.output_root.chunk(2, 1)
        return {"gate_up": self.output_root, "gate": gate, "up": up}.get(name)

    def _weights(self, name: ProjectionName) -> Tensor:
        """W [E, N, K] of a projection, rows scaled by the roots of their weights."""
        if name == "down":
            return self.down
        roots = self._roots(name)
        assert roots is not None
        return self.original(name) * roots[:, :, None]

    def original(self, name: ProjectionName) -> Tensor:
        """W [E, N, K] of a projection as the model has it, but for the order of intermediate channels."""
        gate, up = self.gate_up.chunk(2, 1)
        return {"gate_up": self.gate_up, "gate": gate, "up": up, "down": self.down}[name]

    def originals(self, name: ProjectionName, chunk: range) -> tuple[Tensor, Tensor]:
        """W [n, N, K], rows scaled by the roots of their weights, and moments [n, K, K] of its original inputs."""
        part = slice(chunk.start, chunk.stop)
        if name != "down":
            return self._weights(name)[part], self.input_moments[part]
        return self.down[part], self.hidden_moments[part]

    def unit_energy(self, name: ProjectionName) -> float:
        """Energy at the layer's output of one unit of a projection's error."""
        return 1.0 if name == "down" else self.output_unit

    def _rank(self, d: Decomposition, sort: bool) -> ProjectionPlan:
        if d.name == "down" and d.basis is None:
            return ProjectionPlan(d, self.channels)
        parts = []
        for chunk in self.chunks(self.I if d.name == "down" else self.H):
            W, M = self.originals(d.name, chunk)
            parts.append(rank_components(d.factors(W), d.moments(M), d.component_axis, sort))
        return ProjectionPlan(d, _concatenate(parts))

    def tables(self) -> list[Table]:
        """The choices under every form the budget allows.

        Raises:
            BitsmoeError: it allows none; names the smallest possible one.
        """
        found, refusals = [], []
        for form in forms_of(self.config):
            schema = schema_of(form, self.shape, self.config)
            overhead = 8 * schema.nbytes(self.config.block_size)
            try:
                budget_bits(schema, self.config, self.subject)
            except BitsmoeError as e:
                refusals.append(e)
                continue
            decomposed = decompositions(form, self._weights("gate_up"), self.down, self.stats, self.config)
            plans = {
                name: self._rank(d, name == "down" or schema.projections[name].order != "none")
                for name, d in decomposed.items()
            }
            found.append(table(OBJECTIVES[self.config.objective], self, form, schema, plans, overhead))
        if not found:
            raise refusals[0]
        return found

    def plan(self, budget: int | None = None) -> LayerPlan:
        """Choose a decomposition, and bits and ranks of every unit.

        Every form gets its own allocation under the same all-in budget, then a first quantization, which measures what
        rows hand to one another; with those row norms it is allocated again. The form that lost least is taken.

        Args:
            budget: all-in bits of the layer; None: `--bits` for each of its weights.
        """
        plans = []
        for choices in self.tables():
            left = (int(self.config.bits * choices.schema.num_weights) if budget is None else budget) - choices.overhead
            if left < choices.cost.min(1).sum():
                continue
            plan = self._decide(choices, left)
            trial = self.config.objective == "bitsmoe" and "trial" not in self.config.without
            plans.append(self._retry(plan, left) if trial else plan)
        if not plans:
            tables = self.tables()
            least = min((t.overhead + int(t.cost.min(1).sum())) / t.schema.num_weights for t in tables)
            raise BitsmoeError(
                f"--bits {self.config.bits}: impossible for {self.subject} with the bit-widths {self.config.widths}; "
                f"use at least --bits {np.ceil(least * 1000) / 1000:.3f}"
            )
        return min(plans, key=lambda p: p.allocation.loss if p.trial is None else p.trial)

    def _decide(self, choices: Table, budget: int) -> LayerPlan:
        result = allocate(choices.loss, choices.cost, budget)
        width, rank = choices.width[result.choice], choices.rank[result.choice]
        bits: dict[ProjectionName, Tensor] = {}
        filled = {}
        ranks = None
        for name, unit in choices.unit_of.items():
            bits[name] = torch.from_numpy(width[unit]).to(torch.uint8)
            update: dict[str, int] = {"code_rows": int(bits[name].sum())}
            if choices.rank.any():
                ranks = torch.from_numpy(rank[unit[:, 0]]).to(torch.int32)
                update["lowrank_total"] = int(ranks.sum())
            filled[name] = choices.schema.projections[name].model_copy(update=update)
        schema = choices.schema.model_copy(update={"projections": filled})
        return LayerPlan(schema, bits, ranks, result, choices)

    def _retry(self, plan: LayerPlan, budget: int) -> LayerPlan:
        """The same with row norms as a first pass measured them, and its error."""
        projections, error = {}, 0.0
        for name, projection in plan.projections.items():
            norms, lost, total = [], 0.0, 0.0
            on_input = projection.decomposition.component_axis == "input"
            for chunk in self.chunks(plan.layer.side(name, "input")):
                q, F, M = self._round(plan, projection, chunk, *self.originals(name, chunk), TRIAL)
                d = F - q.dequantize(self._width(plan, name, chunk))
                share = self.stats.share[chunk.start : chunk.stop]
                lost += float((share * (d * (M @ d)).sum((1, 2))).sum())
                total += float((share * (F * (M @ F)).sum((1, 2))).sum())
                norms.append(q.norms)
            error += lost / max(total, 1e-300)
            if on_input:
                components = replace(projection.components, norms=torch.cat(norms))
                projection = ProjectionPlan(projection.decomposition, components)
            projections[name] = projection
        objective = OBJECTIVES[self.config.objective]
        choices = table(objective, self, plan.basis, plan.table.schema, projections, plan.table.overhead)
        return replace(self._decide(choices, budget), trial=error)

    def _width(self, plan: LayerPlan, name: ProjectionName, chunk: range) -> Tensor:
        """Widths of every component, [n, C, 1] where components are inputs, [n, 1, C] where they are outputs."""
        bits = plan.bits[name][chunk.start : chunk.stop].to(self.down.device)
        width = bits.repeat_interleave(self.config.block_size, 1)[:, : plan.layer.components(name)]
        return width[:, :, None] if plan.layer.projections[name].component_axis == "input" else width[:, None]

    def _round(
        self, plan: LayerPlan, projection: ProjectionPlan, chunk: range, W: Tensor, M: Tensor, refine: int
    ) -> tuple[Quantized, Tensor, Tensor]:
        """Codes of W [n, N, K] under the plan, with the factor [n, K', N'] and moments, rows in stored order."""
        d = projection.decomposition
        order = projection.components.order[chunk.start : chunk.stop]
        F, M = d.factors(W), d.moments(M)
        on_input = d.component_axis == "input"
        if on_input:
            F, M = F.gather(1, order[:, :, None].expand_as(F)), permuted(M, order)
        else:
            F = F.gather(2, order[:, None].expand_as(F))
        width = self._width(plan, projection.name, chunk).flatten(1)
        along = "K" if on_input else "N"
        return quantize(F, M, width, along, max(refine, 0), self.config.feedback, refine == TRIAL), F, M

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

    def original_output(self) -> Tensor:
        """What the layer's experts give before they are quantized, [T, H]; to be called before `quantize`."""
        order = self.channel_order[:, None].expand_as(self.down)
        return self.stats.routed_output(torch.empty_like(self.down).scatter_(2, order, self.down))

    def quantized_output(self, layer: Layer, tensors: dict[str, Tensor]) -> tuple[Tensor, float]:
        """What the layer's experts give after `quantize`, [T, H], and its relative error on a sample of the tokens.

        Args:
            layer: schema.
            tensors: what `quantize` returned.
        """
        weights = self._on_device(layer, tensors).projections["down"]
        output = self.stats.routed_output(torch.stack([weights.weight(e) for e in range(self.E)]))
        lost, total = self.stats.output_errors(self.gate_up, self.down, output)
        return output, lost / max(total, 1e-300)

    def _on_device(self, layer: Layer, tensors: dict[str, Tensor]) -> LayerWeights:
        return LayerWeights(layer, self.config.block_size, {k: v.to(self.down.device) for k, v in tensors.items()})

    def _dequantized_gate_up(self, layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
        weights = self._on_device(layer, tensors)
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
            moments, missing = self.stats.hidden_moments(e, quantized[e], self.channel_order[e])
            W.append(self.down[e] if "correction" in self.config.without else corrected(self.down[e], moments, missing))
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
        lowrank = _LowRank(plan.ranks)
        for chunk in self.chunks(plan.layer.side(name, "input")):
            part = slice(chunk.start, chunk.stop)
            bits, width = plan.bits[name][part], self._width(plan, name, chunk)
            W, M = self._targets(name, chunk, quantized)
            q, F, M = self._round(plan, projection, chunk, W, M, self.config.refine)
            residual = F - q.dequantize(width)
            if plan.ranks is not None:
                q, residual = lowrank.fit(q, F, M, width, chunk, self.config)
            for i, e in enumerate(chunk):
                matrix = q.codes[i] if on_input else q.codes[i].T
                codes.append(pack_codes(matrix.cpu(), bits[i], G))
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
        if plan.layer.projections[name].lowrank_total:
            parts |= lowrank.parts(projection.components.order, roots)
        return parts, lost / max(total, 1e-300)


class _LowRank:
    """Compensators of one projection, expert by expert."""

    def __init__(self, ranks: Tensor | None):
        self.ranks = ranks
        self.V: list[Tensor] = []
        self.U: list[Tensor] = []

    def fit(
        self, q: Quantized, F: Tensor, M: Tensor, width: Tensor, chunk: range, config: QuantizeConfig
    ) -> tuple[Quantized, Tensor]:
        """Codes and compensators in turn; returns the last codes and what is left of F [n, K, N]."""
        assert self.ranks is not None
        ranks = self.ranks[chunk.start : chunk.stop]
        most, M = int(ranks.max()), damped(M)
        live = (torch.arange(most)[None] < ranks[:, None]).to(F.device)[:, :, None]
        for turn in range(COMPENSATOR_ROUNDS):
            V, U = compensator.fit(F - q.dequantize(width), M, most)
            V, U = (V * live).half().float(), (U * live).half().float()
            made_up = V.mT @ U
            if turn < COMPENSATOR_ROUNDS - 1:
                q = quantize(F - made_up, M, width.flatten(1), "K", config.refine, config.feedback)
        for i, rank in enumerate(ranks.tolist()):
            self.V.append(V[i, :rank])
            self.U.append(U[i, :rank])
        return q, F - q.dequantize(width) - made_up

    def parts(self, order: Tensor, roots: Tensor | None) -> dict[str, Tensor]:
        """Tensors as the file stores them: components and features of the weight itself."""
        V, U = [], []
        for e, (v, u) in enumerate(zip(self.V, self.U, strict=True)):
            V.append(torch.empty_like(v).index_copy_(1, order[e], v))
            U.append(u if roots is None else u / roots[e])
        assert self.ranks is not None
        return {
            "lowrank_rank": self.ranks.clone(),
            "lowrank_in": torch.cat(V).half().cpu(),
            "lowrank_out": torch.cat(U).half().cpu(),
        }


def _concatenate(parts: list[Components]) -> Components:
    return Components(*(torch.cat([getattr(p, f) for p in parts]) for f in ("order", "norms", "variance", "total")))


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
