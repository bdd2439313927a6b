"""What a run decided and what came of it, as data: written beside the checkpoint, free of times and paths."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitsmoe_kernels.format.schema import Layer, ProjectionName
from offline_quant.allocation.objectives import OBJECTIVES
from offline_quant.calibration.moments import LayerMoments
from offline_quant.config import QuantizeConfig
from offline_quant.layer.plan import LayerPlan


@dataclass(frozen=True)
class LayerPicture:
    """What the report page draws of one layer; too large for report.json.

    Attributes:
        bits: uint8 [E, B] by projection.
        spectrum: float32 [C] by projection: a component's share of the error if all were dropped, mean over experts,
            in stored order.
        share: float32 [E], share of expert slots that went to each expert.
    """

    bits: dict[str, NDArray[np.uint8]]
    spectrum: dict[str, NDArray[np.float32]]
    share: NDArray[np.float32]

    def dump(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "bits": {name: bits.tolist() for name, bits in self.bits.items()},
            "spectrum": {name: values.tolist() for name, values in self.spectrum.items()},
            "share": self.share.tolist(),
        }

    @classmethod
    def restored(cls, data: dict[str, Any]) -> "LayerPicture":
        """From what `dump` gave."""
        return cls(
            {name: np.array(bits, np.uint8) for name, bits in data["bits"].items()},
            {name: np.array(values, np.float32) for name, values in data["spectrum"].items()},
            np.array(data["share"], np.float32),
        )


def layer_picture(plan: LayerPlan, stats: LayerMoments) -> LayerPicture:
    """Bits, spectra and activation shares of a planned layer."""
    spectrum = {}
    for name, projection in plan.projections.items():
        energy = projection.components.energy
        spectrum[str(name)] = (energy / energy.sum(1, keepdim=True).clamp(min=1e-30)).mean(0).float().cpu().numpy()
    counts = stats.counts.float()
    share = (counts / counts.sum().clamp(min=1)).cpu().numpy()
    return LayerPicture({str(k): v.numpy() for k, v in plan.bits.items()}, spectrum, share)


def width_histogram(layer: Layer, name: ProjectionName, bits: Tensor, block_size: int) -> dict[str, int]:
    """Factor entries of a projection at each bit-width, from its block bits [E, B]; kept experts are left out."""
    C, kept = layer.components(name), set(layer.projections[name].kept_experts)
    coded = bits[[e for e in range(layer.num_experts) if e not in kept]]
    size = torch.full((bits.shape[1],), block_size)
    size[-1] = C - (bits.shape[1] - 1) * block_size
    return {str(int(w)): int(((coded == w) * size).sum()) * layer.features(name) for w in coded.unique().tolist()}


def layer_report(
    prefix: str,
    plan: LayerPlan,
    stats: LayerMoments,
    config: QuantizeConfig,
    errors: dict[str, float] | None,
    output_error: float | None,
    extreme: list[int],
) -> dict[str, Any]:
    """One layer: form, predicted and measured relative error, solver gap, bits and routing."""
    layer, a = plan.layer, plan.allocation
    taken = plan.table.loss[np.arange(len(a.choice)), a.choice]
    by_block = OBJECTIVES[config.objective].unit == "block"
    predicted = {str(n): float(taken[unit].sum()) for n, unit in plan.table.unit_of.items()} if by_block else None
    return {
        "layer": prefix,
        "basis": plan.basis,
        "basis_rank": {name: p.basis.rank for name, p in layer.projections.items() if p.basis},
        "bpw": 8 * layer.nbytes(config.block_size) / layer.num_weights,
        "predicted_error": a.loss,
        "predicted_error_by_projection": predicted,
        "measured_error": None if errors is None else sum(errors.values()),
        "measured_error_by_projection": errors,
        "output_error": output_error,
        "solver_gap": a.gap,
        "tokens_per_expert": {"min": int(stats.counts.min()), "max": int(stats.counts.max())},
        "extreme_experts": extreme,
        "unseen_experts": (stats.counts == 0).nonzero()[:, 0].tolist(),
        "mean_bits_by_expert": {
            name: [round(v, 4) for v in bits.float().mean(1).tolist()] for name, bits in plan.bits.items()
        },
        "weights_by_width": {
            name: width_histogram(plan.table.schema, name, bits, config.block_size) for name, bits in plan.bits.items()
        },
        "compensator_ranks": None if plan.ranks is None else plan.ranks.tolist(),
    }


def basis_ranks(row: dict[str, Any]) -> str:
    """Ranks of a layer's shared bases for people, from its `layer_report`; empty without one."""
    return ", ".join(map(str, row["basis_rank"].values()))


def model_report(
    reports: list[dict[str, Any]],
    layers: dict[str, Layer],
    config: QuantizeConfig,
    record: dict[str, object],
    windows: Tensor,
    sanity: dict[str, Any] | None,
    shared: dict[str, Any] | None,
) -> dict[str, Any]:
    """The whole run: all-in bits per weight, options, calibration size and every layer's report.

    Args:
        reports: of the layers.
        layers: their schemas, by tensor prefix.
        config: options.
        record: options as the checkpoint keeps them.
        windows: calibration tokens.
        sanity: see `sanity.verdict`; None where nothing was quantized.
        shared: the program over the whole model: proven gap and sensitivities; None with a budget for each layer.
    """
    weights = sum(layer.num_weights for layer in layers.values())
    size = sum(layer.nbytes(config.block_size) for layer in layers.values())
    return {
        "bpw": 8 * size / weights,
        "expert_weights": weights,
        "expert_bytes": size,
        "calibration_tokens": windows.numel(),
        "options": record,
        "sanity": sanity,
        "model_budget": shared,
        "layers": reports,
    }
