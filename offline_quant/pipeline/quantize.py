"""`bitsmoe quantize` from options to checkpoint: the order of its steps."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitsmoe_kernels.format.safetensors_io import read_json
from offline_quant import VERSION
from offline_quant.allocation.objectives import budget_scope
from offline_quant.checkpoint.directory import PAGE_FILE, REPORT_FILE
from offline_quant.checkpoint.writer import write_checkpoint
from offline_quant.config import QuantizeConfig
from offline_quant.model.fingerprint import fingerprint
from offline_quant.pipeline.calibrate import calibration_windows
from offline_quant.pipeline.context import start_run
from offline_quant.pipeline.layer_loop import expected_quality, quantize_layers, sanity_check
from offline_quant.pipeline.memory import MemoryEstimate
from offline_quant.pipeline.model_budget import share_budget
from offline_quant.pipeline.model_tuning import tune_whole_model
from offline_quant.pipeline.preflight import RunInputs, check_inputs, check_resources, run_sizes
from offline_quant.pipeline.resume import RESULT, EarlierRun, run_state
from offline_quant.pipeline.stopwatch import Stopwatch
from offline_quant.pipeline.target_kl import pick_bits
from offline_quant.pipeline.token_weights import weigh_tokens
from offline_quant.pipeline.tuning_time import foretell_tuning
from offline_quant.report.collect import linear_layers_report, model_report
from offline_quant.report.model_card import write_card
from offline_quant.report.page import write_page
from offline_quant.report.schema import ModelReport
from offline_quant.runtime.chunks import matrix_bytes
from offline_quant.runtime.distributed import Workers


@dataclass
class QuantizationResult:
    """The result of a run.

    Attributes:
        report: content of `bitsmoe_report.json`.
        seconds: wall time by stage.
        cpu_seconds: processor time of all threads by stage.
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
    earlier = EarlierRun.of(out, resume)
    inputs = check_inputs(model, revision, out, config, workers, earlier)
    source, dense = inputs.source, inputs.dense
    clock = Stopwatch(matrix_bytes(source.shape.hidden_size, source.shape.intermediate_size))
    sizes = run_sizes(inputs, config)
    memory = check_resources(inputs, sizes, config, out, workers, earlier, plan_only, max_memory)
    with run_state(out, _started(inputs, config, plan_only), resume, workers) as state:
        if state.concluded:
            if workers.rank:
                return None
            return QuantizationResult(ModelReport.model_validate(read_json(out / REPORT_FILE)), memory)
        calibration = workers.broadcast_from_first(
            lambda: calibration_windows(inputs, config, sizes, max_memory, state, clock)
        )
        run = start_run(inputs, config, calibration.tokens, state, workers, clock, plan_only)
        foretell_tuning(run, sizes)
        if config.token_weights == "model":
            run = weigh_tokens(run)
        picked = None
        if config.target_kl is not None:
            picked = pick_bits(run, config.target_kl)
            run = run.with_bits(picked.bits)
            config = run.config
            sizes = run_sizes(inputs, config)
            memory = check_resources(inputs, sizes, config, out, workers, earlier, plan_only, max_memory)
        budget = share_budget(run) if budget_scope(config) == "model" else None
        layers = quantize_layers(run, budget)
        if workers.rank:
            return None
        tuning = tune_whole_model(run, layers.schemas) if config.tunes_model and not plan_only else None
        options = {**config.record(), "calib": calibration.text.recorded}
        report = model_report(
            layers.reports, layers.schemas, config, options, calibration.tokens, sanity_check(run, layers),
            budget.report if budget else None, tuning, linear_layers_report(dense, source.tensors.specs),
            expected_quality(run, layers, picked),
        )  # fmt: skip
        result = state.directory / RESULT
        result.mkdir()
        if not plan_only:
            experts = (tensor for index in range(run.num_layers) for tensor in state.layer_tensors(index))
            write_checkpoint(result, source, experts, layers.schemas, config.block_size, options, dense)
            write_card(result, model, source.directory, report, calibration.text)
        (result / REPORT_FILE).write_text(report.to_json(indent=1) + "\n", encoding="utf-8")
        clock.lap("write")
        figures = clock.figures
        write_page(result / PAGE_FILE, report, layers.pictures, figures.laps, figures.peaks)
        clock.lap("report page")
        state.publish()
    return QuantizationResult(report, memory, figures.laps, figures.cpu, figures.peaks)


def _started(inputs: RunInputs, config: QuantizeConfig, plan_only: bool) -> dict[str, Any]:
    """Options and inputs of a run. A run that resumes it must have the same."""
    return {
        **config.record(),
        "plan": plan_only,
        "model": fingerprint(inputs.source.directory),
        "bitsmoe": VERSION,
        "calibration text": inputs.calibration.fingerprint(),
    }
