"""Quantizing a planned layer: factors are rounded, down makes up for gate and up, tensors are put together.

Experts pass in chunks, and memory holds one chunk. Chunks are the unit that workers share. All cut alike, so any number
of workers gives the same bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.schema import Projection, ProjectionName, code_dtype, order_dtype
from bitsmoe_kernels.reference import LayerWeights, ProjectionWeights
from offline_quant.layer.plan import LayerPlan
from offline_quant.layer.view import LayerView, RoundingProblem
from offline_quant.linalg import add_damping, output_energy
from offline_quant.model.expert_weights import ExpertWeights, OneExpert
from offline_quant.rounding import compensator
from offline_quant.rounding.correction import correct_down
from offline_quant.rounding.error_feedback import RoundingMode, quantize
from offline_quant.rounding.grid import Quantized
from offline_quant.rounding.joint_fit import fit_jointly
from offline_quant.rounding.packing import pack_codes

SCALE_RANGE = 2.0**-10, 2.0**14
"""Where the largest scales of an expert lie as a rule. Beyond it they are shared out anew between its two sides."""
COMPENSATOR_ROUNDS = 2
"""How often codes and compensator are fitted to what the other leaves over."""


@dataclass(frozen=True)
class QuantizedLayer:
    """A quantized layer.

    Attributes:
        tensors: `{projection}_{part}` as the file stores them, on the CPU.
        errors: relative output error of each projection as measured on the calibration moments.
    """

    tensors: dict[str, Tensor]
    errors: dict[str, float]


@dataclass(frozen=True)
class QuantizedChunk:
    """Some experts of a layer, quantized.

    Attributes:
        tensors: `{projection}_{part}` but for bases, on the CPU.
        errors: by projection, error energy and output energy.
    """

    tensors: dict[str, Tensor]
    errors: dict[ProjectionName, tuple[float, float]]

    def __or__(self, other: "QuantizedChunk") -> "QuantizedChunk":
        """Both, of different projections of the same experts."""
        return QuantizedChunk(self.tensors | other.tensors, self.errors | other.errors)


def quantize_layer(view: LayerView, plan: LayerPlan, target: Tensor | None = None) -> QuantizedLayer:
    """Codes, scales and metadata of every projection.

    Down is fitted to the activations of the quantized gate and up, and makes up for their error. Down matrices as a
    reader of the file sees them are kept in the cache.

    Args:
        view: the layer.
        plan: what `plan_layer` decided.
        target: float32 [T, H], what the experts should add to the layer's output, for down matrices that are fitted
            together; is overwritten. None: each makes up for its own gate and up.

    Raises:
        BitsmoeError: weights are too large for any scales.
    """
    specs = plan.layer.tensor_specs(view.config.block_size)
    tensors: dict[str, Tensor] = {}
    filled = dict.fromkeys(specs, 0)
    lost = dict.fromkeys(plan.projections, 0.0)
    total = dict.fromkeys(plan.projections, 0.0)
    if target is None:
        chunks = view.each(lambda chunk: quantize_chunk(view, plan, chunk))
    else:
        chunks = _quantize_jointly(view, plan, target)
    for quantized in chunks:
        # Put together at once: kept apart until the end they would pin the heap, and then be there twice.
        for key, rows in quantized.tensors.items():
            if key not in tensors:
                tensors[key] = torch.empty(specs[key].shape, dtype=specs[key].dtype)
            assert rows.dtype == specs[key].dtype
            tensors[key][filled[key] : filled[key] + len(rows)] = rows
            filled[key] += len(rows)
        for name, (error, energy) in quantized.errors.items():
            lost[name] += error
            total[name] += energy
    assert all(filled[key] == len(tensor) for key, tensor in tensors.items())
    for name in plan.projections:
        tensors |= {k: v.cpu() for k, v in plan.basis_tensors(name).items()}
    return QuantizedLayer(tensors, {str(n): lost[n] / max(total[n], 1e-300) for n in lost})


def quantize_chunk(view: LayerView, plan: LayerPlan, chunk: range) -> QuantizedChunk:
    """Some experts, each on its own."""
    experts = view.load(chunk)
    inputs = _quantize_inputs(view, plan, chunk, experts)
    return _quantize_down(view, plan, chunk, inputs, *_down_targets(view, plan, chunk, experts, inputs))


def _quantize_jointly(view: LayerView, plan: LayerPlan, target: Tensor) -> Iterator[QuantizedChunk]:
    """As `quantize_chunk` of every chunk, down matrices fitted to one target."""
    ctx, cache = view.ctx, view.ctx.cache
    inputs: dict[range, QuantizedChunk] = {}

    def before_fit(chunk: range) -> None:
        experts = view.load(chunk)
        inputs[chunk] = _quantize_inputs(view, plan, chunk, experts)
        W, M = _down_targets(view, plan, chunk, experts, inputs[chunk])
        cache.down_targets.put_all(chunk, W)
        cache.down_target_moments.put_all(chunk, M)

    def after_fit(chunk: range) -> QuantizedChunk:
        W, M = (
            torch.stack([kept.get(e).to(target.device) for e in chunk])
            for kept in (cache.down_targets, cache.down_target_moments)
        )
        cache.down_targets.drop(chunk)
        return _quantize_down(view, plan, chunk, inputs.pop(chunk), W, M)

    def turns() -> Iterator[int]:
        return chain.from_iterable(ctx.workers.in_turn(ctx.chunks, target))

    for _ in ctx.each(before_fit, counted=False):
        pass
    if (bias := view.measurements.down_bias) is not None:
        for e in turns():
            routed = ctx.moments.routed_tokens(e, cache.activations.quantized(e))
            target.index_add_(0, routed.token, -routed.weight[:, None] * bias[e])
    fit_jointly(
        turns,
        lambda e: ctx.moments.routed_tokens(e, cache.activations.quantized(e)),
        lambda e: cache.down_target_moments.get(e).to(target.device),
        lambda e: cache.down_targets.get(e).to(target.device),
        cache.down_targets.put,
        target,
    )
    yield from view.each(after_fit)


def _quantize_inputs(view: LayerView, plan: LayerPlan, chunk: range, experts: ExpertWeights) -> QuantizedChunk:
    """Everything but the matrix of down."""
    shifts = {name: experts.stored_bias(name, view.ctx.prefix, chunk) for name in plan.projections}
    quantized = QuantizedChunk({f"{name}_shift": bias.cpu() for name, bias in shifts.items() if bias is not None}, {})
    for name, projection in plan.projections.items():
        if name != "down":
            quantized |= _quantize_projection(view, plan, view.problem(projection, chunk, experts))
    return quantized


def _quantize_down(
    view: LayerView, plan: LayerPlan, chunk: range, inputs: QuantizedChunk, W: Tensor, M: Tensor
) -> QuantizedChunk:
    """The same with down: W [n, H, I] with moments M [n, I, I] of what enters it."""
    problem = view.problem_of(plan.projections["down"], chunk, W, M)
    quantized = inputs | _quantize_projection(view, plan, problem)
    (down,) = _stored_projections(view, plan, quantized.tensors, chunk, "down")
    view.ctx.cache.quantized_down.put_all(chunk, torch.stack([down.weight(i) for i in range(len(chunk))]))
    return quantized


def _stored_projections(
    view: LayerView, plan: LayerPlan, tensors: dict[str, Tensor], chunk: range, *names: ProjectionName
) -> list[ProjectionWeights]:
    """What a reader of the file sees of a chunk's tensors: the named projections."""
    projections: dict[ProjectionName, Projection] = {}
    held: dict[str, Tensor] = {}
    for name in names:
        projection = plan.layer.projections[name]
        update = {"code_rows": len(tensors[f"{name}_codes"])}
        if projection.lowrank_total:
            update["lowrank_total"] = int(tensors[f"{name}_lowrank_rank"].sum())
        projections[name] = projection.model_copy(update=update)
        held |= plan.basis_tensors(name)
        held |= {k: v for k, v in tensors.items() if k.startswith(f"{name}_")}
    layer = plan.layer.model_copy(update={"num_experts": len(chunk), "projections": projections})
    on_device = {k: v.to(view.ctx.device) for k, v in held.items()}
    return list(LayerWeights(layer, view.config.block_size, on_device).projections.values())


