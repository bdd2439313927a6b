"""One MoE layer from weights and statistics to format tensors: decompose, allocate, quantize.

Experts pass in chunks, several times; memory holds one chunk, and what must be kept between passes goes to a spool.
Chunks are the unit that several processes share; their bounds depend on sizes alone, so any number of processes gives
the same bytes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.families import MoEShape
from bitsmoe_kernels.format.packing import code_dtype, pack_codes
from bitsmoe_kernels.format.schema import Basis, Layer, Projection, ProjectionName, order_dtype
from bitsmoe_kernels.reference import LayerWeights, moe_forward
from offline_quant import compensator
from offline_quant.allocation import Allocation, allocate
from offline_quant.basis import Decomposition, natural, paper, whitened
from offline_quant.chunks import chunks_of, matrix_bytes
from offline_quant.config import QuantizeConfig
from offline_quant.distortion import (
    Components,
    Factor,
    factorize,
    on_diagonal,
    permuted,
    rank_components,
)
from offline_quant.joint import fit_jointly
from offline_quant.objectives import OBJECTIVES, Table, part, table
from offline_quant.quantize import Quantized, quantize
from offline_quant.resident import give_back
from offline_quant.statistics import LayerStatistics, corrected
from offline_quant.symmetric import output_energy
from offline_quant.team import Team

EXTREME = 100.0
"""Output energy, relative to the layer's median expert, from which an expert is reported as extreme."""
TRIAL = -1
"""Stands for the rounds of refinement in a first pass: none, and scales by one guess."""
SHARED_BASIS_HANDICAP = 1.09
"""A form with shared bases is taken if a first pass finds its error smaller by this factor: among equals natural
channels end better (docs/log/2026-11-25.md). Tuning evens that out."""
SHARED_BASIS_GAIN = 0.0012
"""And if that spares this much of the relative error, for every token served pays for the projection."""
LEAST_ROOT = 1e-6
"""Least root of an output's weight, relative to the layer's mean: scales of an expert that adds next to nothing must
fit float16 too."""
UNEVEN = 2.0**8
"""Ratio of an expert's up to its down matrix from which the two are brought together, see `evened`."""
SCALE_RANGE = 2.0**-10, 2.0**14
"""Where the largest scales of an expert lie as a rule. Beyond it they are shared out anew between its two sides."""
COMPENSATOR_ROUNDS = 2
"""How often codes and compensator are fitted to what the other leaves over."""

Result = TypeVar("Result")
Part = tuple[dict[str, Tensor], dict[ProjectionName, tuple[float, float]]]
"""Tensors `{projection}_{part}` of some experts, and the error and energy of their projections."""
Experts = Callable[[range], tuple[Tensor, Tensor]]
"""Loads experts of a layer, float32: gate and up [n, 2 I, H], down [n, H, I]."""


@dataclass(frozen=True)
class ProjectionPlan:
    """A projection's decomposition and the importance of its components, before bits are chosen."""

    decomposition: Decomposition
    components: Components
    key: str
    """Under which its moments are kept."""

    @property
    def name(self) -> ProjectionName:
        """Which projection."""
        return self.decomposition.name


