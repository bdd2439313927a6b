"""`bitsmoe quantize` from options to checkpoint: check everything, calibrate, then layer by layer plan and quantize."""

import json
import resource
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.dense import DenseConfig
from bitsmoe_kernels.format.schema import FORMAT_VERSION, QUANT_METHOD, CheckpointConfig, Layer
from bitsmoe_kernels.format.shards import ShardWriter
from offline_quant import sanity
from offline_quant.allocation import allocate
from offline_quant.calibration import (
    NETWORK_ERRORS,
    calibration_windows,
    check_text_source,
    load_tokenizer,
    window_length,
)
from offline_quant.config import QuantizeConfig
from offline_quant.dense import DenseModel, dense_plan, dense_report, write_other_tensors
from offline_quant.layer import LayerQuantizer, budget_bits, forms_of, schema_of
from offline_quant.model_adapter import SourceModel
from offline_quant.objectives import OBJECTIVES
from offline_quant.output import (
    PAGE_FILE,
    REPORT_FILE,
    SIDE_FILES,
    check_output,
    check_space,
    copy_side_files,
    new_directory,
)
from offline_quant.progress import bar, track
from offline_quant.report import LayerPicture, layer_picture, layer_report, model_report
from offline_quant.report_page import write_page
from offline_quant.sensitivity import layer_sensitivities
from offline_quant.spectrum import tail_length
from offline_quant.statistics import LayerStatistics
from offline_quant.streaming import StreamedModel

BATCH_TOKENS = 16_384


@dataclass
class Outcome:
    """What a run made.

    Attributes:
        report: see `report.model_report`.
        seconds: wall time by stage.
        cpu_seconds: the same on all processors.
        peak_bytes: largest resident memory of the process by the end of each stage.
    """

    report: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)


def resolve_model(name: str) -> Path:
    """A local directory, or a Hub name downloaded into the local cache.

    Raises:
        BitsmoeError: neither.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BitsmoeError(f"{name}: is not a directory; give a model directory or a Hugging Face Hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    errors: tuple[type[Exception], ...] = (*NETWORK_ERRORS, HFValidationError, LocalEntryNotFoundError)
    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "*.safetensors*", *SIDE_FILES]))
    except errors as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise BitsmoeError(f"{name}: no such directory, and the Hub does not give it ({reason})") from None


def check_device(device: str) -> None:
    """Refuse a device torch does not have.

    Raises:
        BitsmoeError: names it.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise BitsmoeError(f"--device {device}: must be cpu, cuda or cuda:N")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise BitsmoeError(
            f"--device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA device(s); use one of "
            "those, or --device cpu"
        )


def check_budget(source: SourceModel, config: QuantizeConfig) -> None:
    """Refuse an impossible budget from the model's shape alone, before calibration.

    Raises:
        BitsmoeError: names the smallest possible budget.
    """
    schemas = [schema_of(form, source.shape, config) for form in forms_of(config)]
    least = min(schemas, key=lambda schema: schema.nbytes(config.block_size))
    budget_bits(least, config, str(source.directory))
    if config.objective == "alphaq":
        tail_length(min(source.shape.hidden_size, source.shape.intermediate_size))


