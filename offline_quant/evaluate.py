"""Perplexity, and divergence from a reference model, over non-overlapping windows of text."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.calibration import load_tokenizer, text_windows, window_length
from offline_quant.model_adapter import QuantizedModel, WeightSource, open_model
from offline_quant.progress import bar
from offline_quant.streaming import StreamedModel

MAX_WINDOW = 2048
BATCH_TOKENS = 8192
_HEAD_TOKENS = 2048


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on one text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of every token but each window's first.
        tokens: tokens predicted.
        window: tokens in a window.
        bpw: bits per weight of the routed experts, all-in for a bitsmoe checkpoint.
        kl: mean KL(reference || model), nats per token; None without a reference.
        top1_agreement: share of tokens where both find the same token most likely; None without a reference.
        perplexity_reference: the reference's perplexity; None without one.
    """

    perplexity: float
    tokens: int
    window: int
    bpw: float
    kl: float | None = None
    top1_agreement: float | None = None
    perplexity_reference: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON data, without what was not measured."""
        return {k: v for k, v in asdict(self).items() if v is not None}


def evaluate(model: Path, text: Path, reference: Path | None = None, device: str = "cpu") -> Evaluation:
    """Evaluate a quantized or ordinary checkpoint in float32, one decoder layer in memory at a time.

    Args:
        model: checkpoint directory.
        text: UTF-8 text or JSON-lines file.
        reference: checkpoint to compare with, usually the unquantized one.
        device: where layers run.

    Raises:
        BitsmoeError: damaged checkpoint, unreadable text, or two models that cannot be compared.
    """
    source = open_model(model)
    other = open_model(reference) if reference else None
    if other:
        _check_comparable(source, other)
    length = window_length(source.config, MAX_WINDOW)
    windows = text_windows(load_tokenizer(model), str(text), length)
    mine = final_states(source, windows, device)
    return _compare(mine, final_states(other, windows, device) if other else None, windows, bits_per_weight(source))


class Reference:
    """A model that many others are compared with on one text: it is run once.

    Args:
        model: checkpoint directory.
        text: UTF-8 text or JSON-lines file.
    """

    def __init__(self, model: Path, text: Path, device: str = "cpu"):
        self.source, self.device = open_model(model), device
        length = window_length(self.source.config, MAX_WINDOW)
        self.windows = text_windows(load_tokenizer(model), str(text), length)
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
    nll = reference_nll = kl = agree = 0.0
    count, length = 0, windows.shape[1]
    step = max(1, _HEAD_TOKENS // length)
    for at in range(0, len(windows), step):
        logp = mine.log_probabilities(at, step)
        target = windows[at : at + step, 1:].to(logp.device)
        nll -= float(logp.gather(-1, target[..., None]).double().sum())
        count += target.numel()
        if other is not None:
            ref = other.log_probabilities(at, step)
            reference_nll -= float(ref.gather(-1, target[..., None]).double().sum())
            kl += float((ref.exp() * (ref - logp)).sum(-1).double().sum())
            agree += float((ref.argmax(-1) == logp.argmax(-1)).sum())
    for states, total in ((mine, nll), (other, reference_nll)):
        if states is not None and not math.isfinite(total):
            raise BitsmoeError(
                f"{states.model.source.directory}: its predictions are not finite; a tensor holds NaN, infinity or far "
                "too large values, so make or download the checkpoint again"
            )
    result = Evaluation(_exp(nll / count), count, length, bpw)
    if other is None:
        return result
    return replace(
        result, kl=kl / count, top1_agreement=agree / count, perplexity_reference=_exp(reference_nll / count)
    )


def _exp(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).exp())


@dataclass(frozen=True)
class States:
    """What leaves a model's last layer: hidden [n, L, H] on the CPU, its output embedding, and the model."""

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
    with bar(f"Evaluating {source.directory.name}"[:28], model.num_layers * len(batches)) as tick:
        for index in range(model.num_layers):
            with model.layer(index) as module:
                for i, hidden in enumerate(model.through(module, batches)):
                    batches[i] = hidden, batches[i][1]
                    tick()
    return States(torch.cat([h for h, _ in batches]), model.head, model)


def bits_per_weight(source: WeightSource) -> float:
    """All-in bits per weight of a bitsmoe checkpoint's experts, or the stored width of an ordinary one's."""
    if isinstance(source, QuantizedModel):
        return source.checkpoint.config.all_in_bpw()
    s = source.shape
    size = sum(spec.nbytes for name, spec in source.tensors.specs.items() if s.is_expert_tensor(name))
    return 8 * size / s.num_weights
