"""The sanity check at the end of a run: the quantized model against the original, on calibration text."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offline_quant.model.sizes import FLOAT, RunSizes
from offline_quant.model.streaming import StreamedModel

TOKENS = 8_192
"""Tokens judged."""
VOCABULARY_ROWS = 4096
"""Rows of the output embedding that are used at a time: bounds its memory and that of logits."""
PERPLEXITY_RATIO = 1.5
"""A quantized model this many times as perplexed is called degenerate."""
REPEATED_SHARE, REPEATED_RATIO = 0.3, 2.0
"""So is one that finds one token most likely at this share of positions, and this much oftener than the original."""


@dataclass
class Tally:
    """Predictions of one model.

    Attributes:
        nll: summed negative log-likelihood.
        tokens: predictions.
        likeliest: int64 [V], how often each token was found most likely.
    """

    nll: float
    tokens: int
    likeliest: Tensor


def judged_tokens(tokens: int) -> int:
    """Tokens that are judged, at most, of a number of tokens of calibration text."""
    return min(tokens, TOKENS)


def judging_bytes(sizes: RunSizes) -> int:
    """Bytes of memory that `tally` takes."""
    H, judged = sizes.shape.hidden_size, judged_tokens(sizes.tokens)
    # Logits of some rows of the head, and of the rows before or their sum of exponentials.
    rows = min(VOCABULARY_ROWS, sizes.vocabulary)
    return FLOAT * (3 * judged * H + rows * (H + 2 * judged)) + sizes.whole_tensor_bytes


@torch.no_grad()
def tally(model: StreamedModel, windows: Tensor, hidden: Iterable[Tensor]) -> Tally:
    """Count predictions from the hidden states that leave the last layer, for some rows of the head at a time.

    Args:
        model: for norm and head.
        windows: int64 [n, L].
        hidden: [n_i, L, H] in batches, n in all or more, of which the first n count.
    """
    rows = (row for batch in hidden for row in batch)
    states = torch.cat([model.normed(row[:-1]) for _, row in zip(windows, rows, strict=False)])
    target = windows[:, 1:].flatten().to(states.device)
    best, whole = (states.new_full((len(states),), -torch.inf) for _ in range(2))
    wanted, likeliest = torch.zeros_like(best), torch.zeros_like(target)
    start = 0
    for head in model.head_rows(VOCABULARY_ROWS):
        logits = states @ head.T
        inside = ((target >= start) & (target < start + len(head))).nonzero()[:, 0]
        wanted[inside] = logits[inside, target[inside] - start]
        top, place = logits.max(-1)
        better = ~(top <= best)  # NaN counts as better and is overwritten later; `whole` keeps it
        best, likeliest = torch.where(better, top, best), torch.where(better, start + place, likeliest)
        whole = torch.logaddexp(whole, logits.logsumexp(-1))
        start += len(head)
    nll = float((whole.double() - wanted.double()).sum())
    return Tally(nll, len(target), torch.bincount(likeliest.cpu(), minlength=start))


def verdict(original: Tally, quantized: Tally) -> dict[str, Any]:
    """Figures of both models; where the quantized one degenerates, with reasons and advice."""
    n = max(1, quantized.tokens)
    base, now = (math.exp(min(t.nll / n, 700.0)) if math.isfinite(t.nll) else math.inf for t in (original, quantized))
    token = int(quantized.likeliest.argmax())
    share, share_before = int(quantized.likeliest[token]) / n, int(original.likeliest.max()) / n
    faults = []
    if not now <= PERPLEXITY_RATIO * base:
        faults.append(f"perplexity on calibration text is {now:.4g}, the original's {base:.4g}")
    if share > REPEATED_SHARE and share > REPEATED_RATIO * share_before:
        faults.append(f"token {token} is the likeliest at {share:.0%} of positions, no token at more than "
                      f"{share_before:.0%} for the original")  # fmt: skip
    advice = "give more bits (--bits), more calibration text like your users' (--calib), or --basis natural"
    return {
        "tokens": quantized.tokens,
        "perplexity_original": base,
        "perplexity_quantized": now if math.isfinite(now) else None,
        "likeliest_token_share_original": share_before,
        "likeliest_token_share_quantized": share,
        "degenerate": bool(faults),
        "faults": faults,
        "advice": advice if faults else None,
    }
