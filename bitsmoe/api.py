"""The functions of `import bitsmoe`. They do what the commands of the same names do."""

from collections.abc import Callable
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import Concatenate, Literal, ParamSpec, get_args

import torch

from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.checkpoint.dequantize import dequantize_checkpoint
from offline_quant.checkpoint.directory import existing_directory
from offline_quant.checkpoint.hub import push as push_checkpoint
from offline_quant.config import QuantizeConfig, RunOptions, named_options
from offline_quant.evaluation.evaluate import Evaluation, evaluate_named
from offline_quant.pipeline.memory import parse_bytes
from offline_quant.pipeline.quantize import QuantizationResult, quantize_model
from offline_quant.report.inspect import inspect_directory
from offline_quant.report.schema import Inspection

__all__ = ["QuantizeConfig", "dequantize", "evaluate", "inspect", "push", "quantize"]

StrPath = str | Path
Dtype = Literal["float32", "bfloat16", "float16"]
Options = ParamSpec("Options")
Run = Callable[[StrPath, StrPath, RunOptions], QuantizationResult]
RunWithKeywords = Callable[Concatenate[StrPath, StrPath, Options], QuantizationResult]


def _with_keywords(options: Callable[Options, RunOptions]) -> Callable[[Run], RunWithKeywords[Options]]:
    """Turn the third argument of a function into keywords with the names, types and defaults of `options`."""

    def decorate(run: Run) -> RunWithKeywords[Options]:
        parameters = list(signature(run).parameters.values())[:2]
        parameters += [p.replace(annotation=p.empty) for p in signature(options).parameters.values()]
        shown = Signature(parameters)

        @wraps(run)
        def call(model: StrPath, out: StrPath, *args: Options.args, **kwargs: Options.kwargs) -> QuantizationResult:
            shown.bind(model, out, *args, **kwargs)  # a TypeError for a wrong name, as of any function
            with named_options():
                given = options(*args, **kwargs)
            return run(model, out, given)

        call.__signature__ = shown  # type: ignore[attr-defined]
        return call

    return decorate


@_with_keywords(RunOptions)
def quantize(model: StrPath, out: StrPath, options: RunOptions) -> QuantizationResult:
    """Quantize the routed experts of a MoE model and write a checkpoint that vLLM serves.

    With `plan=True` it stops after the allocation and writes the report only:

        >>> result = bitsmoe.quantize("tiny_moe", "plan", bits=2.0, calib="calib.txt", calib_samples=4, plan=True)
        >>> result.report.bpw <= 2.0
        True
        >>> result.report.layers[0].predicted_error < 0.1
        True
        >>> "allocation" in result.seconds
        True

    Args:
        model: directory, or name on the Hugging Face Hub.
        out: directory to write; must not exist or be empty.
        options: keywords. `bits` or `target_kl` is required. All have the names of options of `bitsmoe quantize`: the
            fields of `QuantizeConfig`, and `revision`, `resume`, `max_memory` (bytes, or text such as "24GB") and
            `plan`.

    Returns:
        `report` (the content of `bitsmoe_report.json`, with attributes), `seconds`, `cpu_seconds` and `peak_bytes` by
        stage, and `memory`, the estimate made before the run.

    Raises:
        BitsmoeError: a fault of an option or of the model. Messages name options as on the command line. Nothing is
            left behind, or finished layers that `resume=True` goes on with.
    """
    limit = parse_bytes(options.max_memory) if isinstance(options.max_memory, str) else options.max_memory
    result = quantize_model(
        str(model), Path(out), options.config(), options.plan, options.resume, None, limit, options.revision
    )
    assert result is not None, "one process alone has the result"
    return result


def evaluate(
    checkpoint: StrPath,
    text: StrPath,
    reference: StrPath | None = None,
    *,
    text_column: str | None = None,
    device: str = "cpu",
    revision: str | None = None,
    reference_revision: str | None = None,
    reference_states: StrPath | None = None,
) -> Evaluation:
    """Measure perplexity on a text and, with a reference, KL divergence and top-1 agreement.

        >>> figures = bitsmoe.evaluate("tiny-3bit", text="held_out.txt", reference="tiny_moe")
        >>> 0 < figures.kl < 0.1
        True

    Args:
        checkpoint: quantized or ordinary checkpoint: directory, or name on the Hugging Face Hub.
        text: file of text, JSON lines or array, parquet, also in gzip.
        reference: checkpoint to compare with, usually the unquantized one.
        text_column: column or key that holds the text. Default: chosen as for calibration text.
        device: "cpu" or "cuda".
        revision: branch, tag or commit of `checkpoint` on the Hub.
        reference_revision: the same for `reference`.
        reference_states: file that keeps the reference's pass over the text for later calls: read where it exists,
            else written.

    Returns:
        Figures as attributes, with standard errors; those that need a reference are None without one.

    Raises:
        BitsmoeError: damaged checkpoint, unreadable text, or two models that cannot be compared.
    """
    return evaluate_named(
        str(checkpoint), str(text), None if reference is None else str(reference), text_column=text_column,
        device=device, revision=revision, reference_revision=reference_revision,
        reference_states=None if reference_states is None else Path(reference_states),
    )  # fmt: skip


def inspect(checkpoint: StrPath) -> Inspection:
    """Check a checkpoint, and say where its bits went and how it can be served.

        >>> found = bitsmoe.inspect("tiny-3bit")
        >>> found.layers[0].projections["down"].bpw < 4
        True
        >>> found.parallel_sizes.tensor
        (1, 2, 4, 8)

    Args:
        checkpoint: directory of a bitsmoe checkpoint.

    Raises:
        BitsmoeError: no such directory, or a damaged checkpoint.
    """
    return inspect_directory(Path(checkpoint))


def dequantize(checkpoint: StrPath, out: StrPath, dtype: Dtype = "bfloat16") -> None:
    """Write an ordinary checkpoint with the same weights, for other engines.

        >>> bitsmoe.dequantize("tiny-3bit", "tiny-plain", dtype="float32")

    Args:
        checkpoint: directory of a bitsmoe checkpoint.
        out: directory to write; must not exist or be empty.
        dtype: of the dequantized weights: "float32" (exact), "bfloat16" or "float16".

    Raises:
        BitsmoeError: another dtype, a damaged checkpoint, or `out` cannot be written; nothing is left behind.
    """
    if dtype not in get_args(Dtype):
        raise BitsmoeError(f"--dtype {dtype}: must be one of {', '.join(get_args(Dtype))}")
    dequantize_checkpoint(existing_directory(Path(checkpoint)), Path(out), getattr(torch, dtype))


def push(checkpoint: StrPath, repo_id: str, private: bool = False, revision: str | None = None) -> str:
    """Check a checkpoint in full, then upload it to the Hugging Face Hub.

        >>> address = bitsmoe.push("tiny-3bit", "me/tiny-3bit", private=True)

    Args:
        checkpoint: directory of a bitsmoe checkpoint.
        repo_id: OWNER/NAME; made if it does not exist.
        private: upload into a private repository only.
        revision: branch, made if it does not exist. Default: main.

    Returns:
        Address of the repository, at the branch.

    Raises:
        BitsmoeError: every fault found before anything is sent; or the Hub refuses.
    """
    return push_checkpoint(existing_directory(Path(checkpoint)), repo_id, private, revision)
