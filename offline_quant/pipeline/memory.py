"""Memory and disk of a run, estimated before it starts. Every stage states its own; the peak is their maximum."""

import re
from dataclasses import dataclass

from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.allocation.objectives import budget_scope, may_share_bases, measures_layers
from offline_quant.calibration.token_gradients import gradient_bytes
from offline_quant.checkpoint.writer import result_bytes, writing_bytes
from offline_quant.config import QuantizeConfig
from offline_quant.evaluation.forecast import forecast_bytes
from offline_quant.evaluation.sanity import judged_tokens, judging_bytes
from offline_quant.layer.memory import kept_bytes, layer_bytes, offload_disk_bytes
from offline_quant.model.expert_inputs import expert_input_bytes
from offline_quant.model.sizes import RunSizes
from offline_quant.model.source import checking_bytes
from offline_quant.model.streaming import forward_bytes
from offline_quant.pipeline.hidden_states import hidden_disk_bytes
from offline_quant.pipeline.trials import trials_bytes
from offline_quant.rounding.model_tuning import tuning_bytes

LATER = 80 << 20
"""Bytes of libraries that are loaded when they are needed: the solver, the plots."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory and disk that a run takes, in bytes.

    Attributes:
        peak: largest resident memory of one process.
        calibration_state: the part of it that the calibration set takes while a layer is quantized: inputs of its
            experts and their routing.
        hidden: on disk, of hidden states.
        disk: of these, and of what is kept between passes over a layer's experts.
        layers: on disk, of all finished layers.
        result: of all tensors of the result, about.
    """

    peak: int
    calibration_state: int
    hidden: int
    disk: int
    layers: int
    result: int

    @property
    def most_disk(self) -> int:
        """Bytes on disk at most: finished layers, and hidden states of the last one, stay until the result is whole."""
        return self.layers + max(self.disk, self.hidden // 2 + self.result)


def estimate_memory(
    sizes: RunSizes,
    baseline: int,
    text: int = 0,
    fit_layer: bool = False,
    tune: bool = False,
    bases: bool = True,
    weighed: bool = False,
    tune_model: bool = False,
    tune_codes: bool = False,
    examined: bool = False,
    tried: bool = False,
) -> MemoryEstimate:
    """Estimate what a run takes.

    Args:
        sizes: of the run.
        baseline: resident bytes of the process before the run.
        text: bytes that getting the calibration text takes, see `CalibrationSource.memory_bytes`.
        fit_layer: whether the experts of a layer are fitted together.
        tune: whether scales and codes are tuned.
        bases: whether a decomposition with shared bases may be chosen.
        weighed: whether tokens are weighed, with gradients.
        tune_model: whether the whole model is tuned.
        tune_codes: whether its codes are tuned as well.
        examined: whether all layers are looked at before bits are decided.
        tried: whether they are quantized then, for trial.
    """
    original_tokens = sizes.tokens if fit_layer or tune_model else judged_tokens(sizes.tokens)
    hidden = hidden_disk_bytes(sizes, original_tokens, examined)
    stages = (
        text,
        checking_bytes(sizes),
        gradient_bytes(sizes) if weighed else 0,
        # The original model runs while a layer is calibrated.
        kept_bytes(sizes) + forward_bytes(sizes, original_tokens),
        layer_bytes(sizes, fit_layer, tune, bases) + (trials_bytes(sizes) if tried else 0),
        tuning_bytes(sizes, tune_codes) if tune_model else 0,
        judging_bytes(sizes),
        forecast_bytes(sizes),
        writing_bytes(sizes),
    )
    return MemoryEstimate(
        peak=baseline + LATER + max(stages),
        calibration_state=expert_input_bytes(sizes),
        hidden=hidden,
        disk=hidden + offload_disk_bytes(sizes, fit_layer),
        layers=(2 if tune_codes else 1) * sizes.all_coded_bytes,
        result=result_bytes(sizes),
    )


def estimate_run(sizes: RunSizes, config: QuantizeConfig, baseline: int, text: int) -> MemoryEstimate:
    """`estimate_memory` of a run with some options."""
    return estimate_memory(
        sizes, baseline, text, config.fits_layer, config.tune, may_share_bases(config),
        config.token_weights == "model", config.tunes_model, config.tune_codes,
        config.target_kl is not None or budget_scope(config) == "model", measures_layers(config),
    )  # fmt: skip


def check_memory(found: MemoryEstimate, limit: int | None) -> None:
    """Refuse a run that would take more memory than is allowed.

    Raises:
        BitsmoeError: names both figures and what to do.
    """
    if limit is not None and found.peak > limit:
        raise BitsmoeError(
            f"--max-memory {limit / 1e9:.2f} GB: this run would take about {found.peak / 1e9:.2f} GB, "
            f"{found.calibration_state / 1e9:.2f} GB of it for calibration text; allow more, or give less of it "
            "(--calib-samples, --calib-length)"
        )


def parse_bytes(text: str) -> int:
    """Bytes from a number with a unit: 24GB, 24 GiB, 800MB.

    Raises:
        BitsmoeError: not of this form.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise BitsmoeError(f"--max-memory {text!r}: must be a size such as 24GB or 900MB")
    step = 1024 if match[3] else 1000
    return int(float(match[1]) * step ** (" KMGT".index(match[2].upper() or " ")))
