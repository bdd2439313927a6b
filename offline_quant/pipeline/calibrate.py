"""Calibration tokens of a run."""

import torch

from offline_quant.calibration.sources.base import CalibrationWindows
from offline_quant.calibration.sources.self_written import WRITTEN_BY_MODEL, sample_windows, sampling_bytes
from offline_quant.config import QuantizeConfig
from offline_quant.model.sizes import RunSizes
from offline_quant.model.streaming import StreamedModel
from offline_quant.pipeline.memory import check_memory, estimate_run
from offline_quant.pipeline.preflight import RunInputs
from offline_quant.pipeline.resume import RunState
from offline_quant.pipeline.stopwatch import Stopwatch
from offline_quant.runtime.progress import console, track


def calibration_windows(
    inputs: RunInputs,
    config: QuantizeConfig,
    sizes: RunSizes,
    max_memory: int | None,
    state: RunState,
    clock: Stopwatch,
) -> CalibrationWindows:
    """Calibration tokens: those of an earlier run, or new ones. Before new ones are returned, all weights are checked.

    Text is read before the weights: its faults show sooner.

    Args:
        inputs: what was checked.
        config: options.
        sizes: of the run.
        max_memory: most resident bytes of a process; None: no limit.
        state: of the run; keeps the tokens.
        clock: of the run.

    Raises:
        BitsmoeError: text or weights that cannot be used, or the model must write text and may not take the memory.
    """
    if (earlier := state.windows) is not None:
        return earlier
    torch.manual_seed(config.seed)
    found = inputs.calibration.windows(inputs.tokenizer, sizes.length)
    clock.lap("calibration text")
    if found is not None:
        inputs.original.check_ids(found.tokens)
    elif not inputs.calibration.written_by_model:
        _check_unforeseen_writing(inputs, config, sizes, max_memory)
    inputs.source.check_finite(track)
    clock.lap("check")
    if found is None:
        model = StreamedModel(inputs.source, config.device)
        tokens = sample_windows(model, inputs.tokenizer, config.calib_samples, sizes.length, config.seed)
        found = CalibrationWindows(tokens, WRITTEN_BY_MODEL)
    state.keep_windows(found)
    clock.lap("calibration text")
    return found


def _check_unforeseen_writing(
    inputs: RunInputs, config: QuantizeConfig, sizes: RunSizes, max_memory: int | None
) -> None:
    """Refuse if the model, which must write text although another source was chosen, would take too much memory."""
    text = max(inputs.calibration.memory_bytes(sizes), sampling_bytes(sizes))
    memory = estimate_run(sizes, config, inputs.baseline, text)
    check_memory(memory, max_memory)
    console.print(f"Memory: about {memory.peak / 1e9:.1f} GB, for the whole model writes it")
