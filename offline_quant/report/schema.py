"""The data of all reports. Fields are in the order of the files, and no field holds a time or a path."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from bitsmoe_kernels.sharding import ParallelSizes
from offline_quant.evaluation.forecast import Forecast
from offline_quant.evaluation.sanity import SanityVerdict


class Report(BaseModel):
    """Base of all reports: a frozen record that knows its JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self, indent: int | None = None) -> str:
        """This report as JSON text, keys in the order of the fields."""
        # Not `model_dump_json`: it writes infinity as null, and some floats with other digits.
        return json.dumps(self.model_dump(), indent=indent)


class TokenRange(Report):
    """Fewest and most calibration tokens that were routed to one expert of a layer."""

    min: int
    max: int


class LayerReport(Report):
    """One quantized or planned MoE layer. Errors are squared errors over the energy of the original output.

    Attributes:
        layer: tensor prefix of its experts.
        basis: decomposition form.
        basis_rank: components that a shared basis keeps, by projection; empty without a basis.
        bpw: all-in bits per weight.
        predicted_error: sum over the projections; of objectives that do not predict their errors, what was minimized.
        predicted_error_by_projection: None for objectives that do not predict an error of a projection.
        measured_error: sum over the projections; None after `--plan`, as are the next two.
        measured_error_by_projection: on the calibration text.
        output_error: error of the routed experts' output.
        planned_output_error: the same as the plan predicts it; None for objectives that do not predict errors.
        solver_gap: proven relative distance from the optimum.
        tokens_per_expert: calibration tokens.
        extreme_experts: experts whose outputs are far larger than those of the others.
        unseen_experts: experts without a calibration token.
        mean_bits_by_expert: mean bit-width of an expert's blocks, by projection.
        weights_by_width: factor entries at each bit-width, by projection.
        compensator_ranks: rank for each expert; None without compensators.
    """

    layer: str
    basis: str
    basis_rank: dict[str, int]
    bpw: float
    predicted_error: float
    predicted_error_by_projection: dict[str, float] | None
    measured_error: float | None
    measured_error_by_projection: dict[str, float] | None
    output_error: float | None
    planned_output_error: float | None = None
    solver_gap: float
    tokens_per_expert: TokenRange
    extreme_experts: list[int]
    unseen_experts: list[int]
    mean_bits_by_expert: dict[str, list[float]]
    weights_by_width: dict[str, dict[str, int]]
    compensator_ranks: list[int] | None

    def basis_ranks(self) -> str:
        """Ranks of the shared bases as text, such as `48, 40`; empty without one."""
        return ", ".join(map(str, self.basis_rank.values()))


class ModelBudget(Report):
    """One budget for the whole model, and how the layers share it.

    Attributes:
        solver_gap: proven relative distance from the optimum.
        sensitivity: KL to the original in nats per token for a unit of a layer's loss, by tensor prefix; measured in a
            trial of each layer alone, and empty where there was none.
        bits_per_weight: each layer's budget, by tensor prefix.
    """

    solver_gap: float
    sensitivity: dict[str, float]
    bits_per_weight: dict[str, float]


class ModelTuning(Report):
    """How the whole model was tuned: divergence from the original on calibration text, nats per token.

    Its `str` is a sentence for people.

    Attributes:
        kl_before: of the quantized model as its layers left it.
        kl_after: with tuned scales.
        kept: whether the tuned scales are those of the result.
    """

    kl_before: float
    kl_after: float
    kept: bool

    def __str__(self) -> str:
        change = f"divergence from the original {self.kl_before:.4g} -> {self.kl_after:.4g} on calibration text"
        return f"tuned as a whole: {change}" + ("" if self.kept else ", so the scales of before were kept")


class LinearLayersReport(Report):
    """Quantized linear layers outside the routed experts. Its `str` is a sentence for people.

    Attributes:
        bits: code widths in use, ascending.
        matrices: number of quantized matrices.
        weights: their weights.
        bytes: their stored size, with scales.
        bits_per_weight: with scales.
    """

    bits: list[int]
    matrices: int
    weights: int
    bytes: int
    bits_per_weight: float

    def __str__(self) -> str:
        bits = " and ".join(map(str, self.bits))
        return (
            f"linear layers outside the experts at {bits} bits: {self.bytes / 1e6:.2f} MB, "
            f"{self.bits_per_weight:.4f} bits per weight with scales"
        )


