"""The commands of `bitsmoe`: options in, work elsewhere, tables out. Standard output carries results only."""

import json
import logging
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import ValidationError

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.checkpoint import Checkpoint
from offline_quant import VERSION
from offline_quant.calibration.sources.file import FileCalibration
from offline_quant.calibration.sources.registry import open_text, text_kind
from offline_quant.checkpoint.dequantize import dequantize_checkpoint
from offline_quant.checkpoint.directory import PAGE_FILE
from offline_quant.checkpoint.hub import push as push_checkpoint
from offline_quant.checkpoint.linear_layers import dense_line
from offline_quant.cli.tables import _layer_number, _show, _table, output
from offline_quant.config import QuantizeConfig
from offline_quant.evaluation.evaluate import evaluate as evaluate_model
from offline_quant.model.download import resolve_model
from offline_quant.pipeline.memory import parse_bytes
from offline_quant.pipeline.quantize import quantize_model
from offline_quant.report.collect import basis_ranks
from offline_quant.report.inspect import inspect_checkpoint, parallel_sizes_of
from offline_quant.runtime.device import check_device
from offline_quant.runtime.launch import launch_workers
from offline_quant.runtime.progress import console

app = typer.Typer(
    name="bitsmoe",
    help="About 2 bits per weight for Mixture-of-Experts models, served by vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_DEFAULTS = QuantizeConfig(bits=2)


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
def quantize(
    model: Annotated[str, typer.Argument(help="Model directory, or a name on the Hugging Face Hub.")],
    bits: Annotated[float, typer.Option(help="All-in bits per weight of the routed experts.")],
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist or be empty.")],
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of MODEL on the Hub. Default: its main branch.", show_default=False),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: self (sampled from the model), FILE (text, JSON lines or array, parquet, also in "
            "gzip) or hf:DATASET. Default: hf:allenai/c4, or self where it cannot be reached.",
            show_default=False,
        ),
    ] = None,
    calib_config: Annotated[
        str | None, typer.Option(help="Configuration of the dataset, where it has several.", show_default=False)
    ] = None,
    calib_split: Annotated[
        str | None, typer.Option(help="Split of the dataset. Default: train, or the only one.", show_default=False)
    ] = None,
    calib_column: Annotated[
        str | None,
        typer.Option(
            help="Column, or key of JSON rows, that holds the text, or messages for the model's chat template. "
            "Default: the first of text, content, messages, conversations, prompt.",
            show_default=False,
        ),
    ] = None,
    objective: Annotated[
        str, typer.Option(help="What bits are spent for: bitsmoe, alphaq, bt-moe, frequency or uniform.")
    ] = _DEFAULTS.objective,
    budget: Annotated[
        str | None,
        typer.Option(
            help="One budget for each layer, or one for the whole model: layer or model. Default: model for alphaq and "
            "bt-moe, else layer. For the others a model's budget is shared by measured sensitivities.",
            show_default=False,
        ),
    ] = None,
    basis: Annotated[
        str,
        typer.Option(
            help="Shared basis: auto (whitened where a first pass finds it clearly better than natural), natural, "
            "whitened, paper."
        ),
    ] = _DEFAULTS.basis,
    basis_bits: Annotated[int, typer.Option(help="Bits of the basis: 8 or 16.")] = _DEFAULTS.basis_bits,
    block_size: Annotated[
        int, typer.Option(help="Components that share a bit-width: 16 or 32.")
    ] = _DEFAULTS.block_size,
    dense_bits: Annotated[
        int,
        typer.Option(
            help="Bits of attention, shared experts, dense layers and lm_head: 16 (as they are), 8 or 4. vLLM serves 8 "
            "bits on GPUs only."
        ),
    ] = _DEFAULTS.dense_bits,
    gamma: Annotated[float, typer.Option(help="alphaq: power of the heavy-tail exponents.")] = _DEFAULTS.gamma,
    ranks: Annotated[
        str, typer.Option(help="bt-moe: ranks of compensators to choose from, separated by commas.")
    ] = ",".join(map(str, _DEFAULTS.ranks)),
    feedback: Annotated[
        bool, typer.Option(help="Hand rounding errors on to components not yet rounded.")
    ] = _DEFAULTS.feedback,
    refine: Annotated[
        int, typer.Option(help="Rounds of scale refit and re-rounding after the feedback.")
    ] = _DEFAULTS.refine,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Fit the experts of a layer together to the original model's hidden states, and tune scales and codes "
            "by gradients: clearly better, and several times as slow. In one process only.",
        ),
    ] = _DEFAULTS.tune,
    calib_samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = _DEFAULTS.calib_samples,
    calib_length: Annotated[
        int, typer.Option(help="Tokens in a window; at most the model's maximum is used.")
    ] = _DEFAULTS.calib_length,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = _DEFAULTS.device,
    seed: Annotated[
        int,
        typer.Option(
            help="Which windows of a longer text file are taken, and what is drawn at random. Equal inputs and seed "
            "give equal bytes."
        ),
    ] = _DEFAULTS.seed,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on after the last finished layer of a run of the same options that stopped."),
    ] = False,
    max_memory: Annotated[
        str | None,
        typer.Option(help="Refuse to begin if a process would take more, such as 24GB.", show_default=False),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            help="Processes that share the work, on as many GPUs with --device cuda. On several hosts: torchrun ... -m "
            "offline_quant.cli quantize ..., with --out where all of them see it.",
        ),
    ] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="Stop after the allocation and write the report only.")] = False,
) -> None:
    """Quantize the routed experts of a MoE model."""
    options: dict[str, Any] = {
        "bits": bits, "calib": calib, "calib_config": calib_config, "calib_split": calib_split,
        "calib_column": calib_column, "objective": objective, "budget": budget, "gamma": gamma,
        "ranks": tuple(r.strip() for r in ranks.split(",")), "feedback": feedback, "basis": basis,
        "basis_bits": basis_bits, "block_size": block_size, "dense_bits": dense_bits, "refine": refine, "tune": tune,
        "calib_samples": calib_samples, "calib_length": calib_length, "device": device, "seed": seed,
    }  # fmt: skip
    start = time.monotonic()
    limit = None if max_memory is None else parse_bytes(max_memory)
    with launch_workers(workers) as team:
        console.quiet = team.rank > 0
        try:
            outcome = quantize_model(model, out, _config(options), plan, resume, team, limit, revision)
        finally:
            console.quiet = False  # what was wrong is said by everybody
        if team.rank:
            return
    report = outcome.report
    title = f"{out} ({'plan only' if plan else 'quantized'})"
    columns = ("layer", "basis", "rank", "bpw", "predicted error", "measured error", "output error")
    table = _table(*columns, "tokens per expert")
    for row in report["layers"]:
        measured, tokens = row["measured_error"], row["tokens_per_expert"]
        table.add_row(
            _layer_number(row["layer"]), row["basis"], basis_ranks(row) or "-",
            f"{row['bpw']:.4f}", f"{row['predicted_error']:.4f}",
            "-" if measured is None else f"{measured:.4f}",
            "-" if row["output_error"] is None else f"{row['output_error']:.4f}", f"{tokens['min']}-{tokens['max']}",
        )  # fmt: skip
    _show(title, table)
    output.print(f"Solver gap, proven: at most {max(row['solver_gap'] for row in report['layers']):.1e}")
    for row in report["layers"]:
        if row["unseen_experts"]:
            output.print(
                f"{row['layer']}: calibration never reached expert(s) {row['unseen_experts']}; they were "
                "quantized from statistics pooled over all tokens",
                style="yellow",
            )
    for row in report["layers"]:
        if row["extreme_experts"]:
            output.print(f"{row['layer']}: expert(s) {row['extreme_experts']} put out far more than the others")
    if (sanity := report["sanity"]) is not None:
        if sanity["degenerate"]:
            output.print(f"This model is broken: {'; '.join(sanity['faults'])}. {sanity['advice']}", style="bold red")
        else:
            output.print(
                f"Sane: perplexity {sanity['perplexity_original']:.4g} -> {sanity['perplexity_quantized']:.4g} on "
                f"{sanity['tokens']} tokens of the calibration text"
            )
    if report["dense_layers"]:
        output.print(dense_line(report["dense_layers"]))
    output.print(f"Report: {out / PAGE_FILE}")
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in outcome.seconds.items())
    output.print(
        f"{report['bpw']:.4f} bits per weight all-in ({report['expert_bytes'] / 1e6:.2f} MB of experts), "
        f"{time.monotonic() - start:.1f} s ({stages})"
    )


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="A bitsmoe checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show all-in bits per weight and where the bits of a checkpoint went."""
    checkpoint = Checkpoint(_existing(directory))
    checkpoint.check()
    data = inspect_checkpoint(checkpoint)
    if as_json:
        print(json.dumps(data))
        return
    title = f"{directory}: {data['bpw']:.4f} bits per weight all-in"
    columns = ("layer", "projection", "bpw", "code bits by expert", "codes", "scales", "basis", "rank", "other")
    table = _table(*columns)
    for layer in data["layers"]:
        for name, p in layer["projections"].items():
            parts = p["bytes"]
            scales = parts["component_scale"] + parts["feature_scale"]
            basis = parts.get("basis", 0) + parts.get("basis_scale", 0)
            other = sum(parts.values()) - parts["codes"] - scales - basis
            spread = p["code_bits_by_expert"]
            total = sum(parts.values())
            shares = [f"{n / total:.1%}" for n in (parts["codes"], scales, basis, other)]
            bits_range = f"{min(spread):.2f}-{max(spread):.2f}"
            stored = checkpoint.config.layers[layer["layer"]].projections[name].basis
            rank = str(stored.rank) if stored else "-"
            table.add_row(
                _layer_number(layer["layer"]), name, f"{p['bpw']:.4f}", bits_range, *shares[:3], rank, shares[3]
            )
    _show(title, table)
    counted = sum(data["weights_by_width"].values())
    histogram = _table("bits", "share", "")
    for width, count in data["weights_by_width"].items():
        histogram.add_row(width, f"{count / counted:.1%}", "█" * round(50 * count / counted))
    _show("Stored factor entries by bit-width", histogram)
    if data["dense_layers"]:
        output.print(dense_line(data["dense_layers"]))
    output.print(f"experts {data['expert_bytes'] / 1e6:.2f} MB, everything else {data['other_bytes'] / 1e6:.2f} MB")
    output.print(f"serving: {parallel_sizes_of(checkpoint)}")


