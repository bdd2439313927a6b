"""What quality to expect of a plan: the original model runs with noise of the planned size in its experts' output.

An error of a layer's output grows or dies out in the layers after it, and large errors do not simply add up. So the
model itself tells what errors of that size do. Measured divergences are a multiple of what noise does: errors are
larger on text that calibration has not seen, and they are not spread evenly as noise is. That multiple falls with the
bits, and was learnt from three models (docs/log/2026-12-01.md).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from offline_quant.evaluation.sanity import VOCABULARY_ROWS
from offline_quant.model.sizes import FLOAT, RunSizes
from offline_quant.model.streaming import StreamedModel, forward_bytes

BATCH_TOKENS = 4_096
"""Tokens that pass through a layer together."""
MULTIPLE_AT_2_BITS, MULTIPLE_PER_BIT = 2.6, -0.6
"""Measured divergence as a multiple of that of noise, at 2 bits per weight, and how it changes with a bit more."""
LEAST_MULTIPLE = 1.4
UNCERTAINTY = 1.5
"""Of the forecast, a factor either way: all measurements were within it."""


class Forecast(BaseModel):
    """The expected divergence from the original model. Fields as in the report.

    Attributes:
        kl: nats per token, on text like the calibration text that it has not seen.
        low, high: where it is likely to lie.
        tokens: tokens of calibration text that noise was tried on.
        measured: divergence of the quantized model on these tokens; None, and no part of the data, while there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kl: float
    low: float
    high: float
    tokens: int
    measured: float | None = Field(default=None, exclude_if=lambda value: value is None)

    def __str__(self) -> str:
        expected = f"Expected: KL to the original {self.kl:.2g} nats a token, {self.low:.2g} to {self.high:.2g}"
        if self.measured is None:
            return expected
        return f"{expected}. Measured: {self.measured:.2g} on {self.tokens:,} tokens that it was calibrated on"


def forecast_bytes(sizes: RunSizes) -> int:
    """Bytes of memory that `forecast` takes."""
    H, rows = sizes.hidden_size, min(VOCABULARY_ROWS, sizes.vocabulary)
    judged = min(sizes.tokens, BATCH_TOKENS)
    states = FLOAT * (judged * (4 * H + 3 * sizes.state_values) + rows * (2 * H + 4 * judged))
    return states + forward_bytes(sizes, judged)


def noisy_states(
    model: StreamedModel,
    windows: Tensor,
    errors: Mapping[int, float],
    seed: int,
    on_layer: Callable[[], None] = lambda: None,
) -> Tensor:
    """Hidden states [n, L, ...] that leave the last layer, on the CPU, with noise in the routed experts' output.

    Args:
        model: the original.
        windows: int64 [n, L].
        errors: by layer index, squared size of the noise relative to a token's output.
        seed: of the noise.
        on_layer: called after every layer.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = model.embed_windows(windows, BATCH_TOKENS)
    for index in range(model.num_layers):
        size = math.sqrt(errors.get(index, 0.0))

        def disturbed(output: Tensor, size: float = size) -> Tensor:
            noise = torch.randn(output.shape, generator=generator).to(output)
            return output + size * output.square().mean(-1, keepdim=True).sqrt() * noise

        with model.layer(index) as module:
            for i, hidden in enumerate(model.through(module, batches, disturbed)):
                batches[i] = hidden, batches[i][1]
        on_layer()
    return torch.cat([hidden for hidden, _ in batches])


@torch.no_grad()
def divergence(model: StreamedModel, wanted: Tensor, found: Tensor, other: StreamedModel | None = None) -> float:
    """Mean KL(wanted || found) of predictions, nats per token, for a few rows of the head at a time.

    Args:
        model: gives norm and head.
        wanted, found: hidden states that leave the last layer, of one shape.
        other: gives norm and head for `found`; None: `model` does.
    """
    models = (model, other or model)
    states = [m.normed(s).flatten(0, -2) for m, s in zip(models, (wanted, found), strict=True)]

    def logits() -> Iterator[list[Tensor]]:
        heads = (m.head_parts(VOCABULARY_ROWS) for m in models)
        for parts in zip(*heads, strict=True):
            yield [head(s) for head, s in zip(parts, states, strict=True)]

    totals = [s.new_full((len(s),), -torch.inf) for s in states]
    for both in logits():
        totals = [torch.logaddexp(t, part.logsumexp(-1)) for t, part in zip(totals, both, strict=True)]
    lost = 0.0
    for both in logits():
        p, q = (part.sub_(t[:, None]) for t, part in zip(totals, both, strict=True))
        lost += float((p.exp() * p.sub(q)).sum(dtype=torch.float64))
    return lost / len(states[0])


def forecast_windows(windows: Tensor) -> Tensor:
    """The first of some windows [n, L], of BATCH_TOKENS tokens: those that noise is tried on."""
    return windows[: max(1, BATCH_TOKENS // windows.shape[1])]


def first_windows(states: Iterable[Tensor], count: int) -> Tensor:
    """The first windows [count, L, ...] of hidden states in batches, of which no more are read."""
    return torch.stack(list(islice((row for batch in states for row in batch), count)))


def forecast(
    model: StreamedModel,
    windows: Tensor,
    states: Iterable[Tensor],
    errors: Mapping[int, float],
    bits: float,
    seed: int,
    on_layer: Callable[[], None] = lambda: None,
) -> Forecast:
    """The divergence to expect of planned errors.

    Args:
        model: the original.
        windows: int64 [n, L], of calibration text; the first BATCH_TOKENS tokens are used.
        states: hidden states of these windows and perhaps more, in batches, that leave the original's last layer.
        errors: by layer index, planned squared error of the experts' output relative to it.
        bits: all-in bits per weight.
        seed: of the noise.
        on_layer: called after every layer.
    """
    windows = forecast_windows(windows)
    wanted = first_windows(states, len(windows))
    lost = divergence(model, wanted, noisy_states(model, windows, errors, seed, on_layer))
    kl = lost * max(LEAST_MULTIPLE, MULTIPLE_AT_2_BITS + MULTIPLE_PER_BIT * (bits - 2))
    return Forecast(kl=kl, low=kl / UNCERTAINTY, high=kl * UNCERTAINTY, tokens=windows.numel())
