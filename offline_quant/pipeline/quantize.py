"""`bitsmoe quantize` from options to checkpoint: check everything, calibrate, then layer by layer plan and quantize."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from bitsmoe_kernels.errors import Faults
from bitsmoe_kernels.format.safetensors_io import read_json
from offline_quant import VERSION
from offline_quant.allocation.objectives import OBJECTIVES, may_share_bases
from offline_quant.calibration.windows import reading_bytes, window_length
from offline_quant.checkpoint.directory import PAGE_FILE, REPORT_FILE, check_space
from offline_quant.config import HUB, SELF, QuantizeConfig
from offline_quant.pipeline.calibrate import calibration_windows
from offline_quant.pipeline.layer_loop import LayerLoop, batch_windows
from offline_quant.pipeline.memory import MemoryEstimate, check_memory, estimate_memory
from offline_quant.pipeline.preflight import check_inputs
from offline_quant.pipeline.resume import (
    RESULT,
    file_hash,
    fingerprint,
    has_windows,
    held_bytes,
    is_complete,
    run_state,
)
from offline_quant.pipeline.stopwatch import Stopwatch
from offline_quant.report.collect import linear_layers_report, model_report
from offline_quant.report.model_card import write_card
from offline_quant.report.page import write_page
from offline_quant.report.schema import ModelReport
from offline_quant.runtime.chunks import matrix_bytes
from offline_quant.runtime.distributed import Workers
from offline_quant.runtime.progress import console


@dataclass
class QuantizationResult:
    """What a run made.

    Attributes:
        report: content of `bitsmoe_report.json`.
        seconds: wall time by stage.
        cpu_seconds: the same on all processors.
        peak_bytes: largest resident memory of the process by the end of each stage.
        memory: what was predicted.
    """

    report: ModelReport
    memory: MemoryEstimate
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)


def quantize_model(
    model: str,
    out: Path,
    config: QuantizeConfig,
    plan_only: bool = False,
    resume: bool = False,
    workers: Workers | None = None,
    max_memory: int | None = None,
    revision: str | None = None,
) -> QuantizationResult | None:
    """Quantize a model's routed experts.

    Args:
        model: directory or Hub name.
        out: directory to write; with plan_only it receives the report alone.
        config: options.
        plan_only: stop after the allocation.
        resume: go on after the last finished layer of an earlier run of the same options, if there was one.
        workers: processes that share the work; all of them call this, and `out` is a place they all see.
        max_memory: most resident bytes of a process, as predicted; None: no limit.
        revision: branch, tag or commit of a Hub name; None: the main branch.

    Returns:
        The report and the time of each stage; None in every process of `workers` but the first.

    Raises:
        BitsmoeError: any fault of the input; nothing is left behind, or layers that `resume` goes on with.
    """
    workers = workers or Workers()
    if config.device == "cuda" and workers.size > 1:
        config = config.model_copy(update={"device": f"cuda:{workers.local_rank}"})
    leaving = resume and is_complete(out)
    # A run that has its tokens already goes on without the network.
    known = str(config.calib).startswith(HUB) and (leaving or (resume and has_windows(out)))
    inputs = check_inputs(model, revision, out, config, workers, leaving, known)
    source, dense = inputs.source, inputs.dense
    matrix = matrix_bytes(source.shape.hidden_size, source.shape.intermediate_size)
    clock = Stopwatch(matrix)
    length = window_length(source.config, config.calib_length)
    tokens = config.calib_samples * length
    batch_tokens = length * min(config.calib_samples, batch_windows(length, source.shape.hidden_size))
    scope = config.budget or OBJECTIVES[config.objective].scope

    def predicted(sampled: bool) -> MemoryEstimate:
        return estimate_memory(
            source.shape, source.tensors.specs, source.config, config.bits, tokens, batch_tokens, length,
            inputs.baseline, config.tune, may_share_bases(source.shape, config),
            scope == "model" and OBJECTIVES[config.objective].sensitive, sampled, torch.device(config.device),
            0 if config.calib == SELF else reading_bytes(inputs.text, tokens),
        )  # fmt: skip

    memory = predicted(config.calib == "self")
    if workers.rank == 0:
        console.print(
            f"Memory: about {memory.peak / 1e9:.1f} GB a process, {memory.calibration_state / 1e9:.2f} GB of it for "
            f"calibration text; disk: {memory.disk / 1e9:.1f} GB or more while it runs"
        )
    faults = Faults()
    with faults.gathered():
        check_memory(memory, max_memory)

    def unforeseen() -> None:
        """The default dataset cannot be reached, and the model is to write text itself."""
        needed = predicted(sampled=True)
        check_memory(needed, max_memory)
        console.print(f"Memory: about {needed.peak / 1e9:.1f} GB, for the whole model writes it")

    if workers.rank == 0 and not leaving:
        with faults.gathered():
            check_space(out, memory.result * (not plan_only) + memory.disk - held_bytes(out))
    faults.raise_all()
    started = {
        **config.record(),
        "plan": plan_only,
        "model": fingerprint(source.directory),
        "bitsmoe": VERSION,
        "calibration text": file_hash(Path(config.calib)) if config.calib and Path(config.calib).is_file() else None,
    }
    with run_state(out, started, resume, workers) as state:
        if state.concluded:
            if workers.rank:
                return None
            return QuantizationResult(ModelReport.model_validate(read_json(out / REPORT_FILE)), memory)
        windows, used = workers.broadcast_from_first(
            lambda: calibration_windows(inputs, config, length, state, clock, unforeseen)
        )
        record = {**config.record(), "calib": used.recorded}
        run = LayerLoop(source, inputs.original, inputs.streamed, windows, config, state, workers, clock, plan_only)
        if scope == "model":
            run.share_budget()
        layers = run.layers()
        if workers.rank:
            return None
        linear_layers = linear_layers_report(dense, source.tensors.specs)
        report = model_report(
            run.reports, layers, config, record, windows, run.sanity_check(), run.shared, linear_layers
        )
        result = state.directory / RESULT
        result.mkdir()
        if not plan_only:
            run.finish(result, layers, record, dense)
            write_card(result, model, source.directory, report, used)
        (result / REPORT_FILE).write_text(report.to_json(indent=1) + "\n", encoding="utf-8")
        clock.lap("write")
        write_page(result / PAGE_FILE, report, run.pictures, clock.laps, clock.peaks)
        clock.lap("report page")
        state.publish()
    return QuantizationResult(report, memory, clock.laps, clock.cpu, clock.peaks)
