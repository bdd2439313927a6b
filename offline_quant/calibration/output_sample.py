"""What the routed experts add to a layer's output: for all tokens, and at a sample on which outputs are compared."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from offline_quant.calibration.moments import LayerMoments
from offline_quant.runtime.distributed import Workers
from offline_quant.runtime.malloc import trim

OUTPUT_TOKENS = 2_048
"""Tokens on which a layer's output is compared."""
SLOT_VALUES = 1 << 25
"""Float32 values of tokens' slots that are filled at a time."""

SlotOutputs = tuple[Tensor, Tensor]
"""Slots of an expert, int64 [n], as places in the flattened [T, top_k]; what it gives there, float32 [n, H]."""


def routed_output(
    moments: LayerMoments,
    workers: Workers,
    experts: Sequence[int],
    activations: Callable[[int], Tensor],
    output: Callable[[int, Tensor], Tensor],
    spans: Sequence[range] | None = None,
) -> Iterator[Tensor]:
    """What the routed experts add to the layer's output.

    Every token's slots are filled by one expert each and then summed in their order: the result does not depend on
    which process computes which expert, or when.

    Args:
        moments: of the layer.
        workers: the processes that compute experts.
        experts: those of this process.
        activations: [n, I] of an expert, of its own tokens first.
        output: what an expert's down makes of them, [n, H].
        spans: of tokens whose output is wanted; None: all.

    Yields:
        float32 [n, H] of n tokens, one group of tokens after another.
    """
    top_k = moments.top_k
    tokens, hidden = moments.inputs.x.shape
    step = max(1, min(tokens, SLOT_VALUES // (top_k * hidden)))
    held = moments.inputs.x.new_empty(step * top_k, hidden)  # fresh pages every time would cost as much again
    for start, end in ((at, min(at + step, s.stop)) for s in spans or [range(tokens)] for at in s[::step]):
        filled = held[: (end - start) * top_k]
        if workers.size > 1:
            filled.zero_()  # others fill the rest
        bounds = torch.tensor([start * top_k, end * top_k], device=filled.device)
        for e in experts:
            slots = moments.slots[e]
            first, last = torch.searchsorted(slots, bounds).tolist()
            if first == last:
                continue
            slots = slots[first:last]
            h = activations(e)[first:last].to(filled.device)
            filled[slots - start * top_k] = output(e, h).mul_(moments.slot_weights[slots, None])
        trim()
        yield workers.all_reduce_sum(filled).view(end - start, top_k, hidden).sum(1)


def sample_step(moments: LayerMoments) -> int:
    """Distance of the tokens on which a layer's output is compared."""
    return max(1, len(moments.inputs.x) // OUTPUT_TOKENS)


def sampled_output(
    moments: LayerMoments, expert: int, activations: Tensor, output: Callable[[Tensor], Tensor]
) -> SlotOutputs:
    """An expert's share of the output at every `sample_step`-th token.

    Args:
        moments: of the layer.
        expert: which.
        activations: [n, I], of its own tokens first.
        output: what its down makes of them, [n, H].
    """
    slots = moments.slots[expert]
    rows = (slots // moments.top_k % sample_step(moments) == 0).nonzero()[:, 0]
    h = activations[rows.cpu()].to(slots.device)
    return slots[rows], output(h).mul_(moments.slot_weights[slots[rows], None])


class OutputSample:
    """A layer's output at a sample of the tokens, put together from every expert's slots."""

    def __init__(self, moments: LayerMoments):
        self._step, self._top_k = sample_step(moments), moments.top_k
        tokens, H = moments.inputs.x.shape
        self._slots = moments.inputs.x.new_zeros(-(-tokens // self._step) * self._top_k, H)

    def add(self, outputs: Sequence[SlotOutputs]) -> None:
        """Add what `sampled_output` found of some experts."""
        for slots, output in outputs:
            slots = slots.to(self._slots.device)
            slots = slots // self._top_k // self._step * self._top_k + slots % self._top_k
            self._slots[slots] = output.to(self._slots.device)

    def output(self) -> Tensor:
        """The output, [n, H]."""
        return self._slots.view(-1, self._top_k, self._slots.shape[1]).sum(1)