class ModelReport(Report):
    """A whole run of `bitsmoe quantize`: the content of `bitsmoe_report.json`.

    Attributes:
        bpw: all-in bits per weight of the routed experts.
        expert_weights: weights of all routed experts.
        expert_bytes: their stored size.
        calibration_tokens: tokens of calibration text.
        options: options as the checkpoint records them.
        sanity: None after `--plan`.
        model_budget: None where every layer has a budget of its own.
        model_tuning: None without `--tune-model` or `--tune-codes`.
        layers: MoE layers in the model's order.
        dense_layers: None where the other linear layers are not quantized.
        forecast: the quality to expect; None but after `--plan` with an objective that predicts errors, or with bits
            picked for a divergence.
    """

    bpw: float
    expert_weights: int
    expert_bytes: int
    calibration_tokens: int
    options: dict[str, Any]
    sanity: SanityVerdict | None
    model_budget: ModelBudget | None
    model_tuning: ModelTuning | None = None
    layers: list[LayerReport]
    dense_layers: LinearLayersReport | None
    forecast: Forecast | None = None

    @property
    def aims_at_original(self) -> bool:
        """Whether layers were fitted, or anything was tuned, to what the original model makes of the text."""
        tuned = any(self.options.get(name) for name in ("tune", "tune_model", "tune_codes"))
        return tuned or self.options.get("fit") == "layer"

    def expectation(self) -> list[str]:
        """The bits that were picked and the quality to expect, as sentences; empty without a forecast."""
        if self.forecast is None:
            return []
        lines, options = [str(self.forecast)], self.options
        if (target := options.get("target_kl")) is not None:
            lines.insert(0, f"Picked for --target-kl {target:g}: --bits {options['bits']:g}")
        if self.aims_at_original:
            lines.append("The forecast is for runs without --fit layer and tuning, which do better")
        return lines


class ProjectionInspection(Report):
    """One projection of a stored layer.

    Attributes:
        bpw: all-in bits per weight.
        basis: bits and rank of the shared basis as text; None without one.
        bytes: stored bytes by part, see the format's specification.
        code_bits_by_expert: bits of an expert's codes over its weights.
        weights_by_width: factor entries at each bit-width.
        basis_rank: components that the shared basis keeps; no part of the JSON.
    """

    bpw: float
    basis: str | None
    bytes: dict[str, int]
    code_bits_by_expert: list[float]
    weights_by_width: dict[str, int]
    basis_rank: int | None = Field(default=None, exclude=True)


class LayerInspection(Report):
    """One MoE layer of a checkpoint.

    Attributes:
        layer: tensor prefix of its experts.
        bpw: all-in bits per weight.
        num_experts, hidden_size, intermediate_size: its shape.
        projections: by name.
    """

    layer: str
    bpw: float
    num_experts: int
    hidden_size: int
    intermediate_size: int
    projections: dict[str, ProjectionInspection]


class Inspection(Report):
    """Where the bits of a checkpoint went: the content of `bitsmoe inspect --json`.

    Attributes:
        format_version: of the checkpoint format.
        bpw: all-in bits per weight of the routed experts.
        expert_weights: weights of all routed experts.
        expert_bytes: their stored size.
        dense_layers: None where the other linear layers are not quantized.
        other_bytes: size of all tensors that are not quantized.
        weights_by_width: stored factor entries at each bit-width, ascending.
        options: options the checkpoint was made with.
        tool_version: version of bitsmoe-vllm that wrote it.
        parallel_sizes: sizes of vLLM's parallelism that can serve it.
        layers: MoE layers in the model's order.
    """

    format_version: int
    bpw: float
    expert_weights: int
    expert_bytes: int
    dense_layers: LinearLayersReport | None
    other_bytes: int
    weights_by_width: dict[str, int]
    options: dict[str, Any]
    tool_version: str
    parallel_sizes: ParallelSizes
    layers: list[LayerInspection]


@dataclass(frozen=True)
class LayerPicture:
    """Arrays of one layer that the report page draws; too large for `bitsmoe_report.json`.

    Attributes:
        bits: uint8 [E, B] by projection.
        spectrum: float32 [C] by projection: what dropping a component would cost, as a share of the cost of all; mean
            over experts, in stored order.
        share: float32 [E], fraction of the routed tokens that went to each expert.
    """

    bits: dict[str, NDArray[np.uint8]]
    spectrum: dict[str, NDArray[np.float32]]
    share: NDArray[np.float32]

    def dump(self) -> dict[str, Any]:
        """This picture as JSON data."""
        return {
            "bits": {name: bits.tolist() for name, bits in self.bits.items()},
            "spectrum": {name: values.tolist() for name, values in self.spectrum.items()},
            "share": self.share.tolist(),
        }

    @classmethod
    def restored(cls, data: dict[str, Any]) -> "LayerPicture":
        """The picture that `dump` wrote."""
        return cls(
            {name: np.array(bits, np.uint8) for name, bits in data["bits"].items()},
            {name: np.array(values, np.float32) for name, values in data["spectrum"].items()},
            np.array(data["share"], np.float32),
        )
