"""Every check that needs no weights, before the expensive steps; all faults at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitsmoe_kernels.errors import BitsmoeError, Faults
from bitsmoe_kernels.format.linear_layers import DenseConfig
from bitsmoe_kernels.format.safetensors_io import read_json
from bitsmoe_kernels.models.families import moe_shape
from offline_quant.allocation.budget import budget_bits
from offline_quant.allocation.objectives import OBJECTIVES, forms_of
from offline_quant.calibration.sources import TextSource, open_text
from offline_quant.calibration.windows import load_tokenizer
from offline_quant.checkpoint.directory import check_output
from offline_quant.checkpoint.linear_layers import DenseModel, dense_plan
from offline_quant.config import SELF, QuantizeConfig
from offline_quant.model.download import resolve_model
from offline_quant.model.side_files import missing_code
from offline_quant.model.source import SourceModel
from offline_quant.model.streaming import StreamedModel, transformers_config
from offline_quant.pipeline.resume import state_directory
from offline_quant.runtime.chunks import matrix_bytes
from offline_quant.runtime.device import check_device
from offline_quant.runtime.distributed import Workers
from offline_quant.runtime.malloc import keep_large_blocks_apart, resident_bytes, trim
from offline_quant.runtime.progress import console


def check_budget(source: SourceModel, config: QuantizeConfig) -> None:
    """Refuse an impossible budget from the model's shape alone, before calibration.

    Raises:
        BitsmoeError: names the smallest possible budget.
    """
    schemas = [form.schema(source.shape, config.basis_bits) for form in forms_of(config)]
    least = min(schemas, key=lambda schema: schema.nbytes(config.block_size))
    budget_bits(least, config, str(source.directory))
    OBJECTIVES[config.objective].check(source.shape)


@dataclass(frozen=True)
class RunInputs:
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


def check_inputs(
    model: str, revision: str | None, out: Path, config: QuantizeConfig, workers: Workers, leaving: bool, known: bool
) -> RunInputs:
    """Everything that can be checked without reading the weights, all faults at once.

    Args:
        model, revision, out, config, workers: see `quantize_model`.
        leaving: an earlier run had made everything, and what is there is its result.
        known: an earlier run has the calibration tokens.

    Raises:
        BitsmoeError: lists them.
    """
    faults = Faults()
    with faults.gathered():
        if config.tune and workers.size > 1:
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
        text = None if known else open_calibration(config)
    inputs: RunInputs | None = None
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
        trim()  # what looking at all this has freed
        inputs = RunInputs(source, original, streamed, tokenizer, text, dense, resident_bytes())
    faults.raise_all()
    assert inputs is not None
    if workers.rank == 0:
        inputs.original.warn_of_ignored()
        if lost := missing_code(directory):
            console.print(
                f"{directory}: config.json names {', '.join(lost)}, which are not there; the result names none"
            )
    return inputs


def open_calibration(config: QuantizeConfig) -> TextSource | None:
    """The calibration text that was chosen; None: none is to be read, or the default dataset."""
    if config.calib is None or config.calib == SELF:
        return None
    return open_text(config.calib, "--calib", config.calib_config, config.calib_split, config.calib_column)
