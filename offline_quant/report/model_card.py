"""The model card (README.md) of a checkpoint."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData

from bitsmoe_kernels.format.checkpoint import Checkpoint
from bitsmoe_kernels.format.safetensors_io import file_fault
from bitsmoe_kernels.models.families import why_not_served
from offline_quant.calibration.sources.base import CalibrationText
from offline_quant.calibration.sources.hub import hub_dataset
from offline_quant.checkpoint.directory import PAGE_FILE, REPORT_FILE
from offline_quant.model.download import hub_snapshot
from offline_quant.model.side_files import CARD_FILE
from offline_quant.report.schema import ModelReport

LIBRARY, PIPELINE, TAGS = "vllm", "text-generation", ["bitsmoe", "mixture-of-experts", "quantized"]
"""Metadata that the Hub's pages and searches use."""


def base_model(model: str, directory: Path) -> tuple[str | None, str]:
    """Hub name of a model (None without one), and the name to show.

    A snapshot in the Hub's cache has a Hub name. Of another local directory only the last part is shown.

    Args:
        model: directory or name, from the user.
        directory: where the model is.
    """
    if not Path(model).is_dir():
        return model, model
    if snapshot := hub_snapshot(directory):
        return snapshot.name, snapshot.name
    return None, directory.resolve().name


def source_license(source: Path, base: str | None) -> dict[str, Any]:
    """`license`, `license_name` and `license_link` of the original's card; empty without a readable card.

    Args:
        source: directory of the original.
        base: its Hub name. It completes a link to a file of the original; without it such a link is left out.
    """
    if file_fault(source, CARD_FILE):
        return {}
    try:
        card = ModelCard((source / CARD_FILE).read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    found = {k: v for k in ("license", "license_name", "license_link") if (v := card.data.get(k)) is not None}
    link = found.get("license_link")
    if isinstance(link, str) and not link.startswith(("https://", "http://")):
        if base is None:
            del found["license_link"]
        else:
            found["license_link"] = f"https://huggingface.co/{base}/blob/main/{link.removeprefix('./')}"
    return found


def write_card(directory: Path, model: str, source: Path, report: ModelReport, text: CalibrationText) -> None:
    """Write the model card of a checkpoint. Equal inputs give equal bytes: it holds no dates, hosts or paths.

    Args:
        directory: the checkpoint.
        model: directory or Hub name of the original, from the user.
        source: directory of the original.
        report: of the run.
        text: calibration text.
    """
    base, name = base_model(model, source)
    snapshot = hub_snapshot(source)
    checkpoint = Checkpoint(directory)
    unserved = why_not_served(checkpoint.model_config)
    data = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name=LIBRARY,
        pipeline_tag=PIPELINE,
        tags=TAGS,
        datasets=[dataset] if (dataset := hub_dataset(text.recorded)) else None,
        **source_license(source, base),
    )
    total = sum(spec.nbytes for spec in checkpoint.tensors.specs.values())
    body = "\n".join(
        [
            *_head(name, base, snapshot.commit if snapshot else None, report, total),
            *(_unserved(unserved) if unserved else _serving(checkpoint.config.tool_version)),
            *_layers(report),
            *_making(name, report, text, checkpoint),
        ]
    )
    (directory / CARD_FILE).write_text(f"---\n{data.to_yaml()}\n---\n\n{body}\n", encoding="utf-8")


