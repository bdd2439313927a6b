"""Perplexity, and divergence from a reference model, over non-overlapping windows of text."""

from dataclasses import asdict, dataclass
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
    if other and other.config["vocab_size"] != source.config["vocab_size"]:
        raise BitsmoeError(
            f"--reference {reference}: vocab_size is {other.config['vocab_size']}, that of {model} is "
            f"{source.config['vocab_size']}; only models with one vocabulary can be compared"
        )
    length = window_length(source.config, MAX_WINDOW)
    windows = text_windows(load_tokenizer(model), str(text), length)
    hidden, head, streamed = final_states(source, windows, device)
    reference_hidden = reference_head = reference_model = None
    if other:
        reference_hidden, reference_head, reference_model = final_states(other, windows, device)

    nll = reference_nll = kl = agree = 0.0
    count = 0
    step = max(1, _HEAD_TOKENS // length)
    for at in range(0, len(windows), step):
        target = windows[at : at + step, 1:].to(streamed.device)
        logp = _log_probabilities(streamed, hidden[at : at + step], head)
        nll -= float(logp.gather(-1, target[..., None]).double().sum())
        count += target.numel()
        if reference_model is not None and reference_hidden is not None and reference_head is not None:
            ref = _log_probabilities(reference_model, reference_hidden[at : at + step], reference_head)
            reference_nll -= float(ref.gather(-1, target[..., None]).double().sum())
            kl += float((ref.exp() * (ref - logp)).sum(-1).double().sum())
            agree += float((ref.argmax(-1) == logp.argmax(-1)).sum())
    result = Evaluation(_exp(nll / count), count, length, bits_per_weight(source))
    if not other:
        return result
    return Evaluation(
        **{**asdict(result), "kl": kl / count, "top1_agreement": agree / count,
           "perplexity_reference": _exp(reference_nll / count)}
    )  # fmt: skip


def _exp(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).exp())


def _log_probabilities(model: StreamedModel, hidden: Tensor, head: Tensor) -> Tensor:
    return model.logits(hidden[:, :-1], head).log_softmax(-1)


def final_states(source: WeightSource, windows: Tensor, device: str) -> tuple[Tensor, Tensor, StreamedModel]:
    """Hidden states [n, L, H] after the last layer on the CPU, the output embedding, and the model."""
    model = StreamedModel(source, device)
    batches = model.embed_windows(windows, BATCH_TOKENS)
    with bar(f"Evaluating {source.directory.name}"[:28], model.num_layers * len(batches)) as tick:
        for index in range(model.num_layers):
            with model.layer(index) as module:
                for i, (hidden, kwargs) in enumerate(batches):
                    batches[i] = (model.run(module, hidden, kwargs).cpu(), kwargs)
                    tick()
    return torch.cat([h for h, _ in batches]), model.head, model


def bits_per_weight(source: WeightSource) -> float:
    """All-in bits per weight of a bitsmoe checkpoint's experts, or the stored width of an ordinary one's."""
    if isinstance(source, QuantizedModel):
        return source.checkpoint.config.all_in_bpw()
    s = source.shape
    size = sum(spec.nbytes for name, spec in source.tensors.specs.items() if s.is_expert_tensor(name))
    return 8 * size / s.num_weights
