"""`bitsmoe quantize` from options to checkpoint: check everything, calibrate, then layer by layer plan and quantize."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError, Faults, one_line
from bitsmoe_kernels.format.checkpoint import with_schema
from bitsmoe_kernels.format.dense import DenseConfig
from bitsmoe_kernels.format.families import moe_shape
from bitsmoe_kernels.format.schema import FORMAT_VERSION, QUANT_METHOD, CheckpointConfig, Layer
from bitsmoe_kernels.format.shards import ShardWriter, read_json
from offline_quant import VERSION, sanity
from offline_quant.allocation import allocate
from offline_quant.calibration import (
    WRITTEN_BY_MODEL,
    CalibrationText,
    load_tokenizer,
    read_windows,
    reading_bytes,
    sample_windows,
    window_length,
)
from offline_quant.chunks import gpu_share, matrix_bytes
from offline_quant.config import QuantizeConfig
from offline_quant.dense import DenseModel, dense_plan, dense_report, write_other_tensors
from offline_quant.hub import write_card
from offline_quant.layer import LayerQuantizer, budget_bits, forms_of, may_share_bases, passes, schema_of
from offline_quant.memory import SHARD_BYTES, Needs, check_memory, needs
from offline_quant.model_adapter import SourceModel
from offline_quant.objectives import OBJECTIVES
from offline_quant.output import (
    CARD_FILE,
    CODE_FILES,
    PAGE_FILE,
    REPORT_FILE,
    SIDE_FILES,
    check_output,
    check_space,
    copy_side_files,
    missing_code,
)
from offline_quant.progress import Bar, bar, console, track
from offline_quant.report import LayerPicture, layer_picture, layer_report, model_report
from offline_quant.report_page import write_page
from offline_quant.resident import give_back, keep_large_blocks_apart, peak_bytes, resident_bytes
from offline_quant.sensitivity import layer_sensitivities
from offline_quant.spectrum import tail_length
from offline_quant.spool import Spool
from offline_quant.state import (
    RESULT,
    RunState,
    file_hash,
    fingerprint,
    has_windows,
    held_bytes,
    is_complete,
    run_state,
    state_directory,
)
from offline_quant.statistics import LayerInputs, LayerStatistics
from offline_quant.streaming import StreamedModel, transformers_config
from offline_quant.team import Team
from offline_quant.text_source import HUB, NETWORK_ERRORS, SELF, TextSource, open_text
from offline_quant.tune import tune

BATCH_TOKENS, BATCH_VALUES = 16_384, 1 << 23
"""Most tokens, and values of hidden states, that pass through a layer together."""
CALIBRATION, SHARED = "calibration.json", "shared.json"


@dataclass
class Outcome:
    """What a run made.

    Attributes:
        report: see `report.model_report`.
        seconds: wall time by stage.
        cpu_seconds: the same on all processors.
        peak_bytes: largest resident memory of the process by the end of each stage.
        needs: what was predicted; None for processes but the first.
    """

    report: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    needs: Needs | None = None


def resolve_model(name: str, revision: str | None = None, option: str = "--revision") -> Path:
    """A local directory, or a Hub name downloaded into the local cache.

    Args:
        name: either.
        revision: branch, tag or commit of a Hub name; None: the main branch.
        option: that gave it, for messages.

    Raises:
        BitsmoeError: neither.
    """
    path = Path(name)
    if path.is_dir():
        if revision is not None:
            raise BitsmoeError(f"{option} {revision}: {name} is a directory; only names on the Hub have revisions")
        snapshots = path / "snapshots"
        if snapshots.is_dir() and not (path / "config.json").exists():
            found = ", ".join(sorted(p.name for p in snapshots.iterdir())) or "none"
            raise BitsmoeError(
                f"{name}: is a folder of the Hub's cache; give the model's name on the Hub, or one of the snapshots in "
                f"{snapshots} ({found})"
            )
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BitsmoeError(f"{name}: is not a directory; give a model directory or a Hugging Face Hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    errors: tuple[type[Exception], ...] = (*NETWORK_ERRORS, HFValidationError, LocalEntryNotFoundError)
    wanted = ["config.json", "*.safetensors*", CARD_FILE, *SIDE_FILES, CODE_FILES]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except errors as e:
        reason = one_line(e)[:500]
        shown = name if revision is None else f"{name} at {option} {revision}"
        raise BitsmoeError(f"{shown}: no such directory, and the Hub does not give it ({reason})") from None


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


def quantize_model(
    model: str,
    out: Path,
    config: QuantizeConfig,
    plan_only: bool = False,
    resume: bool = False,
    team: Team | None = None,
    max_memory: int | None = None,
    revision: str | None = None,
) -> Outcome:
    """Quantize a model's routed experts.

    Args:
        model: directory or Hub name.
        out: directory to write; with plan_only it receives the report alone.
        config: options.
        plan_only: stop after the allocation.
        resume: go on after the last finished layer of an earlier run of the same options, if there was one.
        team: processes that share the work; all of them call this, and `out` is a place they all see.
        max_memory: most resident bytes of a process, as predicted; None: no limit.
        revision: branch, tag or commit of a Hub name; None: the main branch.

    Returns:
        The report and the time of each stage.

    Raises:
        BitsmoeError: any fault of the input; nothing is left behind, or layers that `resume` goes on with.
    """
    team = team or Team()
    if config.device == "cuda" and team.size > 1:
        config = config.model_copy(update={"device": f"cuda:{team.local_rank}"})
    leaving = resume and is_complete(out)
    # A run that has its tokens already goes on without the network.
    known = str(config.calib).startswith(HUB) and (leaving or (resume and has_windows(out)))
    inputs = _checked(model, revision, out, config, team, leaving, known)
    source, dense = inputs.source, inputs.dense
    matrix = matrix_bytes(source.shape.hidden_size, source.shape.intermediate_size)
    clock = _Clock(matrix)
    length = window_length(source.config, config.calib_length)
    tokens = config.calib_samples * length
    batch_tokens = length * min(config.calib_samples, batch_windows(length, source.shape.hidden_size))
    scope = config.budget or OBJECTIVES[config.objective].scope

    def predicted(sampled: bool) -> Needs:
        return needs(
            source.shape, source.tensors.specs, source.config, config.bits, tokens, batch_tokens, length,
            inputs.baseline, config.tune, may_share_bases(source.shape, config),
            scope == "model" and OBJECTIVES[config.objective].sensitive, sampled, torch.device(config.device),
            0 if config.calib == SELF else reading_bytes(inputs.text, tokens),
        )  # fmt: skip

    memory = predicted(config.calib == "self")
    if team.rank == 0:
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

    if team.rank == 0 and not leaving:
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
    with run_state(out, started, resume, team) as state:
        if state.concluded:
            return Outcome({} if team.rank else read_json(out / REPORT_FILE), needs=memory)
        windows, used = team.agreed(lambda: _windows(inputs, config, length, state, clock, unforeseen))
        record = {**config.record(), "calib": used.recorded}
        run = _Run(source, inputs.original, inputs.streamed, windows, config, state, team, clock, plan_only)
        if scope == "model":
            run.share_budget()
        layers = run.layers()
        if team.rank:
            return Outcome({})
        report = model_report(run.reports, layers, config, record, windows, run.judge(), run.shared)
        report |= dense_report(dense, source.tensors.specs)
        result = state.directory / RESULT
        result.mkdir()
        if not plan_only:
            run.finish(result, layers, record, dense)
            write_card(result, model, source.directory, report, used)
        (result / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        clock.lap("write")
        write_page(result / PAGE_FILE, report, run.pictures, clock.laps, clock.peaks)
        clock.lap("report page")
        state.publish()
    return Outcome(report, clock.laps, clock.cpu, clock.peaks, memory)


@dataclass(frozen=True)
class _Inputs:
    """What a run works on, once all that is cheap to check has been checked.

    Attributes:
        source: the model's files.
        original: the model, run layer by layer.
        streamed: the same with its linear layers quantized as in the result.
        tokenizer: its tokenizer.
        text: to calibrate on; None: the default dataset, none, or a dataset whose tokens an earlier run has read.
        dense: how those are quantized; None: they are not.
        baseline: resident bytes of the process before it works.
    """

    source: SourceModel
    original: StreamedModel
    streamed: StreamedModel
    tokenizer: Any
    text: TextSource | None
    dense: DenseConfig | None
    baseline: int


def _checked(
    model: str, revision: str | None, out: Path, config: QuantizeConfig, team: Team, leaving: bool, known: bool
) -> _Inputs:
    """Everything that can be checked without reading the weights, all faults at once.

    Args:
        model, revision, out, config, team: see `quantize_model`.
        leaving: an earlier run had made everything, and what is there is its result.
        known: an earlier run has the calibration tokens.

    Raises:
        BitsmoeError: lists them.
    """
    faults = Faults()
    with faults.gathered():
        if config.tune and team.size > 1:
            raise BitsmoeError("--tune: experts are fitted one after another, in one process; use it without --workers")
    with faults.gathered():
        if not leaving:
            check_output(out, but=state_directory(out).name)
    device = "cpu"
    with faults.gathered():
        check_device(config.device)
        device = config.device
    text: TextSource | None = None
    with faults.gathered():
        text = None if known else _opened(config)
    inputs: _Inputs | None = None
    with faults.gathered():
        directory, tokenizer = resolve_model(model, revision), None
        described = read_json(directory / "config.json")
        moe_shape(described, str(directory))
        transformers_config(described, directory)
        with faults.gathered():
            tokenizer = load_tokenizer(directory)
            if text is not None:
                text.check_tokenizer(tokenizer)
        source = SourceModel(directory)
        keep_large_blocks_apart(matrix_bytes(source.shape.hidden_size, source.shape.intermediate_size))
        with faults.gathered():
            check_budget(source, config)
        dense = dense_plan(source, config.dense_bits)
        original = StreamedModel(source, device)
        streamed = original if dense is None else StreamedModel(DenseModel(source, dense), device)
        original.try_out()
        give_back()  # what looking at all this has freed
        inputs = _Inputs(source, original, streamed, tokenizer, text, dense, resident_bytes())
    faults.raise_all()
    assert inputs is not None
    if team.rank == 0:
        inputs.original.warn_of_ignored()
        if lost := missing_code(directory):
            console.print(
                f"{directory}: config.json names {', '.join(lost)}, which are not there; the result names none"
            )
    return inputs


def _opened(config: QuantizeConfig) -> TextSource | None:
    """The calibration text that was chosen; None: none is to be read, or the default dataset."""
    if config.calib is None or config.calib == SELF:
        return None
    return open_text(config.calib, "--calib", config.calib_config, config.calib_split, config.calib_column)


def _windows(
    inputs: _Inputs,
    config: QuantizeConfig,
    length: int,
    state: RunState,
    clock: "_Clock",
    unforeseen: Callable[[], None],
) -> tuple[Tensor, CalibrationText]:
    """Calibration tokens and where they came from; those of an earlier run if it was. The weights are then checked.

    Text is read first: its faults show sooner than those of the weights.
    """
    if (windows := state.windows) is not None and (earlier := state.kept(CALIBRATION)) is not None:
        return windows, CalibrationText(**earlier)
    torch.manual_seed(config.seed)
    text = inputs.text or _opened(config)
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


class _Clock:
    """Wall time, processor time and peak memory by stage; what a stage has freed is given back.

    Args:
        matrix: bytes of one of an expert's matrices.
    """

    def __init__(self, matrix: int) -> None:
        self._matrix = matrix
        self.laps: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._last, self._last_cpu = time.monotonic(), time.process_time()

    def lap(self, name: str) -> None:
        now, cpu = time.monotonic(), time.process_time()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self.cpu[name] = self.cpu.get(name, 0.0) + cpu - self._last_cpu
        self.peaks[name] = peak_bytes()
        give_back(self._matrix)
        self._last, self._last_cpu = now, cpu

    def dump(self) -> dict[str, Any]:
        """As JSON data."""
        return {"laps": self.laps, "cpu": self.cpu, "peaks": self.peaks}

    def restore(self, data: dict[str, Any]) -> None:
        """Count on from what an earlier run had used."""
        for mine, theirs in ((self.laps, data["laps"]), (self.cpu, data["cpu"])):
            for name, value in theirs.items():
                mine[name] = mine.get(name, 0.0) + value
        for name, value in data["peaks"].items():
            self.peaks[name] = max(self.peaks.get(name, 0), value)


class _Run:
    """The layer loop: hidden states of the calibration text travel from layer to layer, on disk.

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
        state: RunState,
        team: Team,
        clock: _Clock,
        plan_only: bool,
    ):
        self.source, self.original, self.streamed = source, original, streamed
        self.config, self.state = config, state
        self.windows, self.team, self.clock, self.plan_only = windows, team, clock, plan_only
        self.reports: list[dict[str, Any]] = []
        self.pictures: dict[str, LayerPicture] = {}
        self.shared: dict[str, Any] | None = None
        self.budgets: dict[str, int] = {}
        self.batches = windows.split(batch_windows(windows.shape[1], source.shape.hidden_size))
        self.judged = windows[: max(1, sanity.TOKENS // windows.shape[1])]
        originals = (windows if config.tune else self.judged).split(len(self.batches[0]))
        self.originals = () if plan_only or team.rank else originals
        """Windows that travel through the original layers: to judge by, or what every layer aims at."""

    def _hidden(self, index: int, name: str, tokens: Tensor) -> Tensor:
        """Hidden states [n, L, H] of tokens [n, L] that leave layer `index`; -1: that enter the first."""
        return self.state.hidden(index, name, (*tokens.shape, self.source.shape.hidden_size))

    def _own(self) -> list[int]:
        """Batches whose hidden states this process keeps."""
        return [i for i in range(len(self.batches)) if self.team.owns(i)]

    def _embed(self) -> None:
        self.state.open_layer(-1)
        for i in self._own():
            self.state.put_hidden(-1, f"batch-{i}", self.streamed.embed(self.batches[i])[0])
        for i, tokens in enumerate(self.originals):
            self.state.put_hidden(-1, f"original-{i}", self.original.embed(tokens)[0])

    def share_budget(self) -> None:
        """Solve one program over all layers, on the original model's activations; leaves a budget for each layer."""
        if (kept := self.state.kept(SHARED)) is not None:
            self.budgets, self.shared = kept["budgets"], kept["shared"]
            return
        shape, objective = self.source.shape, OBJECTIVES[self.config.objective]
        weight: dict[int, float] = {}
        if objective.sensitive:
            with bar("Measuring sensitivities", 2 * self.streamed.num_layers) as tick:
                weight = layer_sensitivities(self.streamed, self.windows, self.config.seed, tick)
            self.clock.lap("sensitivities")
        losses, costs, tables = [], [], []
        self._embed()
        with self._bar("Planning", self.streamed.num_layers) as progress:
            for index in range(self.streamed.num_layers):
                self.state.open_layer(index)
                if index in shape.layers:
                    with _finite(shape.prefix(index)):
                        quantizer = self._quantizer(index, progress)
                        table = replace(quantizer.plan(trim=False).table, projections={})
                    losses.append(table.loss * weight.get(index, 1.0))
                    costs.append(table.cost)
                    tables.append((shape.prefix(index), table))
                    self._add(index, quantizer.original_output())
                    quantizer.spool.clear()
                else:
                    self._pass(index, "batch")
                self.team.wait()  # until everybody has read what goes
                if index and self.team.rank == 0:  # the quantized layers begin with what enters the first
                    self.state.drop_hidden(index - 1)
                progress.round_off(index + 1)
        self.clock.lap("calibration")
        whole = int(self.config.bits * shape.num_weights) - sum(table.overhead for _, table in tables)
        result = self.team.agreed(lambda: allocate(np.concatenate(losses), np.concatenate(costs), whole))
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
        if self.team.rank == 0:
            self.state.keep(SHARED, {"budgets": self.budgets, "shared": self.shared})
        self.clock.lap("allocation")

    def judge(self) -> dict[str, Any] | None:
        """Whether the quantized model still works; None where nothing was quantized."""
        if self.plan_only:
            return None
        last = self.streamed.num_layers - 1

        def tally(name: str, batches: Sequence[Tensor]) -> sanity.Tally:
            hidden = (self._hidden(last, f"{name}-{i}", ids) for i, ids in enumerate(batches))
            return sanity.tally(self.original if name == "original" else self.streamed, self.judged, hidden)

        found = sanity.verdict(tally("original", self.originals), tally("batch", self.batches))
        self.clock.lap("sanity")
        return found

    @contextmanager
    def _bar(self, description: str, layers: int) -> Iterator["_LayerBar"]:
        each = self.source.shape.num_experts * passes(self.config)
        with bar(description, layers * each) as inner:
            yield _LayerBar(inner, each)

    def layers(self) -> dict[str, Layer]:
        """Quantize every MoE layer, passing dense ones through; returns the schema of each by tensor prefix."""
        shape, count = self.source.shape, self.streamed.num_layers
        done: dict[str, Layer] = {}
        finished = self.team.agreed(self.state.finished)
        if finished == 0 and self.shared is None:  # a program over all layers has begun with it
            self._embed()
        self.team.wait()
        with self._bar("Quantizing", count) as progress:
            for index in range(count):
                progress.describe(f"Quantizing layer {index + 1}/{count}")
                if index >= finished:
                    self._finish_layer(index, progress)
                data = self.state.layer_data(index)
                if index == finished - 1:
                    self.clock.restore(data["clock"])
                if index in shape.layers:
                    prefix = shape.prefix(index)
                    done[prefix] = Layer.model_validate(data["schema"])
                    self.reports.append(data["report"])
                    self.pictures[prefix] = LayerPicture.restored(data["picture"])
                progress.round_off(index + 1)
        return done

    def _finish_layer(self, index: int, progress: "_LayerBar") -> None:
        self.state.open_layer(index)
        tensors: dict[str, Tensor] = {}
        data: dict[str, Any] = {}
        if index in self.source.shape.layers:
            with _finite(self.source.shape.prefix(index)):
                tensors, data = self._moe_layer(index, progress)
        else:
            self._pass(index, "batch")
            self._pass(index, "original")
            self.clock.lap("calibration")
        self.team.wait()  # until everybody's hidden states are kept
        if self.team.rank == 0:
            self.state.close_layer(index, tensors, {**data, "clock": self.clock.dump()})
        self.team.wait()
        self.clock.lap("write")

    def _pass(self, index: int, name: str) -> None:
        """Take hidden states through a layer as the model has it: "batch", calibration text, or "original"."""
        batches = {i: self.batches[i] for i in self._own()} if name == "batch" else dict(enumerate(self.originals))
        if not batches:
            return
        model = self.original if name == "original" else self.streamed
        with model.layer(index) as module:
            entering = (
                (self._hidden(index - 1, f"{name}-{i}", tokens), model.arguments(tokens))
                for i, tokens in batches.items()
            )
            for i, out in zip(batches, model.through(module, entering), strict=True):
                self.state.put_hidden(index, f"{name}-{i}", out)

    def _add(self, index: int, routed: Iterator[Tensor]) -> None:
        """Complete the hidden states that left a layer with what its experts add, [n, H] by and by.

        Of the last layer only those that are judged: nothing else reads them.
        """
        pieces: list[Tensor] = []
        last = index == self.streamed.num_layers - 1
        read = len(self.judged if last else self.windows)
        for i, tokens in enumerate(self.batches[: -(-read // len(self.batches[0]))]):
            while sum(map(len, pieces)) < tokens.numel():
                pieces.append(next(routed).cpu())
            share, *pieces = torch.cat(pieces).tensor_split([tokens.numel()])
            if self.team.owns(i):
                hidden = self._hidden(index, f"batch-{i}", tokens)
                self.state.put_hidden(index, f"batch-{i}", hidden + share.view_as(hidden))

    def _quantizer(self, index: int, progress: "_LayerBar") -> LayerQuantizer:
        """The quantizer of a layer, calibrated on the hidden states at hand, which go on without its experts' share."""
        prefix, shape = self.source.shape.prefix(index), self.source.shape
        with self.streamed.layer(index) as module:

            def enter(i: int) -> LayerInputs:
                tokens = self.batches[i]
                hidden = self._hidden(index - 1, f"batch-{i}", tokens)
                inputs, rest = self.streamed.expert_inputs(module, hidden, self.streamed.arguments(tokens))
                self.state.put_hidden(index, f"batch-{i}", rest)
                return inputs.cpu()

            inputs = LayerInputs.gathered(
                self.team.map(range(len(self.batches)), enter), self.windows.numel(), self.streamed.device
            )
        if not bool(inputs.x.isfinite().all()):
            raise BitsmoeError(
                f"{prefix}: activations on the calibration text are beyond float32; weights before them are far too "
                "large, or config.json is wrong, so look at both, or download the model again"
            )
        self.clock.lap("calibration")
        stats = LayerStatistics(
            inputs, shape.num_experts, Spool(self.state.directory, device_bytes=gpu_share(self.streamed.device))
        )

        def experts(chunk: range) -> tuple[Tensor, Tensor]:
            gate_up, down = self.source.experts(index, chunk)
            return gate_up.to(self.streamed.device), down.to(self.streamed.device)

        return LayerQuantizer(experts, stats, shape, self.config, prefix, self.team, progress)

    def _moe_layer(self, index: int, progress: "_LayerBar") -> tuple[dict[str, Tensor], dict[str, Any]]:
        prefix = self.source.shape.prefix(index)
        quantizer = self._quantizer(index, progress)
        plan = quantizer.plan(self.budgets.get(prefix))
        self.clock.lap("allocation")
        self._pass(index, "original")
        self.clock.lap("original model")
        tensors: dict[str, Tensor] = {}
        errors = output_error = None
        if self.plan_only:
            # Nothing is quantized, so later layers see the original activations.
            self._add(index, quantizer.original_output())
        else:
            target = self._aim(index) if self.config.tune else None
            tensors, errors = quantizer.quantize(plan, None if target is None else target.clone())
            self.clock.lap("quantization")
            if target is None:
                output_error, output = quantizer.output_error(), quantizer.quantized_output()
            else:
                given = {name: tensor.to(target.device) for name, tensor in tensors.items()}
                inputs = quantizer.stats.inputs
                tensors = tune(plan.layer, self.config.block_size, given, inputs, target, self.config.seed)
                self.clock.lap("tuning")
                whole = quantizer.output_of(plan.layer, tensors)
                output_error, output = quantizer.output_error(whole), iter([whole])
            self._add(index, output)
        quantizer.spool.clear()
        self.clock.lap("calibration")
        extreme = quantizer.extreme_experts()
        return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}, {
            "schema": plan.layer.model_dump(mode="json"),
            "report": layer_report(prefix, plan, quantizer.stats, self.config, errors, output_error, extreme),
            "picture": layer_picture(plan, quantizer.stats).dump(),
        }

    def _aim(self, index: int) -> Tensor:
        """What the experts should add for the hidden states to be the original model's, [T, H]."""
        target = torch.empty(self.windows.numel(), self.source.shape.hidden_size)
        at = 0
        for i, tokens in enumerate(self.batches):
            part = target[at : at + tokens.numel()]
            wanted, rest = (self._hidden(index, f"{name}-{i}", tokens) for name in ("original", "batch"))
            torch.sub(wanted.view_as(part), rest.view_as(part), out=part)
            at += len(part)
        return target.to(self.streamed.device)

    def finish(
        self, result: Path, layers: dict[str, Layer], record: dict[str, object], dense: DenseConfig | None
    ) -> None:
        """Put the checkpoint together: experts, other tensors, config.json, tokenizer, generation config."""
        # Even a large block lies in the heap where it holds free room for it, and would stay resident.
        writer = ShardWriter(result, SHARD_BYTES, give_back)
        for index in range(self.streamed.num_layers):
            writer.add_all(self.state.layer_tensors(index))
        write_other_tensors(self.source, dense, writer)
        writer.finish()
        draft = CheckpointConfig(
            quant_method=QUANT_METHOD,
            format_version=FORMAT_VERSION,
            block_size=self.config.block_size,
            bpw=0.0,
            layers=layers,
            linear_quantization=None if dense is None else dense.dump(),
            tool_version=VERSION,
            run=record,
        )
        final = draft.model_copy(update={"bpw": draft.all_in_bpw()})
        kept = dict(self.source.config)
        if missing_code(self.source.directory):
            del kept["auto_map"]
        config = with_schema(kept, final.dump())
        (result / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_side_files(self.source.directory, result)


@contextmanager
def _finite(prefix: str) -> Iterator[None]:
    """Linear algebra fails where something is not finite, and weights are: they are too large for what is computed."""
    try:
        yield
    except torch.linalg.LinAlgError as e:
        raise BitsmoeError(
            f"{prefix}: its experts' weights are too large to be computed with in float32 ({e})"
        ) from None


class _LayerBar:
    """A bar that counts experts in every pass of a layer; a layer may need fewer passes than were thought."""

    def __init__(self, inner: Bar, each: int):
        self._inner, self._each, self._at = inner, each, 0
        self.describe = inner.describe

    def __call__(self, experts: int) -> None:
        self._at += experts
        self._inner(experts)

    def round_off(self, layers: int) -> None:
        """So many layers are done."""
        self(layers * self._each - self._at)


def batch_windows(length: int, hidden_size: int) -> int:
    """Windows of calibration text that pass through a layer together."""
    return max(1, min(BATCH_TOKENS, BATCH_VALUES // hidden_size) // length)
