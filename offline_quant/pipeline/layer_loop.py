"""The layer loop: hidden states travel from layer to layer, every MoE layer is planned and quantized."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.checkpoint import with_schema
from bitsmoe_kernels.format.linear_layers import DenseConfig
from bitsmoe_kernels.format.safetensors_io import ShardWriter
from bitsmoe_kernels.format.schema import FORMAT_VERSION, QUANT_METHOD, CheckpointConfig, Layer
from offline_quant import VERSION
from offline_quant.allocation.objectives import OBJECTIVES
from offline_quant.allocation.solver import allocate
from offline_quant.calibration.moments import LayerStatistics
from offline_quant.calibration.sensitivity import layer_sensitivities
from offline_quant.checkpoint.linear_layers import write_other_tensors
from offline_quant.config import QuantizeConfig
from offline_quant.evaluation import sanity
from offline_quant.layer.quantizer import LayerQuantizer, pass_count
from offline_quant.model.expert_inputs import ExpertInputs
from offline_quant.model.side_files import copy_side_files, missing_code
from offline_quant.model.source import SourceModel
from offline_quant.model.streaming import StreamedModel
from offline_quant.pipeline.calibrate import SHARED
from offline_quant.pipeline.memory import SHARD_BYTES
from offline_quant.pipeline.resume import RunState
from offline_quant.pipeline.stopwatch import Stopwatch
from offline_quant.report.collect import layer_picture, layer_report
from offline_quant.report.schema import LayerPicture, LayerReport, ModelBudget
from offline_quant.rounding.tuning import tune
from offline_quant.runtime.chunks import gpu_share
from offline_quant.runtime.distributed import Workers
from offline_quant.runtime.malloc import trim
from offline_quant.runtime.offload import OffloadCache
from offline_quant.runtime.progress import Bar, bar

BATCH_TOKENS, BATCH_VALUES = 16_384, 1 << 23
"""Most tokens, and values of hidden states, that pass through a layer together."""


class LayerLoop:
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
        workers: Workers,
        clock: Stopwatch,
        plan_only: bool,
    ):
        self.source, self.original, self.streamed = source, original, streamed
        self.config, self.state = config, state
        self.windows, self.workers, self.clock, self.plan_only = windows, workers, clock, plan_only
        self.reports: list[LayerReport] = []
        self.pictures: dict[str, LayerPicture] = {}
        self.shared: ModelBudget | None = None
        self.budgets: dict[str, int] = {}
        self.batches = windows.split(batch_windows(windows.shape[1], source.shape.hidden_size))
        self.judged = windows[: max(1, sanity.TOKENS // windows.shape[1])]
        originals = (windows if config.tune else self.judged).split(len(self.batches[0]))
        self.originals = () if plan_only or workers.rank else originals
        """Windows that travel through the original layers: to judge by, or what every layer aims at."""

    def _hidden(self, index: int, name: str, tokens: Tensor) -> Tensor:
        """Hidden states [n, L, H] of tokens [n, L] that leave layer `index`; -1: that enter the first."""
        return self.state.hidden(index, name, (*tokens.shape, self.source.shape.hidden_size))

    def _own(self) -> list[int]:
        """Batches whose hidden states this process keeps."""
        return [i for i in range(len(self.batches)) if self.workers.is_local(i)]

    def _embed(self) -> None:
        self.state.open_layer(-1)
        for i in self._own():
            self.state.put_hidden(-1, f"batch-{i}", self.streamed.embed(self.batches[i])[0])
        for i, tokens in enumerate(self.originals):
            self.state.put_hidden(-1, f"original-{i}", self.original.embed(tokens)[0])

    def share_budget(self) -> None:
        """Solve one program over all layers, on the original model's activations; leaves a budget for each layer."""
        if (kept := self.state.kept(SHARED)) is not None:
            self.budgets, self.shared = kept["budgets"], ModelBudget.model_validate(kept["shared"])
            return
        shape, objective = self.source.shape, OBJECTIVES[self.config.objective]
        weight: dict[int, float] = {}
        if objective.sensitive:
            with bar("Measuring sensitivities", 2 * self.streamed.num_layers) as on_progress:
                weight = layer_sensitivities(self.streamed, self.windows, self.config.seed, on_progress)
            self.clock.lap("sensitivities")
        losses, costs, tables = [], [], []
        self._embed()
        with self._bar("Planning", self.streamed.num_layers) as progress:
            for index in range(self.streamed.num_layers):
                self.state.open_layer(index)
                if index in shape.layers:
                    with finite_or_refuse(shape.prefix(index)):
                        quantizer = self._quantizer(index, progress)
                        table = replace(quantizer.plan(trim=False).table, projections={})
                    losses.append(table.loss * weight.get(index, 1.0))
                    costs.append(table.cost)
                    tables.append((shape.prefix(index), table))
                    self._add_expert_output(index, quantizer.original_output())
                    quantizer.offload.clear()
                else:
                    self._propagate(index, "batch")
                self.workers.barrier()  # until everybody has read what goes
                if index and self.workers.rank == 0:  # the quantized layers begin with what enters the first
                    self.state.drop_hidden(index - 1)
                progress.round_off(index + 1)
        self.clock.lap("calibration")
        whole = int(self.config.bits * shape.num_weights) - sum(table.overhead for _, table in tables)
        result = self.workers.broadcast_from_first(
            lambda: allocate(np.concatenate(losses), np.concatenate(costs), whole)
        )
        at = 0
        for prefix, table in tables:
            choice = result.choice[at : at + len(table.loss)]
            self.budgets[prefix] = table.overhead + int(table.cost[np.arange(len(choice)), choice].sum())
            at += len(table.loss)
        each = shape.num_weights / len(tables)
        self.shared = ModelBudget(
            solver_gap=result.gap,
            sensitivity={shape.prefix(index): value for index, value in sorted(weight.items())},
            bits_per_weight={prefix: bits / each for prefix, bits in self.budgets.items()},
        )
        if self.workers.rank == 0:
            self.state.keep(SHARED, {"budgets": self.budgets, "shared": self.shared.model_dump()})
        self.clock.lap("allocation")

    def sanity_check(self) -> sanity.SanityVerdict | None:
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
    def _bar(self, description: str, layers: int) -> Iterator["LayerProgress"]:
        each = self.source.shape.num_experts * pass_count(self.config)
        with bar(description, layers * each) as inner:
            yield LayerProgress(inner, each)

    def layers(self) -> dict[str, Layer]:
        """Quantize every MoE layer, passing dense ones through; returns the schema of each by tensor prefix."""
        shape, count = self.source.shape, self.streamed.num_layers
        done: dict[str, Layer] = {}
        finished = self.workers.broadcast_from_first(self.state.finished)
        if finished == 0 and self.shared is None:  # a program over all layers has begun with it
            self._embed()
        self.workers.barrier()
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
                    self.reports.append(LayerReport.model_validate(data["report"]))
                    self.pictures[prefix] = LayerPicture.restored(data["picture"])
                progress.round_off(index + 1)
        return done

    def _finish_layer(self, index: int, progress: "LayerProgress") -> None:
        self.state.open_layer(index)
        tensors: dict[str, Tensor] = {}
        data: dict[str, Any] = {}
        if index in self.source.shape.layers:
            with finite_or_refuse(self.source.shape.prefix(index)):
                tensors, data = self._moe_layer(index, progress)
        else:
            self._propagate(index, "batch")
            self._propagate(index, "original")
            self.clock.lap("calibration")
        self.workers.barrier()  # until everybody's hidden states are kept
        if self.workers.rank == 0:
            self.state.close_layer(index, tensors, {**data, "clock": self.clock.dump()})
        self.workers.barrier()
        self.clock.lap("write")

    def _propagate(self, index: int, name: str) -> None:
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

    def _add_expert_output(self, index: int, routed: Iterator[Tensor]) -> None:
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
            if self.workers.is_local(i):
                hidden = self._hidden(index, f"batch-{i}", tokens)
                self.state.put_hidden(index, f"batch-{i}", hidden + share.view_as(hidden))

    def _quantizer(self, index: int, progress: "LayerProgress") -> LayerQuantizer:
        """The quantizer of a layer, calibrated on the hidden states at hand, which go on without its experts' share."""
        prefix, shape = self.source.shape.prefix(index), self.source.shape
        with self.streamed.layer(index) as module:

            def enter(i: int) -> ExpertInputs:
                tokens = self.batches[i]
                hidden = self._hidden(index - 1, f"batch-{i}", tokens)
                inputs, rest = self.streamed.expert_inputs(module, hidden, self.streamed.arguments(tokens))
                self.state.put_hidden(index, f"batch-{i}", rest)
                return inputs.cpu()

            inputs = ExpertInputs.gathered(
                self.workers.map(range(len(self.batches)), enter), self.windows.numel(), self.streamed.device
            )
        if not bool(inputs.x.isfinite().all()):
            raise BitsmoeError(
                f"{prefix}: activations on the calibration text are beyond float32; weights before them are far too "
                "large, or config.json is wrong, so look at both, or download the model again"
            )
        self.clock.lap("calibration")
        stats = LayerStatistics(
            inputs, shape.num_experts, OffloadCache(self.state.directory, device_bytes=gpu_share(self.streamed.device))
        )

        def experts(chunk: range) -> tuple[Tensor, Tensor]:
            gate_up, down = self.source.experts(index, chunk)
            return gate_up.to(self.streamed.device), down.to(self.streamed.device)

        return LayerQuantizer(experts, stats, shape, self.config, prefix, self.workers, progress)

    def _moe_layer(self, index: int, progress: "LayerProgress") -> tuple[dict[str, Tensor], dict[str, Any]]:
        prefix = self.source.shape.prefix(index)
        quantizer = self._quantizer(index, progress)
        plan = quantizer.plan(self.budgets.get(prefix))
        self.clock.lap("allocation")
        self._propagate(index, "original")
        self.clock.lap("original model")
        tensors: dict[str, Tensor] = {}
        errors = output_error = None
        if self.plan_only:
            # Nothing is quantized, so later layers see the original activations.
            self._add_expert_output(index, quantizer.original_output())
        else:
            target = self._target_output(index) if self.config.tune else None
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
            self._add_expert_output(index, output)
        quantizer.offload.clear()
        self.clock.lap("calibration")
        counts, extreme = quantizer.stats.counts, quantizer.extreme_experts()
        return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}, {
            "schema": plan.layer.model_dump(mode="json"),
            "report": layer_report(prefix, plan, counts, self.config, errors, output_error, extreme).model_dump(),
            "picture": layer_picture(plan, counts).dump(),
        }

    def _target_output(self, index: int) -> Tensor:
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
        writer = ShardWriter(result, SHARD_BYTES, trim)
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
def finite_or_refuse(prefix: str) -> Iterator[None]:
    """Linear algebra fails where something is not finite, and weights are: they are too large for what is computed."""
    try:
        yield
    except torch.linalg.LinAlgError as e:
        raise BitsmoeError(
            f"{prefix}: its experts' weights are too large to be computed with in float32 ({e})"
        ) from None


class LayerProgress:
    """A bar that counts experts in every pass of a layer; a layer may need fewer passes than were thought."""

    def __init__(self, inner: Bar, each: int):
        self._inner, self._each, self._at = inner, each, 0
        self.describe = inner.describe

    def __call__(self, experts: int) -> None:
        """Advance by experts of one pass."""
        self._at += experts
        self._inner(experts)

    def round_off(self, layers: int) -> None:
        """So many layers are done."""
        self(layers * self._each - self._at)


def batch_windows(length: int, hidden_size: int) -> int:
    """Windows of calibration text that pass through a layer together."""
    return max(1, min(BATCH_TOKENS, BATCH_VALUES // hidden_size) // length)
