"""The sanity check at the end of a run: does the quantized model still work on calibration text?"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from offline_quant.model.sizes import FLOAT, RunSizes
from offline_quant.model.streaming import StreamedModel

TOKENS = 8_192
"""Tokens of calibration text that are checked."""
VOCABULARY_ROWS = 4096
"""Rows of the output embedding that are multiplied at once. Bounds the memory of the embedding and of the logits."""
PERPLEXITY_RATIO = 1.5
"""A quantized model is degenerate above this multiple of the original's perplexity."""
REPEATED_SHARE, REPEATED_RATIO = 0.3, 2.0
"""It is degenerate, too, if one token is the likeliest at more than this share of positions, and at more than this
multiple of the largest share of any token in the original."""


class SanityVerdict(BaseModel):
    """Figures of the original and the quantized model on calibration text, and what is wrong. Fields as in the report.

    Attributes:
        tokens: tokens predicted.
        perplexity_original: infinite if its predictions are not finite.
        perplexity_quantized: None if its predictions are not finite.
        likeliest_token_share_original: largest share of positions where one token is the likeliest.
        likeliest_token_share_quantized: the same for the quantized model.
        degenerate: whether the quantized model is broken.
        faults: reasons, one sentence each.
        advice: remedy; None where there is no fault.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    perplexity_original: float
    perplexity_quantized: float | None
    likeliest_token_share_original: float
    likeliest_token_share_quantized: float
    degenerate: bool
    faults: list[str]
    advice: str | None


@dataclass
class Tally:
    """Counts over one model's predictions.

    Attributes:
        nll: summed negative log-likelihood, nats.
        tokens: number of predictions.
        likeliest: int64 [V], positions where each token was the likeliest.
    """

    nll: float
    tokens: int
    likeliest: Tensor


def judged_tokens(tokens: int) -> int:
    """Tokens that are judged, at most, of a number of tokens of calibration text."""
    return min(tokens, TOKENS)


def judging_bytes(sizes: RunSizes) -> int:
    """Bytes of memory that `tally` takes."""
    H, judged = sizes.hidden_size, judged_tokens(sizes.tokens)
    # Logits of some rows of the head, and of the rows before or their sum of exponentials.
    rows = min(VOCABULARY_ROWS, sizes.vocabulary)
    return FLOAT * (judged * (2 * H + sizes.state_values) + rows * (H + 2 * judged)) + sizes.whole_tensor_bytes


@torch.no_grad()
def tally(model: StreamedModel, windows: Tensor, hidden: Iterable[Tensor]) -> Tally:
    """Count a model's predictions, for a few rows of its head at a time.

    Args:
        model: gives the final norm and the head.
        windows: int64 [n, L].
        hidden: float32 [n_i, L, H] in batches, states that leave the last layer. There may be more than n; the first n
            count.
    """
    rows = (row for batch in hidden for row in batch)
    states = torch.cat([model.normed(row[:-1]) for _, row in zip(windows, rows, strict=False)])
    target = windows[:, 1:].flatten().to(states.device)
    best, log_total = (states.new_full((len(states),), -torch.inf) for _ in range(2))
    target_logit, likeliest = torch.zeros_like(best), torch.zeros_like(target)
    start = 0
    for head in model.head_parts(VOCABULARY_ROWS):
        logits = head(states)
        inside = ((target >= start) & (target < start + logits.shape[1])).nonzero()[:, 0]
        target_logit[inside] = logits[inside, target[inside] - start]
        top, token = logits.max(-1)
        better = ~(top <= best)  # true for NaN, which nothing replaces later
        best, likeliest = torch.where(better, top, best), torch.where(better, start + token, likeliest)
        log_total = torch.logaddexp(log_total, logits.logsumexp(-1))
        start += logits.shape[1]
    nll = float((log_total.double() - target_logit.double()).sum())
    return Tally(nll, len(target), torch.bincount(likeliest.cpu(), minlength=start))


def advice(shared: bool, fitted: bool, weighed: bool, model_tuned: bool, natural: bool) -> str:
    """What to do about a degenerate model: only what was not done.

    Args:
        shared: one budget was divided among its layers, or it has only one with experts.
        fitted: the experts of a layer were fitted together, by `--fit layer` or `--tune`.
        weighed: it was made with `--token-weights model`.
        model_tuned: it was made with `--tune-model` or `--tune-codes`.
        natural: all of its layers have natural channels.
    """
    options = {
        "--budget model": shared,
        "--fit layer": fitted,
        "--token-weights model": weighed,
        "--tune-model": model_tuned,
    }
    left = [option for option, done in options.items() if not done]
    remedies = [
        "give more bits (--bits)",
        *(["take more time (" + " ".join(left) + ")"] if left else []),
        "give more calibration text like your users' (--calib)",
        *([] if natural else ["keep natural channels (--basis natural)"]),
    ]
    return ", or ".join((", ".join(remedies[:-1]), remedies[-1]))


def verdict(original: Tally, quantized: Tally, remedy: str) -> SanityVerdict:
    """Compare the quantized model with the original.

    Args:
        original, quantized: counts of both.
        remedy: for a degenerate model, see `advice`.
    """
    n = max(1, quantized.tokens)
    before, after = (_perplexity(t.nll / n) for t in (original, quantized))
    token = int(quantized.likeliest.argmax())
    share, share_before = int(quantized.likeliest[token]) / n, int(original.likeliest.max()) / n
    faults = []
    if not after <= PERPLEXITY_RATIO * before:
        faults.append(f"perplexity on calibration text is {after:.4g}, the original's {before:.4g}")
    if share > REPEATED_SHARE and share > REPEATED_RATIO * share_before:
        faults.append(f"token {token} is the likeliest at {share:.0%} of positions, no token at more than "
                      f"{share_before:.0%} for the original")  # fmt: skip
    return SanityVerdict(
        tokens=quantized.tokens,
        perplexity_original=before,
        perplexity_quantized=after if math.isfinite(after) else None,
        likeliest_token_share_original=share_before,
        likeliest_token_share_quantized=share,
        degenerate=bool(faults),
        faults=faults,
        advice=remedy if faults else None,
    )


def _perplexity(nll: float) -> float:
    """Perplexity for a mean loss in nats; finite up to a loss of 700."""
    return math.exp(min(nll, 700.0)) if math.isfinite(nll) else math.inf
