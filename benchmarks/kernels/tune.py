"""Choose the tiles of this GPU's architecture by time: what `--tune` prints belongs into `tiles.TILES`."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from benchmarks import record
from benchmarks.kernels import timing
from benchmarks.kernels.experts import LIMITS, relative_error
from benchmarks.kernels.methods import BITSMOE, Setting, build, source_of, tokens_in
from benchmarks.kernels.routing import REALISTIC, route
from benchmarks.kernels.shapes import Shape
from benchmarks.kernels.synthetic import BitsmoeExperts
from bitsmoe_kernels.backends.launch_config import FEW, Tile

METHOD = next(iter(BITSMOE))
GATE_UP_OUTPUTS = 128
"""Outputs of a program of gate and up, whatever the tile says; the tile's own number is that of down."""
OUTPUTS = (64, 128, 256)
CALLS = 12
ACCUMULATORS = 128
"""Most fp32 registers of a thread for sums: more cannot be held beside the codes."""


@dataclass(frozen=True)
class Slot:
    """One place in the table.

    Attributes:
        name: `decode` or `prefill`.
        means: slots per expert at which candidates are timed.
        tokens: block sizes tried.
    """

    name: str
    means: tuple[float, ...]
    tokens: tuple[int, ...]


SLOTS = (
    Slot("decode", (1 / 16, 0.5, 4, 8), (8, 16)),
    Slot("decode", (16,), (16, 32)),
    Slot("prefill", (32, 64), (32, 64)),
    Slot("prefill", (128,), (64, 128)),
)
"""As `tiles.pick_tile` reads the table."""


def legal(tile: Tile) -> bool:
    """Whether a configuration is worth compiling."""
    # Each group of four warps makes 64 outputs of one matrix instruction.
    widest = max(tile.outputs, GATE_UP_OUTPUTS) * tile.tokens / (32 * tile.warps)
    return tile.outputs >= 16 * tile.warps and widest <= ACCUMULATORS and tile.unroll * tile.tokens <= 128


def candidates(slot: Slot) -> list[Tile]:
    """Configurations of the first round, all with 128 outputs."""
    every = [
        Tile(GATE_UP_OUTPUTS, tokens, warps, unroll, stages)
        for tokens in slot.tokens
        for warps in (4, 8)
        for unroll in (1, 2, 4)
        for stages in (2, 3, 4)
    ]
    return [tile for tile in FEW if tile.tokens in slot.tokens] + [tile for tile in every if legal(tile)]


def tokens_for(mean: float, shape: Shape) -> int:
    """Tokens of a call with so many slots per expert."""
    return max(1, round(mean * shape.num_experts / shape.top_k))