def _down_targets(
    view: LayerView, plan: LayerPlan, chunk: range, experts: ExpertWeights, inputs: QuantizedChunk
) -> tuple[Tensor, Tensor]:
    """What to quantize instead of down [n, H, I], and the moments [n, I, I] its error is measured with.

    Args:
        view: the layer.
        plan: of the layer.
        chunk: experts.
        experts: as the model has them, channels sorted.
        inputs: gate and up, quantized.
    """
    ctx, down = view.ctx, experts.down
    intermediate_size = down.shape[2]
    parts = _stored_projections(
        view, plan, inputs.tensors, chunk, *(name for name in plan.layer.projections if name != "down")
    )
    W, M = torch.empty_like(down), down.new_empty(len(chunk), intermediate_size, intermediate_size)
    for i, e in enumerate(chunk):
        biases = [bias for part in parts if (bias := part.bias(i)) is not None]
        quantized = OneExpert(
            torch.cat([part.weight(i) for part in parts]), down[i], torch.cat(biases) if biases else None
        )
        original = ctx.cache.activations.original(e).to(down.device)
        measured = ctx.moments.measure_quantized(e, quantized, view.measurements.channel_order[e], original)
        ctx.cache.activations.put_quantized(e, measured.activations)
        M[i] = measured.moments
        corrects = "correction" not in view.config.ablations
        W[i] = correct_down(down[i], M[i], measured.missing) if corrects else down[i]
    return W, M


