"""The checks before the expensive steps: all that need no weights, and memory and disk; all faults at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitsmoe_kernels.errors import BitsmoeError, Faults
from bitsmoe_kernels.format.linear_layers import DenseConfig
from bitsmoe_kernels.format.safetensors_io import read_json
from bitsmoe_kernels.models.families import in_table, language_config, moe_shape, without_quantization
from offline_quant.allocation.budget import budget_bits
from offline_quant.allocation.objectives import OBJECTIVES, budget_scope, forms_of
from offline_quant.calibration.sources.base import CalibrationSource
from offline_quant.calibration.sources.registry import calibration_source
from offline_quant.calibration.windows import load_tokenizer, window_length
from offline_quant.checkpoint.directory import check_output, check_space
from offline_quant.checkpoint.linear_layers import DenseModel, dense_plan, left_at_16_bits
from offline_quant.config import QuantizeConfig
from offline_quant.model.download import resolve_model
from offline_quant.model.outside.shape import untested
from offline_quant.model.outside.skeleton import Skeleton
from offline_quant.model.side_files import missing_code
from offline_quant.model.sizes import MAX_CODE_BITS, RunSizes
from offline_quant.model.source import SourceModel
from offline_quant.model.streaming import StreamedModel, transformers_config
from offline_quant.pipeline.hidden_states import batch_windows
from offline_quant.pipeline.memory import MemoryEstimate, check_memory, estimate_run
from offline_quant.pipeline.resume import EarlierRun, held_bytes, state_directory
from offline_quant.rounding.backends.select import why_no_kernels
from offline_quant.runtime.chunks import matrix_bytes
from offline_quant.runtime.device import check_device
from offline_quant.runtime.distributed import Workers
from offline_quant.runtime.malloc import keep_large_blocks_apart, resident_bytes, trim
from offline_quant.runtime.progress import console


def check_budget(source: SourceModel, config: QuantizeConfig) -> None:
    """Refuse an impossible budget, or a divergence that cannot be forecast, from the model's shape alone.

    Raises:
        BitsmoeError: names the smallest possible budget, or the option that rules out a forecast.
    """
    objective = OBJECTIVES[config.objective]
    if config.target_kl is None:
        schemas = [form.schema(source.shape, config.basis_bits) for form in forms_of(config)]
        least = min(schemas, key=lambda schema: schema.nbytes(config.block_size))
        budget_bits(least, config, str(source.directory))
    elif not objective.predicts_errors:
        raise BitsmoeError(
            f"--target-kl {config.target_kl}: --objective {objective.name} predicts no errors that a divergence could "
            "be forecast from; use --objective bitsmoe, or give --bits"
        )
    elif budget_scope(config) == "model":
        raise BitsmoeError(
            f"--target-kl {config.target_kl}: with --budget model no forecast was compared with measurements; leave "
            "--budget out, or give --bits"
        )
    objective.check(source.shape)


@dataclass(frozen=True)
class RunInputs:
    """Inputs of a run after the checks that need no weights.

    Attributes:
        source: the model's files.
        original: the model, run layer by layer.
        streamed: the same with its linear layers outside the experts quantized as in the result.
        tokenizer: its tokenizer.
        calibration: where calibration tokens come from; not opened where an earlier run has read a remote one.
        dense: how linear layers outside the experts are quantized; None: they are not.
        baseline: resident bytes of the process before it works.
    """

    source: SourceModel
    original: StreamedModel
    streamed: StreamedModel
    tokenizer: Any
    calibration: CalibrationSource
    dense: DenseConfig | None
    baseline: int


def check_inputs(
    model: str, revision: str | None, out: Path, config: QuantizeConfig, workers: Workers, earlier: EarlierRun
) -> RunInputs:
    """Check everything that needs no weights, and open the model; all faults at once.

    Args:
        model, revision, out, config, workers: see `quantize_model`.
        earlier: what an earlier run left that this one resumes.

    Raises:
        BitsmoeError: lists them.
    """
    faults = Faults()
    with faults.gathered():
        if config.tune and workers.size > 1:
            raise BitsmoeError("--tune: the experts of a layer are tuned in one process; use it without --workers")
    with faults.gathered():
        if config.tunes_model and workers.size > 1:
            option = "--tune-codes" if config.tune_codes else "--tune-model"
            raise BitsmoeError(f"{option}: the whole model is tuned in one process; use it without --workers")
    with faults.gathered():
        if not earlier.complete:
            check_output(out, but=state_directory(out).name)
    device = "cpu"
    with faults.gathered():
        check_device(config.device)
        device = config.device
    calibration, opened = calibration_source(config), False
    with faults.gathered():
        if not (calibration.remote and earlier.has_tokens):
            calibration.open()
            opened = True
    inputs: RunInputs | None = None
    with faults.gathered():
        directory, tokenizer = resolve_model(model, revision), None
        described = read_json(directory / "config.json")
        if in_table(described, str(directory)):
            moe_shape(described, str(directory))
            transformers_config(described, directory)
        else:
            Skeleton(without_quantization(described), directory)
        with faults.gathered():
            tokenizer = load_tokenizer(directory)
            if opened:
                calibration.check_tokenizer(tokenizer)
        source = SourceModel(directory)
        keep_large_blocks_apart(matrix_bytes(source.shape.hidden_size, source.shape.intermediate_size))
        with faults.gathered():
            check_budget(source, config)
        dense = dense_plan(source, config.dense_bits)
        original = StreamedModel(source, device)
        streamed = original if dense is None else StreamedModel(DenseModel(source, dense), device)
        with faults.gathered():
            original.check_length(window_length(source.config, config.calib_length))
        original.try_out()
        trim()
        inputs = RunInputs(source, original, streamed, tokenizer, calibration, dense, resident_bytes())
    faults.raise_all()
    assert inputs is not None
    if workers.rank == 0:
        if said := untested(inputs.source.shape, str(inputs.source.directory)):
            console.print(said)
        if why := inputs.source.shape.family.unserved:
            console.print(f"{directory}: vLLM is not known to serve the result: {why}")
        inputs.original.warn_of_ignored()
        if inputs.dense is not None and (left := left_at_16_bits(inputs.source, inputs.dense)):
            console.print(f"--dense-bits {config.dense_bits} leaves these at 16 bits in every layer: {', '.join(left)}")
        if reason := why_no_kernels(torch.device(device)):
            console.print(f"Rounding takes several times as long {reason}")
        if lost := missing_code(directory):
            console.print(
                f"{directory}: config.json names {', '.join(lost)}, which are not there; the result names none"
            )
    return inputs


def run_sizes(inputs: RunInputs, config: QuantizeConfig) -> RunSizes:
    """The sizes by which stages state their memory: of as many bits as there can be, while none are picked."""
    source = inputs.source
    length = window_length(source.config, config.calib_length)
    state_shape = inputs.streamed.state_shape
    batch = min(config.calib_samples, batch_windows(length, state_shape.numel()))
    return RunSizes(
        source.shape, source.tensors.specs, language_config(source.config), config.bits or MAX_CODE_BITS,
        config.calib_samples * length, batch * length, length, torch.device(config.device),
        state_shape.numel() // language_config(source.config)["hidden_size"],
    )  # fmt: skip


def check_resources(
    inputs: RunInputs,
    sizes: RunSizes,
    config: QuantizeConfig,
    out: Path,
    workers: Workers,
    earlier: EarlierRun,
    plan_only: bool,
    max_memory: int | None,
) -> MemoryEstimate:
    """Estimate memory and disk, say so, and refuse a run that would take too much of either.

    The result's disk counts once its bits are known.

    Args:
        inputs, sizes: of the run.
        config, out, workers, plan_only, max_memory: see `quantize_model`.
        earlier: what an earlier run left that this one resumes.

    Raises:
        BitsmoeError: names what would be taken and what there is.
    """
    memory = estimate_run(sizes, config, inputs.baseline, inputs.calibration.memory_bytes(sizes))
    writes = config.bits is not None and not plan_only
    disk = memory.most_disk if writes else memory.disk
    if workers.rank == 0:
        console.print(
            f"Memory: about {memory.peak / 1e9:.1f} GB a process, {memory.calibration_state / 1e9:.2f} GB of it for "
            f"calibration text; disk: {disk / 1e9:.1f} GB{'' if writes or plan_only else ' or more'} while it runs"
        )
    faults = Faults()
    with faults.gathered():
        check_memory(memory, max_memory)
    if workers.rank == 0 and not earlier.complete:
        with faults.gathered():
            check_space(out, disk - held_bytes(out))
    faults.raise_all()
    return memory