def quantize_model(model: str, out: Path, config: QuantizeConfig, plan_only: bool = False) -> Outcome:
    """Quantize a model's routed experts.

    Args:
        model: directory or Hub name.
        out: directory to write; with plan_only it receives the report alone.
        config: options.
        plan_only: stop after the allocation.

    Returns:
        The report and the time of each stage.

    Raises:
        BitsmoeError: any fault of the input; nothing is left behind.
    """
    check_output(out)
    check_device(config.device)
    check_text_source(config.calib)
    source = SourceModel(resolve_model(model))
    check_budget(source, config)
    dense = dense_plan(source, config.dense_bits)
    if not plan_only:
        others = sum(t.nbytes for name, t in source.tensors.specs.items() if not source.shape.is_expert_tensor(name))
        check_space(out, others + int(min(config.bits, 8.5) * source.shape.num_weights / 8))
    tokenizer = load_tokenizer(source.directory)
    clock = _Clock()
    with new_directory(out) as scratch:
        source.check_finite(track)
        clock.lap("check")
        torch.manual_seed(config.seed)
        original = StreamedModel(source, config.device)
        length = window_length(source.config, config.calib_length)
        windows, used = calibration_windows(
            original, tokenizer, config.calib, config.calib_samples, length, config.seed
        )
        if used == "self":  # sampling leaves the whole model in memory
            original = StreamedModel(source, config.device)
        streamed = original if dense is None else StreamedModel(DenseModel(source, dense), config.device)
        clock.lap("calibration text")
        record = {**config.record(), "calib": used if used == "self" or used.startswith("hf:") else Path(used).name}
        run = _Run(source, original, streamed, windows, config, None if plan_only else ShardWriter(scratch), clock)
        if (config.budget or OBJECTIVES[config.objective].scope) == "model":
            run.share_budget()
        layers = run.layers()
        report = model_report(run.reports, layers, config, record, windows, run.judge(), run.shared)
        report |= dense_report(dense, source.tensors.specs)
        if not plan_only:
            run.finish(scratch, layers, record, dense)
        (scratch / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        clock.lap("write")
        write_page(scratch / PAGE_FILE, report, run.pictures, clock.laps, clock.peaks)
        clock.lap("report page")
    return Outcome(report, clock.laps, clock.cpu, clock.peaks)


class _Clock:
    """Wall time, processor time and peak memory by stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._last, self._last_cpu = time.monotonic(), time.process_time()

    def lap(self, name: str) -> None:
        now, cpu = time.monotonic(), time.process_time()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self.cpu[name] = self.cpu.get(name, 0.0) + cpu - self._last_cpu
        self.peaks[name] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._last, self._last_cpu = now, cpu


class _Run:
    """The layer loop: hidden states of the calibration text travel from layer to layer.

    A layer is calibrated on what the quantized layers before it give out, so that it can make up for their error. A
    few windows travel through the original layers too, to judge the result by.
    """

    def __init__(
        self,
        source: SourceModel,
        original: StreamedModel,
        streamed: StreamedModel,
        windows: Tensor,
        config: QuantizeConfig,
        writer: ShardWriter | None,
        clock: _Clock,
    ):
        self.source, self.streamed, self.config, self.writer, self.clock = source, streamed, config, writer, clock
        self.original = original
        self.windows = windows
        self.reports: list[dict[str, Any]] = []
        self.pictures: dict[str, LayerPicture] = {}
        self.shared: dict[str, Any] | None = None
        self.budgets: dict[str, int] = {}
        self.batches = streamed.embed_windows(windows, BATCH_TOKENS)
        self.judged = windows[: max(1, sanity.TOKENS // windows.shape[1])]
        self.originals = original.embed_windows(self.judged, BATCH_TOKENS)

    def share_budget(self) -> None:
        """Solve one program over all layers, on the original model's activations; leaves a budget for each layer."""
        shape, objective = self.source.shape, OBJECTIVES[self.config.objective]
        weight: dict[int, float] = {}
        if objective.sensitive:
            with bar("Measuring sensitivities", 2 * self.streamed.num_layers) as tick:
                weight = layer_sensitivities(self.streamed, self.windows, self.config.seed, tick)
            self.clock.lap("sensitivities")
        start, losses, costs, tables = self.batches, [], [], []
        with bar("Planning", self.streamed.num_layers) as tick:
            for index in range(self.streamed.num_layers):
                if index in shape.layers:
                    quantizer, _ = self._quantizer(index)
                    plan = quantizer.plan()
                    table = replace(plan.table, projections={})
                    losses.append(table.loss * weight.get(index, 1.0))
                    costs.append(table.cost)
                    tables.append((shape.prefix(index), table))
                    self._add(quantizer.original_output())
                else:
                    with self.streamed.layer(index) as module:
                        self.batches = self.streamed.through(module, self.batches)
                tick()
        self.batches = start
        whole = int(self.config.bits * shape.num_weights) - sum(table.overhead for _, table in tables)
        result = allocate(np.concatenate(losses), np.concatenate(costs), whole)
        at = 0
        for prefix, table in tables:
            choice = result.choice[at : at + len(table.loss)]
            self.budgets[prefix] = table.overhead + int(table.cost[np.arange(len(choice)), choice].sum())
            at += len(table.loss)
        each = shape.num_weights / len(tables)
        self.shared = {
            "solver_gap": result.gap,
            "sensitivity": {shape.prefix(index): value for index, value in sorted(weight.items())},
            "bits_per_weight": {prefix: bits / each for prefix, bits in self.budgets.items()},
        }
        self.clock.lap("allocation")

    def judge(self) -> dict[str, Any] | None:
        """Whether the quantized model still works; None where nothing was quantized."""
        if self.writer is None:
            return None
        found = sanity.verdict(
            sanity.tally(self.original, self.judged, [h for h, _ in self.originals]),
            sanity.tally(self.streamed, self.judged, [h for h, _ in self.batches]),
        )
        self.clock.lap("sanity")
        return found

    def layers(self) -> dict[str, Layer]:
        """Quantize every MoE layer, passing dense ones through; returns the schema of each by tensor prefix."""
        shape = self.source.shape
        done: dict[str, Layer] = {}
        with bar("Quantizing", self.streamed.num_layers * shape.num_experts) as tick:
            for index in range(self.streamed.num_layers):
                tick.describe(f"Quantizing layer {index + 1}/{self.streamed.num_layers}")
                if index not in shape.layers:
                    with self.streamed.layer(index) as module:
                        self.batches = self.streamed.through(module, self.batches)
                    with self.original.layer(index) as module:
                        self.originals = self.original.through(module, self.originals)
                    tick(shape.num_experts)
                    continue
                prefix = shape.prefix(index)
                done[prefix] = self._moe_layer(index, prefix, tick)
        return done

    def _add(self, routed: Tensor) -> None:
        """Complete the hidden states that left a layer with what its experts add, [tokens, H]."""
        shares = routed.cpu().split([hidden[..., 0].numel() for hidden, _ in self.batches])
        self.batches = [(h + share.view_as(h), kw) for (h, kw), share in zip(self.batches, shares, strict=True)]

    def _quantizer(self, index: int) -> tuple[LayerQuantizer, LayerStatistics]:
        """The quantizer of a layer, calibrated on the hidden states at hand, which go on without its experts' share."""
        prefix, experts = self.source.shape.prefix(index), self.source.experts(index)
        with self.streamed.layer(index, experts) as module:
            inputs, self.batches = self.streamed.expert_inputs(module, self.batches)
        if not bool(inputs.x.isfinite().all()):
            raise BitsmoeError(
                f"{prefix}: activations on the calibration text are not finite; a weight of an earlier layer is far "
                "too large, so download the model again"
            )
        self.clock.lap("calibration")
        stats = LayerStatistics(inputs, self.source.shape.num_experts)
        gate_up, down = (weights.to(self.streamed.device) for weights in experts)
        return LayerQuantizer(gate_up, down, stats, self.source.shape, self.config, prefix), stats

    def _moe_layer(self, index: int, prefix: str, tick: Any) -> Layer:
        quantizer, stats = self._quantizer(index)
        plan = quantizer.plan(self.budgets.get(prefix))
        self.pictures[prefix] = layer_picture(plan, stats)
        self.clock.lap("allocation")
        if self.writer is None:
            # Nothing is quantized, so later layers see the original activations.
            self._add(quantizer.original_output())
            self.clock.lap("calibration")
            self.reports.append(layer_report(prefix, plan, stats, self.config, None, None, quantizer.extreme_experts()))
            tick(self.source.shape.num_experts)
            return plan.layer
        tensors, errors = quantizer.quantize(plan, _every(len(plan.projections), tick))
        self.clock.lap("quantization")
        for name, tensor in tensors.items():
            self.writer.add(f"{prefix}.{name}", tensor)
        output, output_error = quantizer.quantized_output(plan.layer, tensors)
        self._add(output)
        self.clock.lap("calibration")
        with self.original.layer(index) as module:
            self.originals = self.original.through(module, self.originals)
        self.clock.lap("sanity")
        self.reports.append(
            layer_report(prefix, plan, stats, self.config, errors, output_error, quantizer.extreme_experts())
        )
        return plan.layer

    def finish(
        self, scratch: Path, layers: dict[str, Layer], record: dict[str, object], dense: DenseConfig | None
    ) -> None:
        """Write everything else the checkpoint needs: other tensors, config.json, tokenizer, generation config."""
        assert self.writer is not None
        write_other_tensors(self.source, dense, self.writer)
        self.writer.finish()
        draft = CheckpointConfig(
            quant_method=QUANT_METHOD,
            format_version=FORMAT_VERSION,
            block_size=self.config.block_size,
            bpw=0.0,
            layers=layers,
            linear_quantization=None if dense is None else dense.dump(),
            tool_version=version("bitsmoe-vllm"),
            run=record,
        )
        final = draft.model_copy(update={"bpw": draft.all_in_bpw()})
        config = {**self.source.config, "quantization_config": final.dump()}
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_side_files(self.source.directory, scratch)


def _every(count: int, tick: Any) -> Any:
    """A tick that passes on every count-th call."""
    calls = 0

    def passed() -> None:
        nonlocal calls
        calls += 1
        if calls % count == 0:
            tick()

    return passed