@app.command()
def dequantize(
    directory: Annotated[Path, typer.Argument(help="A bitsmoe checkpoint.")],
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist or be empty.")],
    dtype: Annotated[Dtype, typer.Option(help="Of dequantized weights; float32 is exact.")] = Dtype.bfloat16,
) -> None:
    """Write an ordinary checkpoint with the same weights, for other engines."""
    dequantize_checkpoint(_existing(directory), out, getattr(torch, dtype.value))
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
    output.print(push_checkpoint(_existing(directory), repo_id, private, revision), soft_wrap=True)


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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity over non-overlapping windows of min(2048, the model's maximum) tokens."""
    if text_kind(str(text)) is not FileCalibration:
        raise BitsmoeError(f"--text {text}: must be a file; write the dataset's text into one")
    source = open_text(str(text), "--text", column=text_column)
    check_device(device)
    if reference_revision and not reference:
        raise BitsmoeError(f"--reference-revision {reference_revision}: there is no --reference; leave it out")
    other = resolve_model(reference, reference_revision, "--reference-revision") if reference else None
    result = evaluate_model(resolve_model(directory, revision), source, other, device)
    if as_json:
        print(json.dumps(result.as_dict()))
        return
    figures = result.as_dict()
    table = _table("figure", "value", "standard error")
    for name, value in figures.items():
        if not name.endswith("_stderr"):
            error = figures.get(f"{name}_stderr")
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.5f}"
            table.add_row(name, shown, "" if error is None else f"{error:.5f}")
    _show(f"{directory} on {text.name}", table)


def _existing(directory: Path) -> Path:
    if not directory.is_dir():
        raise BitsmoeError(f"{directory}: no such directory")
    return directory


def _config(options: dict[str, Any]) -> QuantizeConfig:
    try:
        return QuantizeConfig(**options)
    except ValidationError as e:
        faults = [
            f"--{str(err['loc'][0]).replace('_', '-')} {err['input']!r}: {err['msg']}"
            if err["loc"]
            else err["msg"].removeprefix("Value error, ")
            for err in e.errors()
        ]
        raise BitsmoeError("\n".join(faults)) from None
