"""Times on a GPU: CUDA graphs of several calls on weights that the L2 cache cannot hold, medians of many replays."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

COPY_BYTES = 1 << 30
BEYOND_L2 = 4
"""A graph's calls read at least this many times the L2 cache before the first comes round again."""
MOST_CALLS, MOST_BYTES = 64, 32 << 30
REPLAYS, MOST_SECONDS, LEAST_REPLAYS = 100, 0.3, 7


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call.

    Attributes:
        median: over all replays.
        low, high: quartiles.
        replays: of the graph.
    """

    median: float
    low: float
    high: float
    replays: int


def calls_needed(bytes_per_call: int, l2_bytes: int) -> int:
    """How many different calls a graph holds."""
    return min(MOST_CALLS, max(4, -(-BEYOND_L2 * l2_bytes // max(1, bytes_per_call))))


def copies_needed(calls: int, layer_bytes: int) -> int:
    """How many copies of the weights the calls of a graph take in turns: one each, so that no basis stays in the cache.

    Fewer, but two, where they would take more than `MOST_BYTES`: then a call alone is beyond the cache.
    """
    return min(calls, max(2, MOST_BYTES // max(1, layer_bytes)))


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """All calls, one after another, in one graph; each has run once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replayed(graph: torch.cuda.CUDAGraph, calls: int) -> Timing:
    """Time of one of a graph's calls."""
    for _ in range(3):
        graph.replay()
    first = _replay_times(graph, 3)
    replays = max(LEAST_REPLAYS, min(REPLAYS, int(MOST_SECONDS * 1e6 / statistics.median(first))))
    times = sorted(t / calls for t in _replay_times(graph, replays))
    quartiles = statistics.quantiles(times, n=4)
    return Timing(statistics.median(times), quartiles[0], quartiles[2], replays)


def _replay_times(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    """Microseconds of each replay."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def copy_bandwidth() -> float:
    """Bytes per microsecond of a large copy on the GPU, reads and writes counted."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    graph = captured([lambda: target.copy_(source)])
    return 2 * COPY_BYTES / replayed(graph, 1).median


def kernel_split(graph: torch.cuda.CUDAGraph, calls: int, names: Sequence[str]) -> dict[str, float]:
    """Microseconds of each kernel in one call, by the profiler.

    Args:
        graph: of `calls` calls.
        names: kernels whose names begin so get an entry of their own; all others are `other`.

    Returns:
        Empty where the profiler reports no kernels.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    split: dict[str, float] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = next((n for n in names if event.name.startswith(n)), "other")
            split[name] = split.get(name, 0.0) + event.time_range.elapsed_us() / calls
    return {k: round(v, 2) for k, v in split.items()}
