"""Whose turn it is: rounds in which each rival computes once, on weights that no cache holds.

Before each turn a buffer larger than the last-level cache is read. Within a turn no expert of a copy of the layer is
read by two calls: calls of one token share out all experts like a deck of cards, longer calls get a copy each.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.kernels.routing import UNIFORM, route
from benchmarks.kernels.shapes import Shape

SMALL_EXPERTS, MOST_INTERMEDIATE = 2, 1024
CHECKED_TOKENS = (1, 37)
TURN_SECONDS = 0.15
"""A turn has as many calls as take about that long, at least one."""
SLOW_SECONDS = 4.0
"""A rival whose call takes longer has a turn in the first round only."""
QUIET_SECONDS = 0.02
"""Pause after a turn, in which threads of the last one stop waiting actively."""


@dataclass(frozen=True)
class Call:
    """Routing of one call.

    Attributes:
        weights: float32 [T, top_k].
        ids: int32 [T, top_k].
    """

    weights: Tensor
    ids: Tensor


class Rival(Protocol):
    """One way to compute the layer.

    Attributes:
        name: as the results name it.
        bits: per weight, all included.
        expert_bytes: read of an expert, on average.
        shared_bytes: read by each call besides.
        copies: of the layer, at different addresses.
        detail: what the library chose: an instruction set, a kind of buffer.
    """

    name: str
    bits: float
    expert_bytes: float
    shared_bytes: float
    copies: int
    detail: str

    def check(self) -> float:
        """Relative error against float64 with `small_shape` and `CHECKED_TOKENS`."""
        ...

    def turn(self, x: Tensor, calls: Sequence[tuple[int, Call]]) -> float:
        """Compute a call on tokens [T, H] after another, each with the copy it names; seconds of all together."""
        ...


def small_shape(shape: Shape) -> Shape:
    """The same hidden size with few experts, and these not too wide: what rivals are checked with."""
    experts = min(SMALL_EXPERTS, shape.num_experts)
    return replace(
        shape, num_experts=experts, top_k=min(experts, shape.top_k),
        intermediate_size=min(MOST_INTERMEDIATE, shape.intermediate_size),
    )  # fmt: skip


def calls_for(shape: Shape, tokens: int, seed: int) -> list[Call]:
    """What can be asked of one copy of a layer without reading an expert twice.

    Args:
        shape: of the layer.
        tokens: T. One: the shuffled experts are shared out, E / top_k calls. More: one call, each token routed at
            random.
        seed: of routing.
    """
    if tokens > 1:
        return [Call(*route(UNIFORM, tokens, shape.num_experts, shape.top_k, seed, "cpu"))]
    gen = torch.Generator().manual_seed(seed)
    deck = torch.randperm(shape.num_experts, generator=gen).int()
    hands = deck[: len(deck) // shape.top_k * shape.top_k].view(-1, 1, shape.top_k)
    weights = torch.rand(hands.shape, generator=gen) + 0.1
    return [Call(w / w.sum(), ids) for w, ids in zip(weights, hands, strict=True)]


def turn_calls(shape: Shape, tokens: int, copies: int, number: int) -> list[tuple[int, Call]]:
    """Copies and calls of a whole turn, the same for all rivals of one round: each copy's calls, copy after copy."""
    return [(c, call) for c in range(copies) for call in calls_for(shape, tokens, 1000 * number + c)]


def bytes_of(rival: Rival, calls: Sequence[tuple[int, Call]]) -> float:
    """Bytes of weights that a call reads, on average: experts that are hit, each once, and what all calls share."""
    hit = statistics.fmean(len(call.ids.unique()) for _, call in calls)
    return hit * rival.expert_bytes + rival.shared_bytes


@dataclass
class Measured:
    """One rival with one number of tokens.

    Attributes:
        seconds: of a call, one figure for each round.
        calls: of a turn.
        bytes: see `bytes_of`.
    """

    seconds: list[float]
    calls: int
    bytes: float


def play(
    rivals: Sequence[Rival],
    shape: Shape,
    x: Tensor,
    rounds: int,
    seconds: float,
    read: Callable[[], float],
) -> tuple[dict[str, Measured], list[float]]:
    """Rounds of turns.

    Args:
        rivals: each has its turn in each round, but for slow ones (`SLOW_SECONDS`).
        shape: of the layer.
        x: tokens [T, H].
        rounds: at most.
        seconds: after which no round begins, but for the second.
        read: drives weights out of the caches; gives bytes per second.

    Returns:
        Figures by rival, and all read bandwidths in bytes per second.
    """
    tokens, began = len(x), time.monotonic()
    limits: dict[str, int] = {}
    slow: set[str] = set()
    found: dict[str, Measured] = {}
    bandwidths: list[float] = []
    gc.collect()
    gc.disable()
    for number in range(rounds + 1):  # round 0 finds out how many calls make a turn
        if number > 2 and time.monotonic() - began > seconds:
            break
        for rival in [r for r in rivals if number < 2 or r.name not in slow]:
            calls = turn_calls(shape, tokens, rival.copies, number)
            calls = calls[: limits.get(rival.name, 1)]
            time.sleep(QUIET_SECONDS)
            bandwidths.append(read())
            taken = rival.turn(x, calls) / len(calls)
            if number == 0:
                limits[rival.name] = max(1, int(TURN_SECONDS / taken))
                slow |= {rival.name} if taken > SLOW_SECONDS else set()
                continue
            one = found.setdefault(rival.name, Measured([], len(calls), bytes_of(rival, calls)))
            one.seconds.append(taken)
        print(f"{shape.model}, {tokens} tokens: round {number} after {time.monotonic() - began:.0f} s", file=sys.stderr)
    gc.enable()
    return found, bandwidths
