"""Calibration tokens of a run."""

from collections.abc import Callable

import torch
from torch import Tensor

from offline_quant.calibration.windows import WRITTEN_BY_MODEL, CalibrationText, read_windows, sample_windows
from offline_quant.config import SELF, QuantizeConfig
from offline_quant.model.streaming import StreamedModel
from offline_quant.pipeline.preflight import RunInputs, open_calibration
from offline_quant.pipeline.resume import RunState
from offline_quant.pipeline.stopwatch import Stopwatch
from offline_quant.runtime.progress import track

CALIBRATION, SHARED = "calibration.json", "shared.json"


def calibration_windows(
    inputs: RunInputs,
    config: QuantizeConfig,
    length: int,
    state: RunState,
    clock: "Stopwatch",
    unforeseen: Callable[[], None],
) -> tuple[Tensor, CalibrationText]:
    """Calibration tokens and where they came from; those of an earlier run if it was. The weights are then checked.

    Text is read first: its faults show sooner than those of the weights.
    """
    if (windows := state.windows) is not None and (earlier := state.kept(CALIBRATION)) is not None:
        return windows, CalibrationText(**earlier)
    torch.manual_seed(config.seed)
    text = inputs.text or open_calibration(config)
    found = read_windows(inputs.tokenizer, text, config.calib, config.calib_samples, length, config.seed)
    clock.lap("calibration text")
    if found is not None:
        inputs.original.check_ids(found[0])
    elif config.calib != SELF:
        unforeseen()
    inputs.source.check_finite(track)
    clock.lap("check")
    if found is None:
        model = StreamedModel(inputs.source, config.device)
        found = sample_windows(model, inputs.tokenizer, config.calib_samples, length, config.seed), WRITTEN_BY_MODEL
    windows, used = found
    state.keep(CALIBRATION, used._asdict())
    state.keep_windows(windows)
    clock.lap("calibration text")
    return windows, used
