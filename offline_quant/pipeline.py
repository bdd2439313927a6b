"""`bitsmoe quantize` from options to checkpoint: check everything, calibrate, then layer by layer plan and quantize."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.schema import FORMAT_VERSION, CheckpointConfig, Layer
from bitsmoe_kernels.format.shards import ShardWriter
from bitsmoe_kernels.reference import LayerWeights
from offline_quant.calibration import calibration_windows, check_text_source, load_tokenizer, window_length
from offline_quant.config import QuantizeConfig
from offline_quant.layer import LayerPlan, LayerQuantizer, budget_bits, schema_of
from offline_quant.model_adapter import SourceModel
from offline_quant.progress import bar, track
from offline_quant.report import REPORT_FILE, layer_report, model_report
from offline_quant.statistics import LayerStatistics
from offline_quant.streaming import StreamedModel

BATCH_TOKENS = 16_384


@dataclass
class Outcome:
    """What a run made.

    Attributes:
        report: see `report.model_report`.
        seconds: wall time by stage.
    """

    report: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)


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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise BitsmoeError(f"{name}: no such directory, and the Hub does not give it ({reason})") from None


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A scratch directory beside `out` that becomes `out` if the block succeeds and vanishes if it does not.

    Raises:
        BitsmoeError: `out` exists and is not empty, cannot be made, or the disk fills up.
    """
    check_output(out)
    scratch: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        yield scratch
        scratch.chmod(0o755)
        os.replace(scratch, out)
        scratch = None
    except (OSError, SafetensorError) as e:
        free = shutil.disk_usage(out.parent).free if out.parent.exists() else 0
        raise BitsmoeError(
            f"{out}: cannot be written ({e}); {free / 1e6:.1f} MB are free there. Nothing was left behind"
        ) from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def check_space(out: Path, needed: int) -> None:
    """Refuse to begin where the disk cannot hold the result.

    Raises:
        BitsmoeError: names needed and free bytes.
    """
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise BitsmoeError(
            f"{out}: needs {needed / 1e6:.1f} MB, but {free / 1e6:.1f} MB are free on that disk; free some space or "
            "choose another place"
        )


