"""Fills the reports of a run from its plans, measurements and schemas."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bitsmoe_kernels.format.linear_layers import DenseConfig, dense_size
from bitsmoe_kernels.format.schema import Layer, ProjectionName, TensorSpec
from offline_quant.allocation.objectives import OBJECTIVES
from offline_quant.config import QuantizeConfig
from offline_quant.evaluation.forecast import Forecast
from offline_quant.evaluation.sanity import SanityVerdict
from offline_quant.layer.plan import LayerPlan
from offline_quant.report.schema import (
    LayerPicture,
    LayerReport,
    LinearLayersReport,
    ModelBudget,
    ModelReport,
    ModelTuning,
    TokenRange,
)


def layer_picture(plan: LayerPlan, counts: Tensor) -> LayerPicture:
    """Bits, spectra and routing of a planned layer.

    Args:
        plan: of the layer.
        counts: calibration tokens routed to each expert, int64 [E].
    """
    spectrum = {}
    for name, projection in plan.projections.items():
        energy = projection.components.energy
        spectrum[str(name)] = (energy / energy.sum(1, keepdim=True).clamp(min=1e-30)).mean(0).float().cpu().numpy()
    counts = counts.float()
    share = (counts / counts.sum().clamp(min=1)).cpu().numpy()
    return LayerPicture({str(k): v.numpy() for k, v in plan.bits.items()}, spectrum, share)


def width_histogram(layer: Layer, name: ProjectionName, bits: Tensor, block_size: int) -> dict[str, int]:
    """Number of factor entries of a projection at each bit-width, without those of kept experts.

    Args:
        layer: schema of the layer.
        name: of the projection.
        bits: block bit-widths [E, B].
        block_size: components in a block.
    """
    C, kept = layer.components(name), set(layer.projections[name].kept_experts)
    coded = bits[[e for e in range(layer.num_experts) if e not in kept]]
    size = torch.full((bits.shape[1],), block_size)
    size[-1] = C - (bits.shape[1] - 1) * block_size
    return {str(int(w)): int(((coded == w) * size).sum()) * layer.features(name) for w in coded.unique().tolist()}


def layer_report(
    prefix: str,
    plan: LayerPlan,
    counts: Tensor,
    config: QuantizeConfig,
    errors: dict[str, float] | None,
    output_error: float | None,
    planned_output_error: float | None,
    extreme: list[int],
) -> LayerReport:
    """The report of one layer.

    Args:
        prefix: tensor prefix of its experts.
        plan: what was decided.
        counts: calibration tokens routed to each expert, int64 [E].
        config: options.
        errors: measured relative errors by projection; None where nothing was quantized.
        output_error: relative error of the routed experts' output; None where nothing was quantized.
        planned_output_error: the same as planned; None where the objective predicts no error.
        extreme: experts with far larger outputs than the others.
    """
    layer, allocation, table = plan.layer, plan.allocation, plan.table
    predicts = OBJECTIVES[config.objective].predicts_errors
    return LayerReport(
        layer=prefix,
        basis=plan.basis,
        basis_rank={name: p.basis.rank for name, p in layer.projections.items() if p.basis},
        bpw=8 * layer.nbytes(config.block_size) / layer.num_weights,
        predicted_error=sum(plan.losses.values()) if predicts else allocation.loss,
        predicted_error_by_projection={str(name): loss for name, loss in plan.losses.items()} if predicts else None,
        measured_error=None if errors is None else sum(errors.values()),
        measured_error_by_projection=errors,
        output_error=output_error,
        planned_output_error=planned_output_error,
        solver_gap=allocation.gap,
        tokens_per_expert=TokenRange(min=int(counts.min()), max=int(counts.max())),
        extreme_experts=extreme,
        unseen_experts=(counts == 0).nonzero()[:, 0].tolist(),
        mean_bits_by_expert={
            name: [round(v, 4) for v in bits.float().mean(1).tolist()] for name, bits in plan.bits.items()
        },
        weights_by_width={
            name: width_histogram(table.schema, name, bits, config.block_size) for name, bits in plan.bits.items()
        },
        compensator_ranks=None if plan.ranks is None else plan.ranks.tolist(),
    )


def model_report(
    reports: list[LayerReport],
    layers: dict[str, Layer],
    config: QuantizeConfig,
    record: dict[str, object],
    windows: Tensor,
    sanity: SanityVerdict | None,
    model_budget: ModelBudget | None,
    model_tuning: ModelTuning | None,
    dense_layers: LinearLayersReport | None,
    forecast: Forecast | None,
) -> ModelReport:
    """The report of a whole run.

    Args:
        reports: one for each layer.
        layers: their schemas, by tensor prefix.
        config: options.
        record: options as the checkpoint keeps them.
        windows: calibration tokens [n, L].
        sanity: None where nothing was quantized.
        model_budget: None where every layer has a budget of its own.
        model_tuning: None where the whole model was not tuned.
        dense_layers: see `linear_layers_report`.
        forecast: None but after `--plan`, or with bits picked for a divergence.
    """
    weights = sum(layer.num_weights for layer in layers.values())
    size = sum(layer.nbytes(config.block_size) for layer in layers.values())
    return ModelReport(
        bpw=8 * size / weights,
        expert_weights=weights,
        expert_bytes=size,
        calibration_tokens=windows.numel(),
        options=record,
        sanity=sanity,
        model_budget=model_budget,
        model_tuning=model_tuning,
        layers=reports,
        dense_layers=dense_layers,
        forecast=forecast,
    )


def linear_layers_report(dense: DenseConfig | None, specs: Mapping[str, TensorSpec]) -> LinearLayersReport | None:
    """Figures of the quantized linear layers outside the experts; None where there are none.

    Args:
        dense: how they are stored.
        specs: with the shape of each as `{module}.weight`.
    """
    if dense is None:
        return None
    size = dense_size(dense, specs)
    return LinearLayersReport(
        bits=sorted({form.num_bits for form in dense.matrices.values()}),
        matrices=len(dense.matrices),
        weights=size.weights,
        bytes=size.nbytes,
        bits_per_weight=size.bits_per_weight,
    )
