"""Planning a layer: components are ranked under each form, an objective fills the table, the solver decides.

With a pilot, a rough quantization of every form measures what rows hand to one another; with those row norms it is
decided again, and the form that lost least is taken.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.schema import Layer, ProjectionName
from offline_quant.allocation.budget import budget_bits
from offline_quant.allocation.choices import ChoiceTable, choice_table
from offline_quant.allocation.objectives import OBJECTIVES, forms_of, runs_pilot
from offline_quant.allocation.objectives.base import RankedProjections
from offline_quant.allocation.solver import allocate
from offline_quant.config import QuantizeConfig
from offline_quant.decomposition.forms import FORMS, Form
from offline_quant.decomposition.ranking import Components, RankedProjection, rank_components
from offline_quant.layer.first_pass import keep_moments
from offline_quant.layer.plan import LayerPlan, without_components
from offline_quant.layer.view import LayerView
from offline_quant.rounding.error_feedback import RoundingMode

SHARED_BASIS_HANDICAP = 1.09
"""A form with shared bases is taken if a pilot finds its error smaller by this factor: among equals natural channels
end better (docs/log/2026-11-25.md). Tuning evens that out."""
SHARED_BASIS_GAIN = 0.0012
"""And if that spares this much of the relative error, for every token served pays for the projection."""
SAMPLE_EXPERTS = 16
"""Experts, at least, that choose the form of a layer that has over twice as many."""


def pass_count(config: QuantizeConfig, plans: int = 1, quantized: bool = True) -> int:
    """How often every expert comes by, at most, where some plans are made of a layer, and it may be quantized."""
    each_form = 2 if runs_pilot(config) else 1
    return (2 if quantized else 1) + plans * each_form * len(forms_of(config))


def plan_layer(view: LayerView, budget: int | None = None, trim: bool = True) -> LayerPlan:
    """Choose a decomposition, and bits and ranks of every unit.

    Args:
        view: the layer.
        budget: all-in bits of the layer; None: `--bits` for each of its weights.
        trim: leave out components of shared bases that no expert gives bits.

    Raises:
        BitsmoeError: the budget is too small; names the smallest possible one.
    """
    config, shape = view.config, view.shape
    weights = shape.num_weights
    whole = int(config.known_bits * weights) if budget is None else budget
    forms = _likely_forms(view, _allowed_forms(view), whole)
    best: LayerPlan | None = None
    least = np.inf
    for table in choice_tables(view, forms):
        least = min(least, table.least_bits / table.schema.num_weights)
        if table.least_bits > whole:
            continue
        plan = _plan(view, table, whole)
        if best is None or _loss(plan, config) < _loss(best, config):
            best, worse = plan, best
        else:
            worse = plan
        if worse is not None:
            _forget(view, worse)
    if best is None:
        raise BitsmoeError(
            f"--bits {config.bits}: impossible for {view.ctx.prefix} with the bit-widths {config.widths}; "
            f"use at least --bits {np.ceil(least * 1000) / 1000:.3f}"
        )
    return _trim(view, best, whole) if trim and "trim" not in config.ablations else best


def _allowed_forms(view: LayerView) -> list[Form]:
    """Those the budget allows.

    Raises:
        BitsmoeError: it allows none; names the smallest possible one.
    """
    config = view.config
    refusals, allowed = [], []
    for form in forms_of(config):
        try:
            budget_bits(form.schema(view.shape, config.basis_bits), config, view.ctx.prefix)
        except BitsmoeError as e:
            refusals.append(e)
        else:
            allowed.append(form)
    if not allowed:
        raise refusals[0]
    return allowed


def _likely_forms(view: LayerView, forms: list[Form], whole: int) -> list[Form]:
    """The one form that loses least on a sample of many experts; all of them where no sample is taken.

    Args:
        view: the layer.
        forms: that are allowed.
        whole: all-in bits of the layer.
    """
    experts = view.shape.num_experts
    if len(forms) < 2 or experts <= 2 * SAMPLE_EXPERTS or not runs_pilot(view.config):
        return forms
    sample = view.sample(SAMPLE_EXPERTS)
    share = whole * sample.shape.num_experts // experts
    losses: dict[float, Form] = {}
    for form, table in zip(forms, choice_tables(sample, forms), strict=True):
        if table.least_bits > share:
            return forms
        plan = _plan(sample, table, share)
        losses[_loss(plan, view.config)] = form
        _forget(sample, plan)
    return [losses[min(losses)]]


def choice_tables(view: LayerView, forms: Iterable[Form]) -> Iterator[ChoiceTable]:
    """The choices under every form. A sample of a layer bears its share of what the whole layer stores but once."""
    config, whole = view.config, view.ctx.shape
    for form in forms:
        schema = form.schema(view.shape, config.basis_bits)
        stored = 8 * form.schema(whole, config.basis_bits).nbytes(config.block_size)
        overhead = stored * view.shape.num_experts // whole.num_experts
        ranked = _rank(view, form, schema)
        yield choice_table(OBJECTIVES[config.objective], view, form.name, schema, ranked, overhead)


def _plan(view: LayerView, table: ChoiceTable, whole: int) -> LayerPlan:
    """The plan for one table and all-in bits of the layer."""
    budget = whole - table.overhead
    plan = _decide(view, table, budget)
    return _pilot(view, plan, budget) if runs_pilot(view.config) else plan


def _rank(view: LayerView, form: Form, schema: Layer) -> RankedProjections:
    """Components of every projection under one form; keeps its moments and their factors."""
    config, measurements = view.config, view.measurements
    decompositions = form.decompositions(
        measurements.grams[form.name],
        view.ctx.moments.pooled,
        measurements.output_unit,
        config.basis_bits,
        schema.gated,
    )
    # Down without a basis was ranked by the first pass, for all forms.
    unranked = {n: d for n, d in decompositions.items() if n != "down" or d.basis is not None}

    def key(name: ProjectionName) -> str:
        return f"{form.name}-{name}"

    def rank(chunk: range) -> dict[ProjectionName, tuple[Components, Tensor]]:
        experts, inputs, ranked = view.load(chunk), view.input_moments(chunk), {}
        for name, decomposition in unranked.items():
            M = view.moments(measurements.down, chunk) if name == "down" else inputs
            sort = name == "down" or schema.projections[name].order != "none"
            components, M, factor = rank_components(
                decomposition.factors(view.scaled_weights(name, chunk, experts)), decomposition.moments(M),
                decomposition.component_axis, sort, config.feedback,
            )  # fmt: skip
            # Without a basis they are the inputs' moments in another order.
            keep_moments(view.ctx, key(name), chunk, None if decomposition.basis is None else M, factor)
            ranked[name] = components.cpu(), factor.ridge.cpu()
        return ranked

    parts, device = list(view.each(rank)), view.ctx.device
    return {
        name: measurements.down
        if name not in unranked
        else RankedProjection(
            decomposition,
            Components.concatenate([p[name][0] for p in parts], device),
            key(name),
            torch.cat([p[name][1] for p in parts]).to(device),
        )
        for name, decomposition in decompositions.items()
    }


def _decide(view: LayerView, table: ChoiceTable, budget: int) -> LayerPlan:
    """The solver's plan for one table.

    Args:
        view: the layer.
        table: choices.
        budget: bits for codes and compensators.

    Raises:
        BitsmoeError: a loss is not finite.
    """
    if not np.isfinite(table.loss.min(1)).all():
        raise BitsmoeError(f"{view.ctx.prefix}: errors of its experts are beyond float32; their weights are too large")
    result = view.ctx.workers.broadcast_from_first(lambda: allocate(table.loss, table.cost, budget))
    width, rank = table.width[result.choice], table.rank[result.choice]
    bits: dict[ProjectionName, Tensor] = {}
    filled = {}
    ranks = None
    stored = without_components(table.schema, table.unused)
    for name, unit in table.unit_of.items():
        bits[name] = torch.from_numpy(width[unit]).to(torch.uint8)
        update: dict[str, int] = {"code_rows": int(bits[name].sum())}
        if table.rank.any():
            ranks = torch.from_numpy(rank[unit[:, 0]]).to(torch.int32)
            update["lowrank_total"] = int(ranks.sum())
        filled[name] = stored.projections[name].model_copy(update=update)
    return LayerPlan(stored.model_copy(update={"projections": filled}), bits, ranks, result, table)


def _pilot(view: LayerView, plan: LayerPlan, budget: int) -> LayerPlan:
    """The same decided with row norms as a rough quantization measures them, and its error."""
    config, frequency = view.config, view.routing_frequency
    mode = RoundingMode.pilot(config.feedback)

    def attempt(chunk: range) -> dict[ProjectionName, tuple[Tensor, Tensor]]:
        experts, measured = view.load(chunk), {}
        for name, projection in plan.projections.items():
            widths = plan.widths(name, chunk, config.block_size, view.ctx.device)
            rounded = view.problem(projection, chunk, experts).round(widths, mode)
            measured[name] = rounded.norms.cpu(), rounded.error.cpu()
        return measured

    parts = list(view.each(attempt))
    projections, error = {}, 0.0
    for name, projection in plan.projections.items():
        lost = torch.cat([p[name][1] for p in parts]).to(frequency.device)
        total = float((frequency * projection.components.total).sum())
        error += plan.table.weight[name] * float((frequency * lost).sum()) / max(total, 1e-300)
        if projection.decomposition.component_axis == "input":
            norms = torch.cat([p[name][0] for p in parts]).to(frequency.device)
            projection = replace(projection, components=replace(projection.components, norms=norms))
        projections[name] = projection
    table = choice_table(
        OBJECTIVES[config.objective], view, plan.basis, plan.table.schema, projections, plan.table.overhead
    )
    return replace(_decide(view, table, budget), pilot_error=error)


def _loss(plan: LayerPlan, config: QuantizeConfig) -> float:
    """What plans are compared by."""
    if plan.pilot_error is None:
        return plan.allocation.loss
    if not FORMS[plan.basis].shares_bases or config.tune:
        return plan.pilot_error
    return max(plan.pilot_error * SHARED_BASIS_HANDICAP, plan.pilot_error + SHARED_BASIS_GAIN)


def _forget(view: LayerView, plan: LayerPlan) -> None:
    """Drop what was kept for a form that is not taken."""
    local = view.ctx.local_experts
    for key in {p.key for p in plan.projections.values()} - {view.measurements.down.key}:
        view.ctx.cache.moments(key).drop(local)
        view.ctx.cache.factors(key).drop(local)


def _trim(view: LayerView, plan: LayerPlan, whole: int) -> LayerPlan:
    """The same without components that no expert gives bits; what they cost is given to others.

    Args:
        view: the layer.
        plan: with all components.
        whole: all-in bits of the layer.
    """
    unused = {name: rows for name in plan.projections if len(rows := _unused(view, plan, name))}
    if not unused:
        return plan
    loss, schema, block_size = plan.table.loss.copy(), plan.table.schema, view.config.block_size
    for name, rows in unused.items():
        gone = torch.isin(plan.projections[name].components.order, rows)
        blocks = gone.view(len(gone), -1, block_size).any(-1).cpu().numpy()
        for unit in plan.table.unit_of[name][blocks]:
            loss[unit, plan.table.width > 0] = np.inf
    overhead = 8 * without_components(schema, unused).nbytes(block_size)
    table = replace(plan.table, loss=loss, overhead=overhead, unused=unused)
    return replace(_decide(view, table, whole - overhead), pilot_error=plan.pilot_error)


def _unused(view: LayerView, plan: LayerPlan, name: ProjectionName) -> Tensor:
    """Components of 0 bits in every expert, ascending; whole blocks of them, the least important ones."""
    projection, G = plan.projections[name], view.config.block_size
    components, C = projection.components, plan.table.schema.components(name)
    order = components.order
    if projection.decomposition.basis is None or C % G or plan.ranks is not None:
        return order.new_empty(0)
    width = plan.widths(name, range(len(order)), G, view.ctx.device).flatten(1)
    used = torch.zeros(C, dtype=torch.bool, device=order.device)
    used[order[width > 0]] = True
    energy = components.energy * view.routing_frequency[:, None]
    importance = energy.new_zeros(C).index_add_(0, order.flatten(), energy.flatten())
    count = min(int((~used).sum()) // G * G, C - G)
    return importance.masked_fill(used, torch.inf).argsort(stable=True)[:count].sort().values