def _code(value: object) -> str:
    """Inline code for a table's cell. Names of files and directories may hold any character."""
    shown = "".join(c if c.isprintable() else " " for c in str(value))
    return f"`{shown.replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _head(name: str, base: str | None, commit: str | None, report: ModelReport, total: int) -> list[str]:
    experts = report.expert_bytes
    original = f"[{base}](https://huggingface.co/{base})" if base else _code(name)
    others, linear_size = "nothing else is", []
    if (linear := report.dense_layers) is not None:
        bits = " and ".join(map(str, linear.bits))
        others = f"the linear layers outside them are at {bits} bits"
        linear_size = [f"| size of the linear layers outside the experts | {linear.bytes / 1e6:,.2f} MB |"]
        total -= linear.bytes
    lines = [
        f"# {_code(name.rpartition('/')[2])}, experts at {report.bpw:.3f} bits per weight",
        "",
        f"The routed experts of this Mixture-of-Experts model are quantized with bitsmoe-vllm; {others}.",
        "",
        "| | |",
        "|---|---|",
        f"| original model | {original} |",
        *([f"| its commit | {_code(commit)} |"] if commit else []),
        f"| bits per expert weight, scales, bases and metadata counted | {report.bpw:.4f} |",
        f"| expert weights | {report.expert_weights:,} |",
        f"| size of the experts | {experts / 1e6:,.2f} MB |",
        *linear_size,
        f"| size of everything else | {(total - experts) / 1e6:,.2f} MB |",
    ]
    if (expected := report.forecast) is not None:
        lines.append(
            f"| KL divergence from the original, forecast | {expected.kl:.2g} nats a token, {expected.low:.2g} to "
            f"{expected.high:.2g} |"
        )
        if expected.measured is not None:
            lines.append(
                f"| the same, measured on {expected.tokens:,} tokens that it was calibrated on | "
                f"{expected.measured:.2g} |"
            )
    if (sanity := report.sanity) is not None:
        tokens = f"{sanity.tokens:,} tokens of the calibration text"
        before, after = sanity.perplexity_original, sanity.perplexity_quantized
        lines += [
            f"| perplexity of the original on {tokens} | {before:.4g} |",
            f"| perplexity of this model on them | {'infinite' if after is None else f'{after:.4g}'} |",
        ]
        if sanity.degenerate:
            lines += ["", f"**This model is broken: {'; '.join(sanity.faults)}.**"]
    return [*lines, ""]


def _unserved(why: str) -> list[str]:
    return [
        "## Use it",
        "",
        f"vLLM is not known to serve it: {why}. `bitsmoe dequantize` makes an ordinary checkpoint of it.",
        "",
    ]


def _serving(tool_version: str) -> list[str]:
    return [
        "## Serve it",
        "",
        f"With vLLM and the plugin of bitsmoe-vllm {tool_version} or newer, where MODEL is this repository's name or a "
        "directory with its files:",
        "",
        "    vllm serve MODEL --quantization bitsmoe",
        "",
        "`bitsmoe dequantize` makes an ordinary checkpoint of it, for other engines.",
        "",
    ]


def _layers(report: ModelReport) -> list[str]:
    lines = [
        "## Layers",
        "",
        "Errors are relative: squared error of the projections' outputs on the calibration text over their squares.",
        "",
        "| layer | basis | bits per weight | predicted error | measured error |",
        "|---|---|---|---|---|",
    ]
    for row in report.layers:
        measured = "-" if row.measured_error is None else f"{row.measured_error:.4f}"
        lines.append(f"| `{row.layer}` | {row.basis} | {row.bpw:.4f} | {row.predicted_error:.4f} | {measured} |")
    return [*lines, ""]


def _making(name: str, report: ModelReport, text: CalibrationText, checkpoint: Checkpoint) -> list[str]:
    lines = [
        "## How it was made",
        "",
        f"`bitsmoe quantize` on {_code(name)}, {report.calibration_tokens:,} tokens of calibration text "
        f"({_code(text.description)}); bits for each block of components by an integer program under one budget, "
        "rounding with error feedback. Options as recorded in `config.json`, more figures in "
        f"`{REPORT_FILE}` and `{PAGE_FILE}`:",
        "",
        "| option | value |",
        "|---|---|",
        *(f"| {key} | {_code(value)} |" for key, value in report.options.items()),
        "",
        f"bitsmoe-vllm {checkpoint.config.tool_version}, checkpoint format {checkpoint.config.format_version}, "
        f"torch {torch.__version__}, transformers {version('transformers')}.",
    ]
    return lines
