"""Reads the CPU kernels' block of bytes, from the text of `_cpu/layout.h` alone: numpy, no code of the package.

`spread_out` moves the pieces of a block apart, so that an access beyond a piece meets a margin instead of the next one.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

LANES, STRIPS, STEP_BYTES, MAX_RUNS, ACT_ALIGN = 16, 4, 64, 8, 64
MAGIC = int.from_bytes(b"PCU5", "little")


class Head(NamedTuple):
    """`struct Layer`: int64 each."""

    magic: int
    bytes: int
    experts: int
    hidden: int
    inner: int
    basis: int
    basis_rows: int
    gate: int
    up: int
    down: int
    input_source: int
    shared_acts: int
    basis_acts: int
    input_acts: int
    down_acts: int
    ranks: int
    activation: int


class Record(NamedTuple):
    """`struct Matrix`: int64 each."""

    outputs: int
    inputs: int
    runs: int
    run_at: int
    steps: int
    index_at: int
    scale_at: int
    feature_at: int
    codes_at: int
    dense_at: int
    dense_kind: int
    rank: int
    in_at: int
    out_at: int
    bias_at: int


class Run(NamedTuple):
    """`struct Run`: int32 each; `components` is its count."""

    bits: int
    shift: int
    steps: int
    twice_half: int
    component: int
    act: int
    components: int
    spare: int


RECORD_BYTES, RUN_BYTES, HEAD_BYTES = 8 * len(Record._fields), 4 * len(Run._fields), 8 * len(Head._fields)


@dataclass(frozen=True)
class Matrix:
    """One matrix of a layer.

    Attributes:
        record: its sizes and offsets.
        runs: of its components.
        codes: for each run, [components, outputs].
        index: for each component, the place of its source; None: the identity.
        scale: for each component; None: ones.
        feature: [outputs].
        bias: [outputs].
        dense: 16-bit weights [outputs, inputs]; None: codes.
        into: compensator, [rank, inputs].
        out: compensator, [rank, outputs].
    """

    record: Record
    runs: list[Run]
    codes: list[Ints]
    index: Ints | None
    scale: Array | None
    feature: Array
    bias: Array
    dense: Array | None
    into: Array
    out: Array

    def coded(self, sources: int) -> Array:
        """What the codes contract: [outputs, sources]."""
        total = np.zeros((self.record.outputs, sources))
        for run, codes in zip(self.runs, self.codes, strict=True):
            level = (codes - run.twice_half / 2) * 2.0**run.shift
            for c in range(run.components):
                at = run.component + c
                if self.index is None:
                    if at < sources:
                        total[:, at] += level[c]
                elif self.scale is not None and self.scale[at]:
                    total[:, self.index[at]] += level[c] * self.scale[at]
        return total * self.feature[:, None]


class Piece(NamedTuple):
    """One piece of the block: where the offset stands that names it, where it lies, its bytes."""

    named_at: int
    start: int
    size: int


class Block:
    """A layer's block of bytes.

    Raises:
        AssertionError: something in it contradicts layout.h.
    """

    def __init__(self, block: Tensor) -> None:
        assert block.dtype == torch.uint8
        self.data = block.numpy()
        self.memory = self.data.data
        self.head = Head(*struct.unpack_from(f"<{len(Head._fields)}q", self.memory))
        assert self.head.magic == MAGIC
        assert self.head.bytes == len(self.data)
        assert self.head.ranks == max(self.record(at).rank for _, _, at in self.tables())

    def _take(self, dtype: str, at: int, *shape: int) -> NDArray[Any]:
        count = int(np.prod(shape))
        assert 0 <= at <= len(self.data) - count * np.dtype(dtype).itemsize
        return np.frombuffer(self.data, dtype, count, at).reshape(shape)

    def record(self, at: int) -> Record:
        """The description of a matrix."""
        return Record(*struct.unpack_from(f"<{len(Record._fields)}q", self.memory, at))

    def runs(self, record: Record) -> list[Run]:
        """Of a matrix, in order."""
        assert 0 <= record.runs <= MAX_RUNS
        return [
            Run(*struct.unpack_from(f"<{len(Run._fields)}i", self.memory, record.run_at + i * RUN_BYTES))
            for i in range(record.runs)
        ]

    def tables(self) -> Iterator[tuple[str, int, int]]:
        """Name, expert and offset of every description; the basis is of expert 0."""
        for e in range(self.head.experts):
            for name in ("gate", "up", "down") if self.head.gate >= 0 else ("up", "down"):
                yield name, e, getattr(self.head, name) + e * RECORD_BYTES
        if self.head.basis >= 0:
            yield "basis", 0, self.head.basis

    def matrix(self, name: str, expert: int = 0) -> Matrix:
        """One matrix: gate, up, down of an expert, or the basis."""
        (at,) = [at for n, e, at in self.tables() if (n, e) == (name, expert)]
        m = self.record(at)
        runs, strips = self.runs(m), -(-m.outputs // LANES)
        outputs, padded = m.outputs, strips * LANES
        assert m.steps == sum(run.steps for run in runs)
        components = sum(run.components for run in runs)
        dense = index = scale = None
        bias = np.zeros(padded)
        if m.bias_at >= 0:
            bias = self._take("<f4", m.bias_at, padded).astype(np.float64)
            assert not bias[outputs:].any()
        feature, into, out = np.ones(outputs), np.zeros((0, m.inputs)), np.zeros((0, outputs))
        if m.dense_at >= 0:
            words = self._take("<u2", m.dense_at, strips, m.inputs, LANES).transpose(0, 2, 1).reshape(padded, m.inputs)
            assert m.dense_kind in (0, 1)
            if m.dense_kind:
                dense = words.view("<f2").astype(np.float64)
            else:
                dense = (words.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
            assert not dense[outputs:].any()
            dense = dense[:outputs]
            assert not m.runs
            assert not m.rank
        else:
            feature = self._take("<f4", m.feature_at, padded).astype(np.float64)
            assert not feature[outputs:].any()
            feature = feature[:outputs]
            assert (m.index_at < 0) == (m.scale_at < 0)
            if m.index_at >= 0:
                index = self._take("<u2", m.index_at, components).astype(np.int64)
                scale = self._take("<f4", m.scale_at, components).astype(np.float64)
            if m.rank:
                into = self._take("<f2", m.in_at, m.rank, m.inputs).astype(np.float64)
                out = self._take("<f2", m.out_at, m.rank, padded).astype(np.float64)
                assert not out[:, outputs:].any()
                out = out[:, :outputs]
        return Matrix(m, runs, self._codes(m, runs, strips), index, scale, feature, bias[:outputs], dense, into, out)

    def _codes(self, m: Record, runs: list[Run], strips: int) -> list[Ints]:
        found = [np.zeros((run.components, strips * LANES), np.int64) for run in runs]
        component = act = 0
        for run, codes in zip(runs, found, strict=True):
            assert run.bits in (1, 2, 4, 8)
            per_step = 32 // run.bits
            assert run.components == run.steps * per_step
            # Components and activations of runs follow one another.
            assert run.component == component
            assert run.act >= act
            assert run.act % ACT_ALIGN == 0
            component, act = component + run.components, run.act + run.components
            before = sum(r.steps for r in runs[: runs.index(run)])
            for group in range(0, strips, STRIPS):
                together = min(STRIPS, strips - group)
                start = m.codes_at + group * m.steps * STEP_BYTES
                stream = self._take("u1", start, m.steps, together, LANES, 4)[before : before + run.steps]
                for c in range(run.components):
                    step, (f, j) = c // per_step, divmod(c % per_step, 4)
                    value = stream[step, :, :, j] >> np.uint8(run.bits * f) & np.uint8((1 << run.bits) - 1)
                    codes[c, group * LANES : (group + together) * LANES] = value.reshape(-1)
        return [codes[:, : m.outputs] for codes in found]

    def row_bytes(self, record: Record) -> int:
        """Bytes of a row of a matrix's activations."""
        return max((run.act + -(-run.components // ACT_ALIGN) * ACT_ALIGN for run in self.runs(record)), default=0)

    def pieces(self) -> list[Piece]:
        """All pieces that an offset names, once for each offset; descriptions first."""
        head, found = self.head, []
        tables = head.experts * RECORD_BYTES
        for i, field in enumerate(Head._fields):
            if field in ("up", "down") or (field in ("gate", "basis") and getattr(head, field) >= 0):
                size = RECORD_BYTES if field == "basis" else tables
                found.append(Piece(8 * i, getattr(head, field), size))
        for _, _, at in self.tables():
            m = self.record(at)
            components = sum(run.components for run in self.runs(m))
            lanes = -(-m.outputs // LANES) * LANES
            sizes = {
                "run_at": m.runs * RUN_BYTES,
                "index_at": components * 2,
                "scale_at": components * 4,
                "feature_at": lanes * 4,
                "codes_at": lanes // LANES * m.steps * STEP_BYTES,
                "dense_at": lanes * m.inputs * 2,
                "in_at": m.rank * m.inputs * 2,
                "out_at": m.rank * lanes * 2,
                "bias_at": lanes * 4,
            }
            for field, size in sizes.items():
                if getattr(m, field) >= 0:
                    found.append(Piece(at + 8 * Record._fields.index(field), getattr(m, field), size))
        return found


def spread_out(block: Tensor, margin: int = 256, fill: int = 1) -> tuple[Tensor, list[tuple[int, int]]]:
    """The same layer with its pieces apart.

    Args:
        block: uint8.
        margin: bytes behind each piece at least, a multiple of 64.
        fill: int32 that the margins are full of.

    Returns:
        The other block, and start and bytes of every margin: nothing has to be read there.
    """
    read = Block(block)
    pieces = read.pieces()
    places: dict[int, int] = {}
    sizes: dict[int, int] = {0: HEAD_BYTES}
    for piece in pieces:
        sizes[piece.start] = max(piece.size, sizes.get(piece.start, 0))
    end = 0
    for start in sorted(sizes):
        places[start] = end
        end += -(-sizes[start] // 64) * 64 + margin
    new = np.full(end // 4, fill, np.int32).view(np.uint8)
    old = block.numpy()
    for start, size in sizes.items():
        new[places[start] : places[start] + size] = old[start : start + size]

    def moved(at: int) -> int:
        start = max(s for s in places if s <= at)
        return at - start + places[start]

    for piece in pieces:
        struct.pack_into("<q", new.data, moved(piece.named_at), places[piece.start])
    struct.pack_into("<q", new.data, 8 * Head._fields.index("bytes"), end)
    inside = sorted((places[s], places[s] + size) for s, size in sizes.items())
    ends = [start for start, _ in inside[1:]] + [end]
    margins = [(stop, until - stop) for (_, stop), until in zip(inside, ends, strict=True) if until > stop]
    out = torch.empty(end, dtype=torch.uint8)
    out.copy_(torch.from_numpy(new))
    return out, margins
