"""The commands of `bitsmoe`: options in, work elsewhere, tables out. Standard output carries results only."""

import json
import logging
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from offline_quant import VERSION
from offline_quant.checkpoint.dequantize import dequantize_checkpoint
from offline_quant.checkpoint.directory import existing_directory
from offline_quant.checkpoint.hub import push as push_checkpoint
from offline_quant.cli.options import options_of, split_lists
from offline_quant.cli.tables import output, print_evaluation, print_inspection, print_probe, print_run, print_times
from offline_quant.config import RunOptions, named_options
from offline_quant.evaluation.evaluate import evaluate_named
from offline_quant.model.probe import probe as probe_model
from offline_quant.pipeline.memory import parse_bytes
from offline_quant.pipeline.quantize import quantize_model
from offline_quant.report.inspect import inspect_directory
from offline_quant.runtime.launch import launch_workers
from offline_quant.runtime.progress import console

app = typer.Typer(
    name="bitsmoe",
    help="About 2 bits per weight for Mixture-of-Experts models, served by vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Dtype(StrEnum):
    """Weight dtypes `bitsmoe dequantize` writes."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"bitsmoe-vllm {VERSION}")
        raise typer.Exit


@app.callback()
def _setup(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)


@app.command()
@options_of(RunOptions)
def quantize(
    model: Annotated[str, typer.Argument(help="Model directory, or a name on the Hugging Face Hub.")],
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist or be empty.")],
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Processes that share the work, on as many GPUs with --device cuda. On several hosts: torchrun ... -m "
            "offline_quant.cli quantize ..., with --out where all of them see it. Not with options that tune.",
        ),
    ] = 1,
    **options: Any,
) -> None:
    """Quantize the routed experts of a MoE model."""
    start = time.monotonic()
    limit = None if options["max_memory"] is None else parse_bytes(options["max_memory"])
    with launch_workers(workers) as team:
        console.quiet = team.rank > 0
        try:
            with named_options():
                run = RunOptions(**split_lists(options, RunOptions))
            result = quantize_model(model, out, run.config(), run.plan, run.resume, team, limit, run.revision)
        finally:
            console.quiet = False  # every process says what is wrong
    if result is not None:
        print_run(result.report, out, run.plan)
        print_times(result.report, time.monotonic() - start, result.seconds)


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="Model directory, or a name on the Hugging Face Hub.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub name. Default: main.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say whether a model can be quantized, from config.json and the index of its weights alone."""
    found = probe_model(model, revision)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        print_probe(found, model)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="A bitsmoe checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show all-in bits per weight and where the bits of a checkpoint went."""
    report = inspect_directory(directory)
    if as_json:
        print(report.to_json())
    else:
        print_inspection(report, directory)


@app.command()
def dequantize(
    directory: Annotated[Path, typer.Argument(help="A bitsmoe checkpoint.")],
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist or be empty.")],
    dtype: Annotated[Dtype, typer.Option(help="Of dequantized weights; float32 is exact.")] = Dtype.bfloat16,
) -> None:
    """Write an ordinary checkpoint with the same weights, for other engines."""
    dequantize_checkpoint(existing_directory(directory), out, getattr(torch, dtype.value))
    output.print(f"{out}: dequantized weights in {dtype.value}")


@app.command()
def push(
    directory: Annotated[Path, typer.Argument(help="A bitsmoe checkpoint.")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face Hub; made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Only into a private repository.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch, made if it does not exist. Default: main.", show_default=False)
    ] = None,
) -> None:
    """Check a checkpoint in full, then upload it to the Hugging Face Hub."""
    output.print(push_checkpoint(existing_directory(directory), repo_id, private, revision))


@app.command("eval")
def evaluate(
    directory: Annotated[str, typer.Argument(help="A checkpoint directory, quantized or ordinary, or a Hub name.")],
    text: Annotated[Path, typer.Option(help="File of text, JSON lines or array, parquet, also in gzip.")],
    reference: Annotated[
        str | None, typer.Option(help="Model to compare with: adds KL divergence, top-1 agreement and excess.")
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(help="Column or key that holds the text. Default: as `quantize` chooses it.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub name. Default: main.", show_default=False)
    ] = None,
    reference_revision: Annotated[str | None, typer.Option(help="The same of --reference.", show_default=False)] = None,
    reference_states: Annotated[
        Path | None,
        typer.Option(help="File that keeps the reference's pass over the text for later calls.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity over non-overlapping windows of min(2048, the model's maximum) tokens."""
    result = evaluate_named(
        directory, str(text), reference, text_column=text_column, device=device, revision=revision,
        reference_revision=reference_revision, reference_states=reference_states,
    )  # fmt: skip
    if as_json:
        print(json.dumps(result.as_dict()))
    else:
        print_evaluation(result.as_dict(), f"{directory} on {text.name}")
