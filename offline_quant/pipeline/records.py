"""Results of a run's steps as they are kept on disk, for a run that resumes. Their JSON is part of `STATE_VERSION`."""

from dataclasses import asdict, dataclass
from typing import Any

from bitsmoe_kernels.format.schema import Layer
from offline_quant.evaluation.forecast import Forecast
from offline_quant.pipeline.stopwatch import StageFigures
from offline_quant.report.schema import LayerPicture, LayerReport, ModelBudget


@dataclass(frozen=True)
class MoELayerRecord:
    """The result of a layer with routed experts, but for its tensors.

    Attributes:
        schema: of the layer as stored.
        report: what the run reports of it.
        picture: what the report page draws.
    """

    schema: Layer
    report: LayerReport
    picture: LayerPicture


@dataclass(frozen=True)
class LayerRecord:
    """A finished decoder layer, but for its tensors.

    Attributes:
        figures: time and memory of the run up to it.
        moe: its result; None for a layer without routed experts.
    """

    figures: StageFigures
    moe: MoELayerRecord | None = None

    def dump(self) -> dict[str, Any]:
        """The record as JSON data."""
        data: dict[str, Any] = {}
        if self.moe:
            data = {
                "schema": self.moe.schema.model_dump(mode="json"),
                "report": self.moe.report.model_dump(),
                "picture": self.moe.picture.dump(),
            }
        return {**data, "clock": asdict(self.figures)}

    @classmethod
    def load(cls, data: dict[str, Any]) -> "LayerRecord":
        """The record that `dump` wrote."""
        moe = None
        if "schema" in data:
            schema, picture = Layer.model_validate(data["schema"]), LayerPicture.restored(data["picture"])
            moe = MoELayerRecord(schema, LayerReport.model_validate(data["report"]), picture)
        return cls(StageFigures(**data["clock"]), moe)


@dataclass(frozen=True)
class PickedBits:
    """Bits that were picked for `--target-kl`.

    Attributes:
        bits: all-in bits per weight.
        forecast: of the plan they were picked by.
    """

    bits: float
    forecast: Forecast

    def dump(self) -> dict[str, Any]:
        """The bits as JSON data."""
        return {"bits": self.bits, "forecast": self.forecast.model_dump()}

    @classmethod
    def load(cls, data: dict[str, Any]) -> "PickedBits":
        """The bits that `dump` wrote."""
        return cls(data["bits"], Forecast.model_validate(data["forecast"]))


@dataclass(frozen=True)
class DividedBudget:
    """One budget for the whole model, divided among its layers.

    Attributes:
        bits: all-in bits of every layer, by tensor prefix.
        report: what the run reports of the division.
    """

    bits: dict[str, int]
    report: ModelBudget

    def dump(self) -> dict[str, Any]:
        """The budget as JSON data."""
        return {"budgets": self.bits, "shared": self.report.model_dump()}

    @classmethod
    def load(cls, data: dict[str, Any]) -> "DividedBudget":
        """The budget that `dump` wrote."""
        return cls(data["budgets"], ModelBudget.model_validate(data["shared"]))
