"""Perplexity of a model, and its divergence from a reference model, over non-overlapping windows of text."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.models.families import language_config
from offline_quant.calibration.sources.file import FileCalibration
from offline_quant.calibration.sources.registry import open_text, text_kind
from offline_quant.calibration.text_source import TextSource
from offline_quant.calibration.windows import load_tokenizer, text_windows, window_length
from offline_quant.evaluation.reference_states import StatesFile
from offline_quant.model.download import resolve_model
from offline_quant.model.quantized import QuantizedModel, open_model
from offline_quant.model.streaming import Head, StreamedModel
from offline_quant.model.tensors import WeightSource
from offline_quant.runtime.device import check_device
from offline_quant.runtime.progress import bar

MAX_WINDOW = 2048
"""Tokens in a window, at most."""
BATCH_TOKENS = 8192
"""Tokens that pass through a layer together."""
_HEAD_TOKENS = 2048
"""Tokens whose logits are in memory together."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on one text.

    A standard error estimates how far a figure would move on another text of the same kind and length. It treats
    windows as independent, but not the tokens of a window. It is None where there is only one window.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of all tokens except the first of each window.
        tokens: number of predicted tokens.
        window: tokens in a window.
        bpw: bits per weight of the routed experts, all-in for a bitsmoe checkpoint.
        kl: mean KL(reference || model), nats per token; None without a reference.
        top1_agreement: fraction of tokens where both models rank the same token first; None without a reference.
        perplexity_reference: perplexity of the reference; None without one.
        excess: perplexity minus that of the reference; None without one.
        perplexity_stderr, kl_stderr, top1_agreement_stderr, excess_stderr: standard errors. That of the excess is
            paired: text that is hard for both models does not count.
    """

    perplexity: float
    tokens: int
    window: int
    bpw: float
    perplexity_stderr: float | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    top1_agreement: float | None = None
    top1_agreement_stderr: float | None = None
    perplexity_reference: float | None = None
    excess: float | None = None
    excess_stderr: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """This evaluation as JSON data, without figures that were not measured."""
        return {k: v for k, v in asdict(self).items() if v is not None}


def evaluate_named(
    model: str,
    text: str,
    reference: str | None = None,
    *,
    text_column: str | None = None,
    device: str = "cpu",
    revision: str | None = None,
    reference_revision: str | None = None,
    reference_states: Path | None = None,
) -> Evaluation:
    """Evaluate a checkpoint given by a directory or a Hub name; the work of `bitsmoe eval`.

    Args:
        model: quantized or ordinary checkpoint.
        text: file of text, JSON lines or array, parquet, also in gzip.
        reference: checkpoint to compare with, usually the unquantized one.
        text_column: column or key that holds the text; None: chosen as for calibration text.
        device: cpu, cuda or cuda:N.
        revision: branch, tag or commit of `model` on the Hub.
        reference_revision: the same for `reference`.
        reference_states: file that keeps the reference's hidden states, see `evaluate`.

    Raises:
        BitsmoeError: a fault of an argument, or as `evaluate`.
    """
    if text_kind(text) is not FileCalibration:
        raise BitsmoeError(f"--text {text}: must be a file; write the dataset's text into one")
    source = open_text(text, "--text", column=text_column)
    check_device(device)
    if reference_revision and not reference:
        raise BitsmoeError(f"--reference-revision {reference_revision}: there is no --reference; leave it out")
    if reference_states and not reference:
        raise BitsmoeError(f"--reference-states {reference_states}: there is no --reference; leave it out")
    other = resolve_model(reference, reference_revision, "--reference-revision") if reference else None
    return evaluate(resolve_model(model, revision), source, other, device, reference_states)


def evaluate(
    model: Path,
    text: Path | TextSource,
    reference: Path | None = None,
    device: str = "cpu",
    reference_states: Path | None = None,
) -> Evaluation:
    """Evaluate a checkpoint in float32, with one decoder layer in memory at a time.

    Args:
        model: directory of a quantized or ordinary checkpoint.
        text: file of text, or an opened source.
        reference: directory of the checkpoint to compare with, usually the unquantized one.
        device: where layers run.
        reference_states: file that keeps the reference's hidden states for later calls: read where it exists, else
            written. None: they are not kept.

    Raises:
        BitsmoeError: damaged checkpoint, unreadable text, two models that cannot be compared, or a file of other
            hidden states.
    """
    text = text if isinstance(text, TextSource) else open_text(str(text))
    source = open_model(model)
    other = open_model(reference) if reference else None
    if other:
        _check_comparable(source, other)
    length = window_length(source.config, MAX_WINDOW)
    windows = text_windows(load_tokenizer(model), text, length)
    compared = _kept_states(other, windows, device, reference_states) if other else None
    return _compare(final_states(source, windows, device), compared, windows, bits_per_weight(source))


def _kept_states(source: WeightSource, windows: Tensor, device: str, path: Path | None) -> "States":
    """Final states of a reference; from the file where it exists, else written to it. None: they are not kept."""
    kept = StatesFile(path, source.directory, windows) if path else None
    known = kept.read() if kept else None
    states = final_states(source, windows, device, known)
    if kept and known is None:
        kept.write(states.hidden)
    return states


class Reference:
    """A reference model that is run once, to compare many models with it on one text.

    Args:
        model: checkpoint directory.
        text: file of text.
        device: where layers run.
        states: file that keeps its hidden states for later calls, see `evaluate`.
    """

    def __init__(self, model: Path, text: Path, device: str = "cpu", states: Path | None = None):
        self.source, self.device = open_model(model), device
        length = window_length(self.source.config, MAX_WINDOW)
        self.windows = text_windows(load_tokenizer(model), open_text(str(text)), length)
        self.states = _kept_states(self.source, self.windows, device, states)

    def evaluate(self, model: Path) -> Evaluation:
        """Evaluate a checkpoint against this reference, see the function `evaluate`.

        Raises:
            BitsmoeError: damaged checkpoint, or two models that cannot be compared.
        """
        source = open_model(model)
        _check_comparable(source, self.source)
        states = final_states(source, self.windows, self.device)
        return _compare(states, self.states, self.windows, bits_per_weight(source))


def _check_comparable(model: WeightSource, reference: WeightSource) -> None:
    own, other = (language_config(m.config)["vocab_size"] for m in (model, reference))
    if own != other:
        raise BitsmoeError(
            f"--reference {reference.directory}: vocab_size is {other}, that of {model.directory} is {own}; only "
            "models with one vocabulary can be compared"
        )


def _compare(model: "States", reference: "States | None", windows: Tensor, bpw: float) -> Evaluation:
    # Means over the tokens of each window: loss; with a reference also its loss, the divergence and the agreement.
    rows: list[Tensor] = []
    step = max(1, _HEAD_TOKENS // windows.shape[1])
    for start in range(0, len(windows), step):
        logp = model.log_probabilities(start, step)
        target = windows[start : start + step, 1:].to(logp.device)[..., None]
        figures = [-logp.gather(-1, target)[..., 0]]
        if reference is not None:
            reference_logp = reference.log_probabilities(start, step)
            figures.append(-reference_logp.gather(-1, target)[..., 0])
            figures.append((reference_logp.exp() * (reference_logp - logp)).sum(-1))
            figures.append(reference_logp.argmax(-1) == logp.argmax(-1))
        rows.append(torch.stack([figure.double().mean(1) for figure in figures], 1))
    means = torch.cat(rows)
    for states, losses in zip([model] if reference is None else [model, reference], means.T, strict=False):
        if not losses.isfinite().all():
            raise BitsmoeError(
                f"{states.model.source.directory}: its predictions are not finite; a tensor holds NaN, infinity or far "
                "too large values, so make or download the checkpoint again"
            )
    nll, *compared = means.T
    perplexity = _perplexity(nll)
    result = Evaluation(
        perplexity, windows[:, 1:].numel(), windows.shape[1], bpw, perplexity_stderr=_stderr(perplexity * nll)
    )
    if not compared:
        return result
    reference_nll, kl, agreement = compared
    reference_perplexity = _perplexity(reference_nll)
    return replace(
        result,
        kl=float(kl.mean()),
        kl_stderr=_stderr(kl),
        top1_agreement=float(agreement.mean()),
        top1_agreement_stderr=_stderr(agreement),
        perplexity_reference=reference_perplexity,
        excess=perplexity - reference_perplexity,
        # To first order.
        excess_stderr=_stderr(perplexity * nll - reference_perplexity * reference_nll),
    )


def _perplexity(losses: Tensor) -> float:
    return float(losses.mean().exp())


def _stderr(values: Tensor) -> float | None:
    """Standard error of the mean of independent values [n]; None for one value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None