def check_output(out: Path) -> None:
    """Refuse an output directory that holds something.

    Raises:
        BitsmoeError: names it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BitsmoeError(f"--out {out}: exists and is not an empty directory; choose another name or remove it")


def check_device(device: str) -> None:
    """Refuse a device torch does not have.

    Raises:
        BitsmoeError: names it.
    """
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise BitsmoeError(f"--device {device}: must be cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise BitsmoeError(f"--device {device}: torch {torch.__version__} sees no CUDA device; use --device cpu")


def check_budget(source: SourceModel, config: QuantizeConfig) -> None:
    """Refuse an impossible budget from the model's shape alone, before calibration.

    Raises:
        BitsmoeError: names the smallest possible budget.
    """
    form = "natural" if config.basis == "auto" else config.basis
    budget_bits(schema_of(form, source.shape, config), config, str(source.directory))


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
    if not plan_only:
        others = sum(t.nbytes for name, t in source.tensors.specs.items() if not source.shape.is_expert_tensor(name))
        check_space(out, others + int(min(config.bits, 8.5) * source.shape.num_weights / 8))
    tokenizer = load_tokenizer(source.directory)
    clock = _Clock()
    with new_directory(out) as scratch:
        source.check_finite(track)
        clock.lap("check")
        torch.manual_seed(config.seed)
        streamed = StreamedModel(source, config.device)
        length = window_length(source.config, config.calib_length)
        windows, used = calibration_windows(
            streamed, tokenizer, config.calib, config.calib_samples, length, config.seed
        )
        streamed = StreamedModel(source, config.device)
        clock.lap("calibration text")
        record = {**config.record(), "calib": used if used == "self" or used.startswith("hf:") else Path(used).name}
        run = _Run(source, streamed, windows, config, None if plan_only else ShardWriter(scratch), clock)
        layers = run.layers()
        report = model_report(run.reports, layers, config, record, windows)
        if not plan_only:
            run.finish(scratch, layers, record)
        (scratch / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        clock.lap("write")
    return Outcome(report, clock.laps)


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


class _Run:
    """The layer loop: hidden states of the calibration text travel from layer to layer.

    A layer is calibrated on what the quantized layers before it give out, so that it can make up for their error.
    """

    def __init__(
        self,
        source: SourceModel,
        streamed: StreamedModel,
        windows: Tensor,
        config: QuantizeConfig,
        writer: ShardWriter | None,
        clock: _Clock,
    ):
        self.source, self.streamed, self.config, self.writer, self.clock = source, streamed, config, writer, clock
        self.reports: list[dict[str, Any]] = []
        batch = max(1, BATCH_TOKENS // windows.shape[1])
        self.batches = []
        for ids in windows.split(batch):
            hidden, kwargs = streamed.embed(ids)
            self.batches.append((hidden.cpu(), kwargs))

    def layers(self) -> dict[str, Layer]:
        """Quantize every MoE layer, passing dense ones through; returns the schema of each by tensor prefix."""
        shape = self.source.shape
        done: dict[str, Layer] = {}
        with bar("Quantizing", self.streamed.num_layers * shape.num_experts) as tick:
            for index in range(self.streamed.num_layers):
                tick.describe(f"Quantizing layer {index + 1}/{self.streamed.num_layers}")
                if index not in shape.layers:
                    with self.streamed.layer(index) as module:
                        self._advance(module)
                    for _ in range(shape.num_experts):
                        tick()
                    continue
                prefix = shape.prefix(index)
                done[prefix] = self._moe_layer(index, prefix, tick)
        return done

    def _advance(self, module: torch.nn.Module) -> None:
        self.batches = [(self.streamed.run(module, h, kw).cpu(), kw) for h, kw in self.batches]

    def _moe_layer(self, index: int, prefix: str, tick: Any) -> Layer:
        device = self.streamed.device
        experts = self.source.experts(index)
        with self.streamed.layer(index, experts) as module:
            inputs = self.streamed.expert_inputs(module, self.batches)
            if self.writer is None:
                # Nothing is quantized, so later layers see the original activations.
                self._advance(module)
        self.clock.lap("calibration")
        stats = LayerStatistics(inputs, self.source.shape.num_experts)
        gate_up, down = (w.to(device) for w in experts)
        quantizer = LayerQuantizer(gate_up, down, stats, self.source.shape, self.config, prefix)
        plan = quantizer.plan()
        self.clock.lap("allocation")
        if self.writer is None:
            self.reports.append(layer_report(prefix, plan, stats, self.config, None))
            for _ in range(self.source.shape.num_experts):
                tick()
            return plan.layer
        tensors, errors = quantizer.quantize(plan, _every(len(plan.projections), tick))
        self.clock.lap("quantization")
        for name, tensor in tensors.items():
            self.writer.add(f"{prefix}.{name}", tensor)
        with self.streamed.layer(index, self._dequantized(plan, tensors)) as module:
            self._advance(module)
        self.clock.lap("calibration")
        self.reports.append(layer_report(prefix, plan, stats, self.config, errors))
        return plan.layer

    def _dequantized(self, plan: LayerPlan, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        weights = LayerWeights(plan.layer, self.config.block_size, tensors)
        experts = [weights.expert_weights(e) for e in range(plan.layer.num_experts)]
        return torch.stack([torch.cat([g, u]) for g, u, _ in experts]), torch.stack([d for _, _, d in experts])

    def finish(self, scratch: Path, layers: dict[str, Layer], record: dict[str, object]) -> None:
        """Write everything else the checkpoint needs: other tensors, config.json, tokenizer, generation config."""
        assert self.writer is not None
        for name in self.source.tensors:
            if not self.source.shape.is_expert_tensor(name):
                self.writer.add(name, self.source.tensors.get(name))
        self.writer.finish()
        draft = CheckpointConfig(
            quant_method="bitsmoe",
            format_version=FORMAT_VERSION,
            block_size=self.config.block_size,
            bpw=0.0,
            layers=layers,
            tool_version=version("bitsmoe-vllm"),
            run=record,
        )
        final = draft.model_copy(update={"bpw": draft.all_in_bpw()})
        config = {**self.source.config, "quantization_config": final.dump()}
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_side_files(self.source.directory, scratch)


SIDE_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.tiktoken", "*.model",
    "generation_config.json", "chat_template*", "*.jinja", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def copy_side_files(source: Path, out: Path) -> None:
    """Carry over tokenizer, generation config and chat template."""
    for path in sorted(source.iterdir()):
        if path.is_file() and any(path.match(pattern) for pattern in SIDE_FILES):
            shutil.copyfile(path, out / path.name)


def _every(count: int, tick: Any) -> Any:
    """A tick that passes on every count-th call."""
    calls = 0

    def passed() -> None:
        nonlocal calls
        calls += 1
        if calls % count == 0:
            tick()

    return passed
