"""Perplexity, and divergence from a reference model, over non-overlapping windows of text."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.calibration.sources.registry import open_text
from offline_quant.calibration.text_source import TextSource
from offline_quant.calibration.windows import load_tokenizer, text_windows, window_length
from offline_quant.model.quantized import QuantizedModel, open_model
from offline_quant.model.source import WeightSource
from offline_quant.model.streaming import StreamedModel
from offline_quant.runtime.progress import bar

MAX_WINDOW = 2048
BATCH_TOKENS = 8192
_HEAD_TOKENS = 2048


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on one text.

    The standard error of a figure is the change to expect from another text of this kind and length. Windows count as
    independent, tokens of one window do not. It is None where there is one window.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of every token but each window's first.
        tokens: tokens predicted.
        window: tokens in a window.
        bpw: bits per weight of the routed experts, all-in for a bitsmoe checkpoint.
        kl: mean KL(reference || model), nats per token; None without a reference.
        top1_agreement: share of tokens where both find the same token most likely; None without a reference.
        perplexity_reference: the reference's perplexity; None without one.
        excess: perplexity above the reference's; None without one.
        perplexity_stderr, kl_stderr, top1_agreement_stderr, excess_stderr: their standard errors. That of the excess is
            of pairs: what both models find hard about a window does not count.
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
        """The measured figures as JSON data."""
        return {k: v for k, v in asdict(self).items() if v is not None}


def evaluate(model: Path, text: Path | TextSource, reference: Path | None = None, device: str = "cpu") -> Evaluation:
    """Evaluate a quantized or ordinary checkpoint in float32, one decoder layer in memory at a time.

    Args:
        model: checkpoint directory.
        text: see `sources.registry.open_text`.
        reference: checkpoint to compare with, usually the unquantized one.
        device: where layers run.

    Raises:
        BitsmoeError: damaged checkpoint, unreadable text, or two models that cannot be compared.
    """
    text = text if isinstance(text, TextSource) else open_text(str(text))
    source = open_model(model)
    other = open_model(reference) if reference else None
    if other:
        _check_comparable(source, other)
    length = window_length(source.config, MAX_WINDOW)
    windows = text_windows(load_tokenizer(model), text, length)
    mine = final_states(source, windows, device)
    return _compare(mine, final_states(other, windows, device) if other else None, windows, bits_per_weight(source))


class Reference:
    """A model that others are compared with on one text. It is run once.

    Args:
        model: checkpoint directory.
        text: file of text.
    """

    def __init__(self, model: Path, text: Path, device: str = "cpu"):
        self.source, self.device = open_model(model), device
        length = window_length(self.source.config, MAX_WINDOW)
        self.windows = text_windows(load_tokenizer(model), open_text(str(text)), length)
        self.states = final_states(self.source, self.windows, device)

    def evaluate(self, model: Path) -> Evaluation:
        """As `evaluate` with this reference.

        Raises:
            BitsmoeError: as there.
        """
        source = open_model(model)
        _check_comparable(source, self.source)
        mine = final_states(source, self.windows, self.device)
        return _compare(mine, self.states, self.windows, bits_per_weight(source))


def _check_comparable(model: WeightSource, reference: WeightSource) -> None:
    if reference.config["vocab_size"] != model.config["vocab_size"]:
        raise BitsmoeError(
            f"--reference {reference.directory}: vocab_size is {reference.config['vocab_size']}, that of "
            f"{model.directory} is {model.config['vocab_size']}; only models with one vocabulary can be compared"
        )


def _compare(mine: "States", other: "States | None", windows: Tensor, bpw: float) -> Evaluation:
    # Means over the tokens of every window: losses, and with a reference its losses, divergence and agreement.
    rows: list[Tensor] = []
    step = max(1, _HEAD_TOKENS // windows.shape[1])
    for at in range(0, len(windows), step):
        logp = mine.log_probabilities(at, step)
        target = windows[at : at + step, 1:].to(logp.device)[..., None]
        figures = [-logp.gather(-1, target)[..., 0]]
        if other is not None:
            ref = other.log_probabilities(at, step)
            figures.append(-ref.gather(-1, target)[..., 0])
            figures.append((ref.exp() * (ref - logp)).sum(-1))
            figures.append(ref.argmax(-1) == logp.argmax(-1))
        rows.append(torch.stack([f.double().mean(1) for f in figures], 1))
    means = torch.cat(rows)
    for states, losses in zip([mine] if other is None else [mine, other], means.T, strict=False):
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
    reference_nll, kl, agree = compared
    base = _perplexity(reference_nll)
    return replace(
        result,
        kl=float(kl.mean()),
        kl_stderr=_stderr(kl),
        top1_agreement=float(agree.mean()),
        top1_agreement_stderr=_stderr(agree),
        perplexity_reference=base,
        excess=perplexity - base,
        excess_stderr=_stderr(perplexity * nll - base * reference_nll),  # to first order
    )


def _perplexity(losses: Tensor) -> float:
    return float(losses.mean().exp())


def _stderr(values: Tensor) -> float | None:
    """Of the mean of independent values [n]."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None


@dataclass(frozen=True)
class States:
    """Hidden states [n, L, H] that leave a model's last layer, on the CPU, its output embedding, and the model."""

    hidden: Tensor
    head: Tensor
    model: StreamedModel

    def log_probabilities(self, start: int, count: int) -> Tensor:
        """Of every token but each window's first, for `count` windows from `start`: [count, L - 1, V]."""
        return self.model.logits(self.hidden[start : start + count, :-1], self.head).log_softmax(-1)


def final_states(source: WeightSource, windows: Tensor, device: str) -> States:
    """Run a model over windows [n, L]."""
    model = StreamedModel(source, device)
    batches = model.embed_windows(windows, BATCH_TOKENS)
    with bar(f"Evaluating {source.directory.name}"[:28], model.num_layers * len(batches)) as on_progress:
        for index in range(model.num_layers):
            with model.layer(index) as module:
                for i, hidden in enumerate(model.through(module, batches)):
                    batches[i] = hidden, batches[i][1]
                    on_progress()
    return States(torch.cat([h for h, _ in batches]), model.head, model)


def bits_per_weight(source: WeightSource) -> float:
    """All-in bits per weight of a bitsmoe checkpoint's experts, or the stored width of an ordinary one's."""
    if isinstance(source, QuantizedModel):
        return source.checkpoint.config.all_in_bpw()
    s = source.shape
    size = sum(spec.nbytes for name, spec in source.tensors.specs.items() if s.is_expert_tensor(name))
    return 8 * size / s.num_weights