def _quantize_projection(view: LayerView, plan: LayerPlan, problem: RoundingProblem) -> QuantizedChunk:
    """One projection of some experts."""
    projection, chunk, F, M = problem.projection, problem.chunk, problem.F, problem.M
    config, name, G = view.config, projection.name, view.config.block_size
    own = slice(chunk.start, chunk.stop)
    bits, width = plan.bits[name][own], plan.widths(name, chunk, G, view.ctx.device)
    mode = RoundingMode(config.refine, config.feedback)
    q, order, roots = problem.round(width, mode), problem.order, problem.sqrt_output_weight
    residual, error = F - q.dequantize(width), q.lost
    lowrank: dict[str, Tensor] = {}
    if plan.ranks is not None:
        q, residual, lowrank = _compensated(problem, q, width, plan.ranks[own], mode)
        error = None
    frequency = view.routing_frequency[own]
    # Down was fitted anew since its components were ranked.
    energy = output_energy(F, M) if name == "down" else projection.components.total[own]
    error = output_energy(residual, M) if error is None else error
    lost, total = (float((frequency * x).sum()) for x in (error, energy))
    codes = [
        pack_codes((q.codes[i] if problem.on_input else q.codes[i].T).cpu(), bits[i], G) for i in range(len(chunk))
    ]
    scales, features = (q.a, q.c) if problem.on_input else (q.c, q.a)
    features = features if roots is None else features / roots
    scales, features = _representable(view.ctx.prefix, name, chunk, scales, features)
    width = width.flatten(1)
    rows, component = plan.stored_rows(name, width, order)
    width = width.gather(1, rows)
    parts = {
        "codes": torch.cat(codes) if codes else torch.empty(0, plan.layer.features(name), dtype=code_dtype(G)),
        "bits": width[:, ::G].cpu(),
        "component_scale": (scales.gather(1, rows) * (width > 0)).half().cpu(),
        "feature_scale": features.cpu().half(),
    }
    if plan.layer.projections[name].order == "expert":
        parts["order"] = component.cpu().to(order_dtype(plan.layer.components(name)))
    if plan.layer.projections[name].lowrank_total:
        parts |= lowrank
    return QuantizedChunk({f"{name}_{part}": tensor for part, tensor in parts.items()}, {name: (lost, total)})


def _representable(
    prefix: str, name: ProjectionName, chunk: range, scales: Tensor, features: Tensor
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
            f"{prefix}: {name} of expert(s) {experts} holds weights too large for the format's float16 "
            "scales; no model is trained to such values: mend them, or set them to zero"
        )
    return scales, features


def _compensated(
    problem: RoundingProblem, q: Quantized, width: Tensor, ranks: Tensor, mode: RoundingMode
) -> tuple[Quantized, Tensor, dict[str, Tensor]]:
    """Codes and compensators fitted in turn.

    Args:
        problem: what is rounded.
        q: first codes.
        width: [n, K, 1].
        ranks: int32 [n].
        mode: of rounding again.

    Returns:
        The last codes, what is left of F, and tensors as the file stores them: components and features of the weight
        itself.
    """
    F, order, roots = problem.F, problem.order, problem.sqrt_output_weight
    most, metric = int(ranks.max()), add_damping(problem.M)
    live = (torch.arange(most)[None] < ranks[:, None]).to(F.device)[:, :, None]
    for turn in range(COMPENSATOR_ROUNDS):
        V, U = compensator.fit(F - q.dequantize(width), metric, most)
        V, U = (V * live).half().float(), (U * live).half().float()
        made_up = V.mT @ U
        if turn < COMPENSATOR_ROUNDS - 1:
            q = quantize(F - made_up, problem.M, width.flatten(1), "K", mode, problem.factor)
    residual = F - q.dequantize(width) - made_up
    V = torch.empty_like(V).scatter_(2, order[:, None].expand_as(V), V)
    U = U if roots is None else U / roots[:, None]
    picked = [torch.cat([x[i, :rank] for i, rank in enumerate(ranks.tolist())]).half().cpu() for x in (V, U)]
    return q, residual, {"lowrank_rank": ranks.clone(), "lowrank_in": picked[0], "lowrank_out": picked[1]}