@dataclass(frozen=True)
class LayerPlan:
    """What was decided for a layer.

    Attributes:
        layer: schema as stored, code_rows and ranks filled in, without unused components.
        bits: uint8 [E, B] by projection, of all components.
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

    def basis_tensors(self, name: ProjectionName) -> dict[str, Tensor]:
        """A projection's basis as stored, `{projection}_{part}`; empty without one."""
        tensors = self.projections[name].decomposition.tensors
        if (unused := self.table.unused.get(name)) is not None:
            used = torch.ones(self.table.schema.components(name), dtype=torch.bool, device=unused.device)
            used[unused] = False
            tensors = {part: tensor[used] for part, tensor in tensors.items()}
        return {f"{name}_{part}": tensor for part, tensor in tensors.items()}

    def stored_rows(self, name: ProjectionName, width: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows of some experts' factors the file has, in its order, and the component each stands for there.

        Rows of 0 bits come first, so that those that are left of them still make whole blocks.

        Args:
            name: the projection.
            width: [n, C], of the factors' rows.
            order: int64 [n, C], component of every row.

        Returns:
            int64 [n, R] both.
        """
        if (unused := self.table.unused.get(name)) is None:
            return torch.arange(order.shape[1], device=order.device).expand_as(order), order
        gone = torch.isin(order, unused)
        rows = torch.where(gone, 0, 1 + (width > 0)).argsort(dim=1, stable=True)[:, len(unused) :]
        component = order.gather(1, rows)
        return rows, component - torch.searchsorted(unused, component)


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


def may_share_bases(shape: MoEShape, config: QuantizeConfig) -> bool:
    """Whether a form with shared bases may be chosen."""
    return any(_shares_bases(schema_of(form, shape, config)) for form in forms_of(config))


def _shares_bases(layer: Layer) -> bool:
    return any(p.basis is not None for p in layer.projections.values())


def passes(config: QuantizeConfig) -> int:
    """How often every expert comes by, at most."""
    each_form = 2 if config.objective == "bitsmoe" and "trial" not in config.without else 1
    return 2 + each_form * len(forms_of(config))


@dataclass(frozen=True)
class Survey:
    """What one pass over some experts finds; of all experts once concatenated.

    Attributes:
        roots: [n, 2 I], roots of the weights of gate and up outputs, channels sorted.
        order: int64 [n, I], the intermediate channel of the model that stands at each place here.
        channels: components of down.
        ridge: [n], of the moments of down's inputs.
        grams: float64 [side, side] by projection, what shared bases are found from.
        sampled: slots and outputs of `LayerStatistics.sampled_outputs`, expert by expert.
    """

    roots: Tensor
    order: Tensor
    channels: Components
    ridge: Tensor
    grams: dict[ProjectionName, Tensor]
    sampled: list[tuple[Tensor, Tensor]]


class LayerQuantizer:
    """Plans and quantizes the experts of one layer.

    Errors of gate and up are weighed by what the layer's output feels of them: rows of their weights are scaled by the
    root of that weight before quantization, and feature scales divided by it afterwards. Down is fitted to the
    activations of the quantized gate and up, and makes up for their error. Intermediate channels of every expert are
    sorted by ascending importance, which costs the file nothing.

    Args:
        experts: loads the layer's weights.
        stats: the layer's calibration statistics.
        shape: sizes of the model's experts.
        config: options.
        subject: the layer's tensor prefix, for messages.
        team: processes that share the work.
        tick: called after every chunk of every pass with its number of experts; see `passes`.
    """

    def __init__(
        self,
        experts: Experts,
        stats: LayerStatistics,
        shape: MoEShape,
        config: QuantizeConfig,
        subject: str,
        team: Team | None = None,
        tick: Callable[[int], None] = lambda experts: None,
    ):
        self.stats, self.shape, self.config, self.subject = stats, shape, config, subject
        self.experts: Experts = lambda chunk: evened(*experts(chunk))
        self.team, self.spool, self._tick = team or Team(), stats.spool, tick
        self.E, self.I, self.H = shape.num_experts, shape.intermediate_size, shape.hidden_size
        self.chunks = chunks_of(self.E, self.H, self.I, stats.inputs.x.device)
        self._ridge: dict[str, Tensor] = {}
        self._survey_all()

    def _mine(self) -> list[int]:
        """Experts of this process."""
        return [e for i, chunk in enumerate(self.chunks) if self.team.owns(i) for e in chunk]

    def each(self, work: Callable[[range], Result]) -> Iterator[Result]:
        """`work` of every chunk, shared by the team; results in their order."""

        def worked(chunk: range) -> Result:
            found = work(chunk)
            give_back(matrix_bytes(self.H, self.I))
            return found

        for chunk, found in zip(self.chunks, self.team.map(self.chunks, worked), strict=True):
            yield found
            self._tick(len(chunk))

    def _survey_all(self) -> None:
        parts: list[Survey] = []
        self.grams: dict[ProjectionName, Tensor] = {}
        sample = _Sample(self.stats)
        for found in self.each(self._survey):
            for name, gram in found.grams.items():
                _add_gram(self.grams, name, gram)
            sample.add(found.sampled)
            parts.append(replace(found, grams={}, sampled=[]))
        device = self.stats.inputs.x.device
        roots = torch.cat([p.roots for p in parts]).to(device)
        self.output_unit = float(roots.square().mean())
        """Mean weight of a gate or up output."""
        self.roots = (roots / self.output_unit**0.5).clamp(min=LEAST_ROOT)
        self.channel_order = torch.cat([p.order for p in parts]).to(device)
        self.channels = _concatenate([p.channels for p in parts], device)
        self.grams = {
            name: gram.to(device) / (self.output_unit if name == "gate_up" else 1) for name, gram in self.grams.items()
        }
        self._ridge["down"] = torch.cat([p.ridge for p in parts]).to(device)
        self._sampled = sample.output()

    def _survey(self, chunk: range) -> Survey:
        """Moments and output weights of a chunk; sorts its intermediate channels by ascending importance."""
        stats, config = self.stats, self.config
        gate_up, down = self.experts(chunk)
        outputs, D, sampled = gate_up.new_empty(len(chunk), 2 * self.I), [], []
        grams: dict[ProjectionName, Tensor] = {}
        forms = forms_of(config)
        for i, e in enumerate(chunk):
            M, outputs[i], moments = self._expert_moments(e, gate_up[i], down[i])
            if not all(bool(t.isfinite().all()) for t in (M, outputs[i], moments)):
                raise BitsmoeError(self._overflow(e, gate_up[i], down[i]))
            self.spool.put(f"inputs-{e}", M, if_room=True)
            D.append(moments)
            sampled.append(stats.sampled_outputs(e, down[i]))
            if "whitened" in forms:
                weighed = gate_up[i] * outputs[i, :, None]
                _add_gram(grams, "gate_up", (weighed.T @ gate_up[i]).double() * float(stats.share[e]))
            if "paper" in forms:
                gate, up = gate_up[i].chunk(2)
                _add_gram(grams, "gate", ((gate * outputs[i, : self.I, None]).T @ gate).double())
                _add_gram(grams, "up", ((up * outputs[i, self.I :, None]).T @ up).double())
                _add_gram(grams, "down", (down[i] @ down[i].T).double())
        found, moments, factor = rank_components(down.mT, torch.stack(D), "input", feedback=config.feedback)
        self._keep("down", chunk, moments, factor)
        order = torch.arange(self.I, device=down.device).expand_as(found.order)
        roots = outputs.gather(1, torch.cat([found.order, found.order + self.I], 1)).sqrt()
        return Survey(
            roots.cpu(), found.order.cpu(), replace(found, order=order).cpu(), factor.ridge.cpu(),
            {n: g.cpu() for n, g in grams.items()}, [(place.cpu(), y.cpu()) for place, y in sampled],
        )  # fmt: skip

    def _overflow(self, e: int, gate_up: Tensor, down: Tensor) -> str:
        """What to say of an expert whose weights are finite, but not what they compute."""
        gate, up = gate_up.chunk(2)
        matrices = {"gate": gate, "up": up, "down": down}
        sizes = ", ".join(f"{name} {float(w.abs().max()):.3g}" for name, w in matrices.items())
        return (
            f"{self.subject}: what expert {e} computes on the calibration text is beyond float32 (largest weights: "
            f"{sizes}); no model is trained to such values: mend the expert's weights, or set them to zero"
        )

    def _expert_moments(self, e: int, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `LayerStatistics.expert_moments`."""
        M, outputs, D = self.stats.expert_moments(e, gate_up, down)
        if "output-weights" in self.config.without:
            return self.stats.plain_moments(e), torch.ones_like(outputs), D
        return M, outputs, D

    def load(self, chunk: range) -> tuple[Tensor, Tensor]:
        """Gate and up [n, 2 I, H] and down [n, H, I] of experts as the model has them, channels sorted."""
        gate_up, down = self.experts(chunk)
        order = self.channel_order[chunk.start : chunk.stop]
        rows = torch.cat([order, order + self.I], 1)
        gate_up = gate_up.gather(1, rows[:, :, None].expand_as(gate_up))
        return gate_up, down.gather(2, order[:, None].expand_as(down))

    def extreme_experts(self) -> list[int]:
        """Experts whose mean output energy is EXTREME times the layer's median ('super experts').

        Nothing treats them specially: their weight in the program earns them more bits.
        """
        energy = self.channels.total
        return (energy > EXTREME * energy.median()).nonzero()[:, 0].tolist()

    def _roots(self, name: ProjectionName, chunk: range) -> Tensor | None:
        """Roots of the weights of outputs [n, N]; None for down, whose outputs all weigh the same."""
        roots = self.roots[chunk.start : chunk.stop]
        gate, up = roots.chunk(2, 1)
        return {"gate_up": roots, "gate": gate, "up": up}.get(name)

    def weights(self, name: ProjectionName, chunk: range, loaded: tuple[Tensor, Tensor]) -> Tensor:
        """W [n, N, K] of a projection from what `load` returned, rows scaled by the roots of their weights."""
        W = part(name, loaded)
        roots = self._roots(name, chunk)
        return W if roots is None else W * roots[:, :, None]

    def unit_energy(self, name: ProjectionName) -> float:
        """Energy at the layer's output of one unit of a projection's error."""
        return 1.0 if name == "down" else self.output_unit

    def _keep(self, key: str, chunk: range, M: Tensor | None, factor: Factor) -> None:
        """Put moments and their factor aside, rows in stored order, as far as there is room."""
        for i, e in enumerate(chunk):
            if M is not None:
                self.spool.put(f"{key}-moments-{e}", M[i], if_room=True)
            if self.config.feedback:
                self.spool.put(f"{key}-factor-{e}", factor.U[i], if_room=True)

    def moments(self, projection: ProjectionPlan, chunk: range) -> Tensor:
        """Moments [n, K, K] of what enters the original projection's contraction, rows in stored order.

        What there was no room to keep is computed again, to the same bits.
        """
        if (M := self._fetch(f"{projection.key}-moments", chunk)) is not None:
            return M
        d, own = projection.decomposition, slice(chunk.start, chunk.stop)
        if projection.name == "down":
            return permuted(self._survey_again(chunk, 2), self.channel_order[own])
        M = d.moments(self._input_moments(chunk))
        return permuted(M, projection.components.order[own]) if d.component_axis == "input" else M

    def _factor(self, projection: ProjectionPlan, chunk: range, M: Tensor) -> Factor:
        """Of `moments`."""
        if not self.config.feedback:
            return on_diagonal(M)
        U = self._fetch(f"{projection.key}-factor", chunk)
        return factorize(M) if U is None else Factor(self._ridge[projection.key][chunk.start : chunk.stop], U)

    def _input_moments(self, chunk: range) -> Tensor:
        """Moments [n, H, H] of what enters gate and up."""
        M = self._fetch("inputs", chunk)
        return self._survey_again(chunk, 0) if M is None else M

    def _survey_again(self, chunk: range, which: int) -> Tensor:
        """One of the moments `_expert_moments` gives."""
        gate_up, down = self.experts(chunk)
        return torch.stack([self._expert_moments(e, gate_up[i], down[i])[which] for i, e in enumerate(chunk)])

    def _fetch(self, key: str, chunk: range) -> Tensor | None:
        names = [f"{key}-{e}" for e in chunk]
        if not all(name in self.spool for name in names):
            return None
        device = self.stats.inputs.x.device
        return torch.stack([self.spool.get(name).to(device) for name in names])

    def _forget(self, plan: LayerPlan) -> None:
        """Drop what was kept for a form that is not taken."""
        for key in {p.key for p in plan.projections.values()} - {"down"}:
            for e in self._mine():
                self.spool.drop(f"{key}-moments-{e}", f"{key}-factor-{e}")

    def _decompositions(self, form: str) -> dict[ProjectionName, Decomposition]:
        """The decomposition of every projection under one form, see `schema_of`."""
        bits = self.config.basis_bits
        if form == "whitened":
            return {
                "gate_up": whitened("gate_up", self.grams["gate_up"], self.stats.pooled, bits), "down": natural("down")
            }  # fmt: skip
        if form == "paper":
            names: tuple[ProjectionName, ...] = ("gate", "up", "down")
            return {n: paper(n, self.grams[n], "output" if n == "down" else "input", bits) for n in names}
        names = ("gate", "up", "down") if form == "split" else ("gate_up", "down")
        return {name: natural(name) for name in names}

    def _rank(self, form: str, schema: Layer) -> dict[ProjectionName, ProjectionPlan]:
        """Components of every projection under one form, with its moments and their factors put aside."""
        decomposed = self._decompositions(form)
        open_ = {n: d for n, d in decomposed.items() if n != "down" or d.basis is not None}
        down = ProjectionPlan(natural("down"), self.channels, "down")

        def rank(chunk: range) -> dict[ProjectionName, tuple[Components, Tensor]]:
            loaded, found = self.load(chunk), {}
            inputs = self._input_moments(chunk)
            for name, d in open_.items():
                M = self.moments(down, chunk) if name == "down" else inputs
                sort = name == "down" or schema.projections[name].order != "none"
                components, M, factor = rank_components(
                    d.factors(self.weights(name, chunk, loaded)), d.moments(M), d.component_axis, sort,
                    self.config.feedback,
                )  # fmt: skip
                # Without a basis they are the inputs' moments in another order.
                self._keep(f"{form}-{name}", chunk, None if d.basis is None else M, factor)
                found[name] = components.cpu(), factor.ridge.cpu()
            return found

        parts = list(self.each(rank))
        device = self.stats.inputs.x.device
        plans = {}
        for name, d in decomposed.items():
            if name not in open_:
                plans[name] = down
                continue
            key = f"{form}-{name}"
            plans[name] = ProjectionPlan(d, _concatenate([p[name][0] for p in parts], device), key)
            self._ridge[key] = torch.cat([p[name][1] for p in parts]).to(device)
        return plans

    def tables(self) -> Iterator[Table]:
        """The choices under every form the budget allows.

        Raises:
            BitsmoeError: it allows none; names the smallest possible one.
        """
        refusals, found = [], False
        for form in forms_of(self.config):
            schema = schema_of(form, self.shape, self.config)
            overhead = 8 * schema.nbytes(self.config.block_size)
            try:
                budget_bits(schema, self.config, self.subject)
            except BitsmoeError as e:
                refusals.append(e)
                continue
            found = True
            plans = self._rank(form, schema)
            yield table(OBJECTIVES[self.config.objective], self, form, schema, plans, overhead)
        if not found:
            raise refusals[0]

    def plan(self, budget: int | None = None, trim: bool = True) -> LayerPlan:
        """Choose a decomposition, and bits and ranks of every unit.

        Every form gets its own allocation under the same all-in budget, then a first quantization, which measures what
        rows hand to one another; with those row norms it is allocated again. The form that lost least is taken.

        Args:
            budget: all-in bits of the layer; None: `--bits` for each of its weights.
            trim: leave out components of shared bases that no expert gives bits.
        """
        best: LayerPlan | None = None
        least = np.inf
        weights = self.shape.num_weights // len(self.shape.layers)
        whole = int(self.config.bits * weights) if budget is None else budget
        for choices in self.tables():
            smallest = choices.overhead + int(choices.cost.min(1).sum())
            least = min(least, smallest / choices.schema.num_weights)
            if smallest > whole:
                continue
            plan = self._decide(choices, whole - choices.overhead)
            if self.config.objective == "bitsmoe" and "trial" not in self.config.without:
                plan = self._retry(plan, whole - choices.overhead)
            best, worse = (plan, best) if best is None or self._lost(plan) < self._lost(best) else (best, plan)
            if worse is not None:
                self._forget(worse)
        if best is None:
            raise BitsmoeError(
                f"--bits {self.config.bits}: impossible for {self.subject} with the bit-widths {self.config.widths}; "
                f"use at least --bits {np.ceil(least * 1000) / 1000:.3f}"
            )
        return self._trimmed(best, whole) if trim and "trim" not in self.config.without else best

    def _lost(self, plan: LayerPlan) -> float:
        """What a plan is judged by."""
        if plan.trial is None:
            return plan.allocation.loss
        if not _shares_bases(plan.layer) or self.config.tune:
            return plan.trial
        return max(plan.trial * SHARED_BASIS_HANDICAP, plan.trial + SHARED_BASIS_GAIN)

    def _trimmed(self, plan: LayerPlan, whole: int) -> LayerPlan:
        """The same without components that no expert gives bits; what they cost is given to others.

        Args:
            plan: with all components.
            whole: all-in bits of the layer.
        """
        unused = {name: rows for name in plan.projections if len(rows := self._unused(plan, name))}
        if not unused:
            return plan
        loss, schema = plan.table.loss.copy(), plan.table.schema
        for name, rows in unused.items():
            gone = torch.isin(plan.projections[name].components.order, rows)
            blocks = gone.view(self.E, -1, self.config.block_size).any(-1).cpu().numpy()
            for unit in plan.table.unit_of[name][blocks]:
                loss[unit, plan.table.width > 0] = np.inf
        overhead = 8 * _trimmed_schema(schema, unused).nbytes(self.config.block_size)
        choices = replace(plan.table, loss=loss, overhead=overhead, unused=unused)
        return replace(self._decide(choices, whole - overhead), trial=plan.trial)

    def _unused(self, plan: LayerPlan, name: ProjectionName) -> Tensor:
        """Components of 0 bits in every expert, ascending; whole blocks of them, the least important ones."""
        projection, G = plan.projections[name], self.config.block_size
        components, C = projection.components, plan.table.schema.components(name)
        order = components.order
        if projection.decomposition.basis is None or C % G or plan.ranks is not None:
            return order.new_empty(0)
        width = self._width(plan, name, range(self.E)).flatten(1)
        used = torch.zeros(C, dtype=torch.bool, device=order.device)
        used[order[width > 0]] = True
        energy = components.energy * self.stats.share[:, None]
        importance = energy.new_zeros(C).index_add_(0, order.flatten(), energy.flatten())
        count = min(int((~used).sum()) // G * G, C - G)
        return importance.masked_fill(used, torch.inf).argsort(stable=True)[:count].sort().values

    def _decide(self, choices: Table, budget: int) -> LayerPlan:
        if not np.isfinite(choices.loss.min(1)).all():
            raise BitsmoeError(f"{self.subject}: errors of its experts are beyond float32; their weights are too large")
        result = self.team.agreed(lambda: allocate(choices.loss, choices.cost, budget))
        width, rank = choices.width[result.choice], choices.rank[result.choice]
        bits: dict[ProjectionName, Tensor] = {}
        filled = {}
        ranks = None
        stored = _trimmed_schema(choices.schema, choices.unused)
        for name, unit in choices.unit_of.items():
            bits[name] = torch.from_numpy(width[unit]).to(torch.uint8)
            update: dict[str, int] = {"code_rows": int(bits[name].sum())}
            if choices.rank.any():
                ranks = torch.from_numpy(rank[unit[:, 0]]).to(torch.int32)
                update["lowrank_total"] = int(ranks.sum())
            filled[name] = stored.projections[name].model_copy(update=update)
        schema = stored.model_copy(update={"projections": filled})
        return LayerPlan(schema, bits, ranks, result, choices)

    def _retry(self, plan: LayerPlan, budget: int) -> LayerPlan:
        """The same with row norms as a first pass measured them, and its error."""

        def attempt(chunk: range) -> dict[ProjectionName, tuple[Tensor, Tensor]]:
            loaded, found = self.load(chunk), {}
            for name, projection in plan.projections.items():
                M = self.moments(projection, chunk)
                factor = self._factor(projection, chunk, M)
                q, _ = self._round(plan, projection, chunk, self.weights(name, chunk, loaded), M, factor, TRIAL)
                found[name] = q.norms.cpu(), q.error.cpu()
            return found

        parts = list(self.each(attempt))
        share, projections, error = self.stats.share, {}, 0.0
        for name, projection in plan.projections.items():
            lost = torch.cat([p[name][1] for p in parts]).to(share.device)
            error += float((share * lost).sum()) / max(float((share * projection.components.total).sum()), 1e-300)
            if projection.decomposition.component_axis == "input":
                norms = torch.cat([p[name][0] for p in parts]).to(share.device)
                projection = replace(projection, components=replace(projection.components, norms=norms))
            projections[name] = projection
        objective = OBJECTIVES[self.config.objective]
        choices = table(objective, self, plan.basis, plan.table.schema, projections, plan.table.overhead)
        return replace(self._decide(choices, budget), trial=error)

    def _width(self, plan: LayerPlan, name: ProjectionName, chunk: range) -> Tensor:
        """Widths of every component, [n, C, 1] where components are inputs, [n, 1, C] where they are outputs."""
        bits = plan.bits[name][chunk.start : chunk.stop].to(self.stats.inputs.x.device)
        width = bits.repeat_interleave(self.config.block_size, 1)[:, : plan.table.schema.components(name)]
        return width[:, :, None] if plan.layer.projections[name].component_axis == "input" else width[:, None]

    def _round(
        self,
        plan: LayerPlan,
        projection: ProjectionPlan,
        chunk: range,
        W: Tensor,
        M: Tensor,
        factor: Factor | None,
        refine: int,
    ) -> tuple[Quantized, Tensor]:
        """Codes of W [n, N, K] under the plan, with the factor [n, K', N']; moments M are in stored order."""
        d = projection.decomposition
        order = projection.components.order[chunk.start : chunk.stop]
        F = d.factors(W)
        on_input = d.component_axis == "input"
        F = F.gather(1, order[:, :, None].expand_as(F)) if on_input else F.gather(2, order[:, None].expand_as(F))
        width = self._width(plan, projection.name, chunk).flatten(1)
        along = "K" if on_input else "N"
        return quantize(F, M, width, along, max(refine, 0), self.config.feedback, refine == TRIAL, factor), F

    def quantize(self, plan: LayerPlan, target: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Codes, scales and metadata of every projection.

        Args:
            plan: what `plan` returned.
            target: float32 [T, H], what the experts should add to the layer's output, for down matrices that are
                fitted together (one process only); is overwritten. None: each makes up for its own gate and up.

        Returns:
            Tensors `{projection}_{part}` on the CPU, and the relative output error of each projection as measured on
            the calibration statistics.
        """
        specs = plan.layer.tensor_specs(self.config.block_size)
        tensors: dict[str, Tensor] = {}
        filled = dict.fromkeys(specs, 0)
        lost = dict.fromkeys(plan.projections, 0.0)
        total = dict.fromkeys(plan.projections, 0.0)
        if target is None:
            found = self.each(lambda chunk: self._quantize_chunk(plan, chunk))
        else:
            found = self._quantize_jointly(plan, target)
        for parts, errors in found:
            # Put together at once: kept apart until the end they would pin the heap, and then be there twice.
            for key, rows in parts.items():
                if key not in tensors:
                    tensors[key] = torch.empty(specs[key].shape, dtype=specs[key].dtype)
                assert rows.dtype == specs[key].dtype
                tensors[key][filled[key] : filled[key] + len(rows)] = rows
                filled[key] += len(rows)
            for name, (a, b) in errors.items():
                lost[name] += a
                total[name] += b
        assert all(filled[key] == len(tensor) for key, tensor in tensors.items())
        for name in plan.projections:
            tensors |= {k: v.cpu() for k, v in plan.basis_tensors(name).items()}
        return tensors, {str(n): lost[n] / max(total[n], 1e-300) for n in lost}

    def _quantize_chunk(self, plan: LayerPlan, chunk: range) -> Part:
        """Tensors of some experts, and the error and energy of their projections; puts their down matrices aside."""
        loaded = self.load(chunk)
        inner = self._quantize_inputs(plan, chunk, loaded)
        return self._quantize_down(plan, chunk, inner, *self._down_targets(plan, chunk, loaded[1], inner[0]))

    def _quantize_jointly(self, plan: LayerPlan, target: Tensor) -> Iterator[Part]:
        """As `_quantize_chunk` of every chunk, down matrices fitted to one target."""
        inner = []
        for chunk in self.chunks:
            loaded = self.load(chunk)
            inner.append(self._quantize_inputs(plan, chunk, loaded))
            W, M = self._down_targets(plan, chunk, loaded[1], inner[-1][0])
            for i, e in enumerate(chunk):
                self.spool.put(f"down-{e}", W[i])
                self.spool.put(f"fitted-moments-{e}", M[i])

        def put(e: int, W: Tensor) -> None:
            self.spool.put(f"down-{e}", W)

        def get(e: int) -> Tensor:
            return self.spool.get(f"down-{e}").to(target.device)

        def moments(e: int) -> Tensor:
            return self.spool.get(f"fitted-moments-{e}").to(target.device)

        fit_jointly(self.E, self.stats.routed, moments, get, put, target)
        for chunk, found in zip(self.chunks, inner, strict=True):
            W, M = (torch.stack([one(e) for e in chunk]) for one in (get, moments))
            yield self._quantize_down(plan, chunk, found, W, M)
            self._tick(len(chunk))

    def _quantize_inputs(self, plan: LayerPlan, chunk: range, loaded: tuple[Tensor, Tensor]) -> Part:
        """Tensors, errors and energies of everything but down."""
        tensors: dict[str, Tensor] = {}
        errors: dict[ProjectionName, tuple[float, float]] = {}
        for name, projection in plan.projections.items():
            if name != "down":
                M, W = self.moments(projection, chunk), self.weights(name, chunk, loaded)
                factor = self._factor(projection, chunk, M)
                parts, errors[name] = self._quantize_part(plan, projection, chunk, W, M, factor)
                tensors |= {f"{name}_{k}": v for k, v in parts.items()}
        return tensors, errors

    def _quantize_down(self, plan: LayerPlan, chunk: range, inner: Part, W: Tensor, M: Tensor) -> Part:
        """The same with down: W [n, H, I] with moments M [n, I, I] of what enters it."""
        tensors, errors = inner
        parts, error = self._quantize_part(plan, plan.projections["down"], chunk, W, M, None)
        tensors = tensors | {f"down_{k}": v for k, v in parts.items()}
        for e, matrix in zip(chunk, self._dequantized(plan, tensors, chunk, "down"), strict=True):
            self.spool.put(f"down-{e}", matrix)
        return tensors, errors | {"down": error}

    def _dequantized(self, plan: LayerPlan, tensors: dict[str, Tensor], chunk: range, *names: ProjectionName) -> Tensor:
        """What a reader of the file makes of a chunk's tensors: [n, N, K] of the named projections, or gate and up."""
        picked = names or tuple(n for n in ("gate_up", "gate", "up") if n in plan.projections)
        projections: dict[ProjectionName, Projection] = {}
        held: dict[str, Tensor] = {}
        for name in picked:
            projection = plan.layer.projections[name]
            update = {"code_rows": len(tensors[f"{name}_codes"])}
            if projection.lowrank_total:
                update["lowrank_total"] = int(tensors[f"{name}_lowrank_rank"].sum())
            projections[name] = projection.model_copy(update=update)
            held |= plan.basis_tensors(name)
            held |= {k: v for k, v in tensors.items() if k.startswith(f"{name}_")}
        layer = plan.layer.model_copy(update={"num_experts": len(chunk), "projections": projections})
        device = self.stats.inputs.x.device
        weights = LayerWeights(layer, self.config.block_size, {k: v.to(device) for k, v in held.items()})
        return torch.stack(
            [torch.cat([weights.projections[name].weight(i) for name in picked]) for i in range(len(chunk))]
        )

    def _down_targets(
        self, plan: LayerPlan, chunk: range, down: Tensor, tensors: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What to quantize instead of down [n, H, I], and the moments [n, I, I] its error is measured with.

        Args:
            plan: of the layer.
            chunk: experts.
            down: as the model has it.
            tensors: of gate and up, quantized.
        """
        gate_up = self._dequantized(plan, tensors, chunk)
        W, M = torch.empty_like(down), down.new_empty(len(chunk), self.I, self.I)
        for i, e in enumerate(chunk):
            M[i], missing = self.stats.hidden_moments(e, gate_up[i], self.channel_order[e])
            W[i] = down[i] if "correction" in self.config.without else corrected(down[i], M[i], missing)
        return W, M

    def original_output(self) -> Iterator[Tensor]:
        """What the layer's experts give before they are quantized, as `LayerStatistics.routed_output`.

        To be taken before `quantize`.
        """
        return self.stats.routed_output(self.team, self._mine(), lambda e: self.experts(range(e, e + 1))[1][0])

    def quantized_output(self) -> Iterator[Tensor]:
        """The same after `quantize`."""
        device = self.stats.inputs.x.device
        return self.stats.routed_output(self.team, self._mine(), lambda e: self.spool.get(f"down-{e}").to(device))

    def output_of(self, layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
        """What the layer's experts give with other tensors than `quantize` made, [T, H]."""
        inputs = self.stats.inputs
        weights = LayerWeights(layer, self.config.block_size, {k: v.to(inputs.x.device) for k, v in tensors.items()})
        return moe_forward(weights, inputs.x, inputs.topk_weights, inputs.topk_ids)

    def output_error(self, output: Tensor | None = None) -> float:
        """Relative error of the layer's output, on a sample of the tokens.

        Args:
            output: [T, H]; None: what the experts give after `quantize`.
        """

        def sampled(chunk: range) -> list[tuple[Tensor, Tensor]]:
            device = self._sampled.device
            found = (self.stats.sampled_outputs(e, self.spool.get(f"down-{e}").to(device)) for e in chunk)
            return [(place.cpu(), y.cpu()) for place, y in found]

        if output is None:
            sample = _Sample(self.stats)
            for found in self.team.map(self.chunks, sampled):
                sample.add(found)
                give_back(matrix_bytes(self.H, self.I))
            quantized = sample.output()
        else:
            quantized = output[:: self.stats.sample_step]
        lost, total = (y.double().square().sum() for y in (quantized - self._sampled, self._sampled))
        return float(lost) / max(float(total), 1e-300)

    def _quantize_part(
        self, plan: LayerPlan, projection: ProjectionPlan, chunk: range, W: Tensor, M: Tensor, factor: Factor | None
    ) -> tuple[dict[str, Tensor], tuple[float, float]]:
        """Tensors of one projection of some experts, but for the basis, and its error and energy."""
        d, name, G = projection.decomposition, projection.name, self.config.block_size
        on_input = d.component_axis == "input"
        N = plan.layer.features(name)
        own = slice(chunk.start, chunk.stop)
        bits, width = plan.bits[name][own], self._width(plan, name, chunk)
        q, F = self._round(plan, projection, chunk, W, M, factor, self.config.refine)
        order, roots = projection.components.order[own], self._roots(name, chunk)
        residual, error = F - q.dequantize(width), q.lost
        lowrank: dict[str, Tensor] = {}
        if plan.ranks is not None:
            q, residual, lowrank = _compensated(q, F, M, width, plan.ranks[own], order, roots, self.config)
            error = None
        share = self.stats.share[own]
        # Down was fitted anew since its components were ranked.
        energy = output_energy(F, M) if name == "down" else projection.components.total[own]
        error = output_energy(residual, M) if error is None else error
        lost, total = (float((share * x).sum()) for x in (error, energy))
        codes = [pack_codes((q.codes[i] if on_input else q.codes[i].T).cpu(), bits[i], G) for i in range(len(chunk))]
        scales, features = (q.a, q.c) if on_input else (q.c, q.a)
        features = features if roots is None else features / roots
        scales, features = self._representable(name, chunk, scales, features)
        width = width.flatten(1)
        rows, component = plan.stored_rows(name, width, order)
        width = width.gather(1, rows)
        parts = {
            "codes": torch.cat(codes) if codes else torch.empty(0, N, dtype=code_dtype(G)),
            "bits": width[:, ::G].cpu(),
            "component_scale": (scales.gather(1, rows) * (width > 0)).half().cpu(),
            "feature_scale": features.cpu().half(),
        }
        if plan.layer.projections[name].order == "expert":
            parts["order"] = component.cpu().to(order_dtype(plan.layer.components(name)))
        if plan.layer.projections[name].lowrank_total:
            parts |= lowrank
        return parts, (lost, total)

    def _representable(
        self, name: ProjectionName, chunk: range, scales: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scales of components [n, C] and features [n, F], shared out anew where one side leaves float16's range.

        Raises:
            BitsmoeError: names the experts whose weights are too large for any scales.
        """
        largest, widest = (x.abs().amax(-1, keepdim=True) for x in (scales, features))
        low, high = SCALE_RANGE
        apart = (torch.maximum(largest, widest) > high) | ((torch.minimum(largest, widest) < low) & (largest > 0))
        ratio = widest.clamp(min=1e-30) / largest.clamp(min=1e-30)
        shift = torch.exp2((0.5 * ratio.log2()).round().clamp(-24, 24)).where(apart, 1.0)
        scales, features = scales * shift, features / shift
        most = torch.finfo(torch.float16).max
        if bool((bad := ~((scales.abs() <= most).all(-1) & (features.abs() <= most).all(-1))).any()):
            experts = [e for e, fault in zip(chunk, bad.tolist(), strict=True) if fault]
            raise BitsmoeError(
                f"{self.subject}: {name} of expert(s) {experts} holds weights too large for the format's float16 "
                "scales; no model is trained to such values: mend them, or set them to zero"
            )
        return scales, features


class _Sample:
    """A layer's output at the tokens on which it is compared, put together from every expert's slots."""

    def __init__(self, stats: LayerStatistics):
        self._step, self._top_k = stats.sample_step, stats.inputs.topk_ids.shape[1]
        tokens, H = stats.inputs.x.shape
        self._slots = stats.inputs.x.new_zeros(-(-tokens // self._step) * self._top_k, H)

    def add(self, found: list[tuple[Tensor, Tensor]]) -> None:
        """What `LayerStatistics.sampled_outputs` found of some experts."""
        for place, output in found:
            place = place.to(self._slots.device)
            place = place // self._top_k // self._step * self._top_k + place % self._top_k
            self._slots[place] = output.to(self._slots.device)

    def output(self) -> Tensor:
        """[n, H]."""
        return self._slots.view(-1, self._top_k, self._slots.shape[1]).sum(1)


def _compensated(
    q: Quantized,
    F: Tensor,
    M: Tensor,
    width: Tensor,
    ranks: Tensor,
    order: Tensor,
    roots: Tensor | None,
    config: QuantizeConfig,
) -> tuple[Quantized, Tensor, dict[str, Tensor]]:
    """Codes and compensators fitted in turn.

    Args:
        q: first codes.
        F: [n, K, N].
        M: [n, K, K], undamped.
        width: [n, K, 1].
        ranks: int32 [n].
        order: int64 [n, K], component of every row.
        roots: [n, N] that outputs were scaled by, or None.
        config: options.

    Returns:
        The last codes, what is left of F, and tensors as the file stores them: components and features of the weight
        itself.
    """
    most, factor = int(ranks.max()), factorize(M)
    metric = factor.damped(M)
    live = (torch.arange(most)[None] < ranks[:, None]).to(F.device)[:, :, None]
    for turn in range(COMPENSATOR_ROUNDS):
        V, U = compensator.fit(F - q.dequantize(width), metric, most)
        V, U = (V * live).half().float(), (U * live).half().float()
        made_up = V.mT @ U
        if turn < COMPENSATOR_ROUNDS - 1:
            q = quantize(F - made_up, metric, width.flatten(1), "K", config.refine, config.feedback)
    residual = F - q.dequantize(width) - made_up
    V = torch.empty_like(V).scatter_(2, order[:, None].expand_as(V), V)
    U = U if roots is None else U / roots[:, None]
    picked = [torch.cat([x[i, :rank] for i, rank in enumerate(ranks.tolist())]).half().cpu() for x in (V, U)]
    return q, residual, {"lowrank_rank": ranks.clone(), "lowrank_in": picked[0], "lowrank_out": picked[1]}


def evened(gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Experts that compute the same, without up and down of very different sizes.

    A power of two goes from one to the other. Errors of both are weighed together, and their scales are float16.
    Ordinary experts stay as they are.

    Args:
        gate_up: [n, 2 I, H].
        down: [n, H, I].
    """
    gate, up = gate_up.chunk(2, 1)
    sizes = [torch.maximum(w.amax((1, 2)), -w.amin((1, 2))) for w in (up, down)]
    ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), sizes[0] / sizes[1], 1.0)
    uneven = (ratio > UNEVEN) | (ratio < 1 / UNEVEN)
    if not bool(uneven.any()):
        return gate_up, down
    shift = torch.exp2((0.5 * ratio.log2()).round().clamp(-48, 48)).where(uneven, 1.0)[:, None, None]
    return torch.cat([gate, up / shift], 1), down * shift


def _trimmed_schema(schema: Layer, unused: Mapping[ProjectionName, Tensor]) -> Layer:
    """A layer's schema without some components of its bases."""
    projections = dict(schema.projections)
    for name, rows in unused.items():
        basis = projections[name].basis
        assert basis is not None
        smaller = basis.model_copy(update={"rank": basis.rank - len(rows)})
        projections[name] = projections[name].model_copy(update={"basis": smaller})
    return schema.model_copy(update={"projections": projections})


def _add_gram(grams: dict[ProjectionName, Tensor], name: ProjectionName, gram: Tensor) -> None:
    grams[name] = grams[name].add_(gram) if name in grams else gram


def _concatenate(parts: list[Components], device: torch.device) -> Components:
    return Components(
        *(torch.cat([getattr(p, f) for p in parts]).to(device) for f in ("order", "norms", "variance", "total"))
    )


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