@dataclass(frozen=True)
class States:
    """Hidden states that leave a model's last layer.

    Attributes:
        hidden: float32 [n, L, H], on the CPU.
        head: makes logits.
        model: gives the final norm.
    """

    hidden: Tensor
    head: Head
    model: StreamedModel

    def log_probabilities(self, start: int, count: int) -> Tensor:
        """Log-probabilities [count, L - 1, V] at all tokens except the first, of `count` windows from `start`."""
        return self.model.logits(self.hidden[start : start + count, :-1], self.head).log_softmax(-1)


def final_states(source: WeightSource, windows: Tensor, device: str, known: Tensor | None = None) -> States:
    """Run a model over windows, int64 [n, L]; not where its hidden states are known, float32 [n, L, ...]."""
    model = StreamedModel(source, device)
    return States(_pass(model, windows) if known is None else known, model.head, model)


def _pass(model: StreamedModel, windows: Tensor) -> Tensor:
    """Hidden states [n, L, ...] that leave the last layer, on the CPU."""
    batches = model.embed_windows(windows, BATCH_TOKENS)
    with bar(f"Evaluating {model.source.directory.name}"[:28], model.num_layers * len(batches)) as on_progress:
        for index in range(model.num_layers):
            with model.layer(index) as module:
                for i, hidden in enumerate(model.through(module, batches)):
                    batches[i] = hidden, batches[i][1]
                    on_progress()
    return torch.cat([h for h, _ in batches])


def bits_per_weight(source: WeightSource) -> float:
    """Bits per weight of the routed experts: all-in for a bitsmoe checkpoint, the stored width for an ordinary one."""
    if isinstance(source, QuantizedModel):
        return source.checkpoint.config.all_in_bpw()
    shape = source.shape
    size = sum(spec.nbytes for name, spec in source.tensors.specs.items() if shape.is_expert_tensor(name))
    return 8 * size / shape.num_weights