class Tuner:
    """Times tiles on one layer, and keeps what it found.

    Args:
        path: JSON file of found times, continued where it was stopped.
    """

    def __init__(self, shape: Shape, setting: Setting, path: Path):
        self.shape, self.setting, self.path = shape, setting, path
        first = build(METHOD, shape, setting, seed=0, keep=False)
        assert isinstance(first, BitsmoeExperts)
        self.l2 = 1 if setting.rehearsal else torch.cuda.get_device_properties(0).L2_cache_size
        self.layers = [first, first.copy()]
        self.inputs: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.expected: dict[int, Tensor] = {}
        self.source = source_of(METHOD)
        self.found: list[dict[str, Any]] = []
        if path.is_file():
            self.found = [r for r in json.loads(path.read_text(encoding="utf-8"))["rows"] if r["source"] == self.source]

    def calls(self, tokens: int, tile: Tile) -> list[timing.Call]:
        """Different calls with one tile."""
        if tokens not in self.inputs:
            s, count = self.shape, 2 if self.setting.rehearsal else CALLS
            routes = [
                route(REALISTIC, tokens, s.num_experts, s.top_k, 1000 * tokens + i, self.setting.device)
                for i in range(count)
            ]
            self.inputs[tokens] = [(tokens_in(tokens, s, self.setting, i), *r) for i, r in enumerate(routes)]
            self.expected[tokens] = self.layers[0].forward(*self.inputs[tokens][0]).double()
        out: list[timing.Call] = []
        for i, (x, weights, ids) in enumerate(self.inputs[tokens]):
            layer = self.layers[i % len(self.layers)]
            out.append(lambda x=x, w=weights, ids=ids, e=layer: e.forward(x, w, ids, tile))  # type: ignore[misc]
        return out

    def time(self, tokens: int, tile: Tile) -> float | None:
        """Microseconds of a call, 0 in a rehearsal; None where the tile does not compile, does not fit or is wrong."""
        key = {"model": self.shape.model, "tokens": tokens, "tile": asdict(tile), "source": self.source}
        for row in self.found:
            if all(row[k] == v for k, v in key.items()):
                return row["microseconds"]
        microseconds, reason = None, None
        try:
            calls = self.calls(tokens, tile)
            x, weights, ids = self.inputs[tokens][0]
            error = relative_error(self.layers[0].forward(x, weights, ids, tile), self.expected[tokens])
            if not error <= LIMITS[self.setting.dtype]:
                reason = f"relative error {error:.1e} against the table's tile"
            elif self.setting.rehearsal:
                microseconds = 0.0
            else:
                microseconds = timing.replayed(timing.captured(calls), len(calls)).median
        except (TritonError, RuntimeError) as e:
            reason = f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"
        self.found.append({**key, "microseconds": microseconds, "reason": reason})
        record.write_json(self.path, {"rows": self.found})
        return microseconds

    def score(self, slot: Slot, tile: Tile) -> float:
        """Geometric mean of the times over the slot's calls; infinite where one fails."""
        times = [self.time(tokens_for(mean, self.shape), tile) for mean in slot.means]
        if any(t is None for t in times):
            return math.inf
        return math.exp(sum(math.log(max(t, 1e-9)) for t in times if t is not None) / len(times))

    def best(self, slot: Slot, tiles: Iterable[Tile]) -> Tile:
        """The fastest of some tiles.

        Raises:
            ValueError: none works.
        """
        scores = {}
        for tile in tiles:
            scores[tile] = self.score(slot, tile)
            print(f"{slot.name} {slot.means}: {tile} {scores[tile]:.1f} us", file=sys.stderr, flush=True)
        tile = min(scores, key=lambda t: scores[t])
        if math.isinf(scores[tile]):
            raise ValueError(f"no tile works for {slot.name} at {slot.means} slots per expert; reasons: {self.path}")
        return tile


def tune(shape: Shape, setting: Setting, path: Path, slots: Sequence[Slot] = SLOTS) -> str:
    """Time all candidates.

    Returns:
        The entry of `tiles.TILES` for this architecture, as Python.
    """
    tuner = Tuner(shape, setting, path)
    chosen: dict[str, list[Tile]] = {"decode": [], "prefill": []}
    for slot in slots:
        tiles = candidates(slot)
        tile = tuner.best(slot, tiles[:2] if setting.rehearsal else tiles)
        # The kernels of direct tiles have their own number of outputs.
        wider = [tile] if tile.direct else [other for n in OUTPUTS if legal(other := replace(tile, outputs=n))]
        chosen[slot.name].append(tuner.best(slot, wider))
    shown = {
        k: ", ".join(f"Tile({', '.join(str(v) for v in asdict(t).values())})" for t in v) for k, v in chosen.items()
    }
    lines = [f"    {setting.capability}: {{", f"        DECODE: ({shown['decode']},),"]
    return "\n".join([*lines, f"        PREFILL: ({shown['prefill']},),", "    },"])


def compile_all(shape: Shape, setting: Setting, part: int, parts: int) -> None:
    """Run every `parts`-th candidate once, so that it is in Triton's cache; failures show when it is timed."""
    experts = build(METHOD, shape, setting, seed=0, keep=False)
    assert isinstance(experts, BitsmoeExperts)
    every = list(dict.fromkeys((tile, slot.means[-1]) for slot in SLOTS for tile in candidates(slot)))
    for tile, mean in every[part::parts]:
        tokens = tokens_for(mean, shape)
        weights, ids = route(REALISTIC, tokens, shape.num_experts, shape.top_k, 0, setting.device)
        try:
            experts.forward(tokens_in(tokens, shape, setting, 0), weights, ids, tile)
        except (TritonError, RuntimeError) as e:
            print(f"{tile}: {type(e).__name__}", file=sys.stderr, flush=True)
