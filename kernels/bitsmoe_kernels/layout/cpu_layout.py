"""A layer of the file's neutral layout to the layout of the CPU kernels: one block of bytes, see `_cpu/layout.h`.

A code of b bits is stored as planes of 4, 2 and 1 bits, so memory stays the same: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2,
7 = 4 + 2 + 1, 8 = 4 + 4. Units of 16 components with planes of one width and place value follow one another in a *run*.
A plane of w bits at place value 2^p is centred by itself: (2^b - 1) / 2 is the sum of its planes' 2^p (2^w - 1) / 2. So

    y[n] = feature_scale[n] * sum over runs of 2^p sum_k act[k] (code[k, n] - (2^w - 1) / 2)

with act[k] = component_scale[k] * source[index[k]]. An 8-bit basis is a matrix of one run: bytes from 0 to 255, of
which 128 is subtracted.
"""

import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitsmoe_kernels._cpu import library
from bitsmoe_kernels.expert_mlp import ACTIVATION_NUMBERS
from bitsmoe_kernels.format.schema import Layer
from bitsmoe_kernels.layout.forms import restricted
from bitsmoe_kernels.reference import LayerWeights, ProjectionWeights

LANES, STRIPS, STEP_BYTES, ALIGN = 16, 4, 64, 64
UNIT = 16
"""Components that move together."""
PLANES = {
    0: (), 1: ((1, 0),), 2: ((2, 0),), 3: ((2, 0), (1, 2)), 4: ((4, 0),), 5: ((4, 0), (1, 4)), 6: ((4, 0), (2, 4)),
    7: ((4, 0), (2, 4), (1, 6)), 8: ((4, 0), (4, 4)),
}  # fmt: skip
"""Planes of each width: their bits, and the place of their lowest bit."""
RUNS = ((4, 0), (4, 4), (2, 0), (2, 4), (1, 0), (1, 2), (1, 4), (1, 6))
"""Runs in the order in which a matrix has them."""
MAGIC = 0x35554350
MOST_INPUTS = 32_768
"""Beyond it a sum of products of a basis in 8 bits does not fit int32."""
MOST_RANKS = 65_536
"""Of the bases of gate and up together: an index has 16 bits."""
_MATRIX, _LAYER, _RUN = struct.Struct("<15q"), struct.Struct("<17q"), struct.Struct("<8i")


def unsupported(layer: Layer) -> str | None:
    """Why the CPU kernels cannot compute this layer; None where they can."""
    if reason := restricted(layer):
        return reason
    if (widest := max(layer.hidden_size, layer.intermediate_size)) > MOST_INPUTS:
        return f"hidden_size or intermediate_size is {widest}, more than {MOST_INPUTS}"
    if (ranks := sum(p.basis.rank for p in layer.projections.values() if p.basis)) > MOST_RANKS:
        return f"its bases have {ranks} rows, more than {MOST_RANKS}"
    return None


class _Matrix(NamedTuple):
    """`struct Matrix` of layout.h."""

    outputs: int
    inputs: int
    runs: int = 0
    run_at: int = -1
    steps: int = 0
    index_at: int = -1
    scale_at: int = -1
    feature_at: int = -1
    codes_at: int = -1
    dense_at: int = -1
    dense_kind: int = 0
    rank: int = 0
    in_at: int = -1
    out_at: int = -1
    bias_at: int = -1


@dataclass
class _Run:
    bits: int
    shift: int
    twice_half: int
    units: np.ndarray
    component: int = 0
    act: int = 0

    @property
    def count(self) -> int:
        """Components, padding included."""
        return len(self.units) * UNIT

    @property
    def steps(self) -> int:
        """Steps of 32 / bits components."""
        return self.count * self.bits // 32


@dataclass
class _Block:
    """Pieces of the layer's block of bytes."""

    size: int
    pieces: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def reserve(self, size: int) -> int:
        """Room for so many bytes; returns where it begins."""
        at = self.size
        self.size += -(-size // ALIGN) * ALIGN
        return at

    def put(self, array: np.ndarray) -> int:
        """Append an array; returns where it begins."""
        at = self.reserve(array.nbytes)
        self.pieces.append((at, np.ascontiguousarray(array)))
        return at


@dataclass
class _Coded:
    """What the codes of one expert's projection share, whichever of its outputs a matrix holds."""

    runs: list[_Run]
    run_at: int
    index_at: int
    scale_at: int

    @property
    def steps(self) -> int:
        return sum(run.steps for run in self.runs)

    @property
    def acts(self) -> int:
        """Bytes of a row of activations."""
        return sum(-(-run.count // ALIGN) * ALIGN for run in self.runs)


def to_cpu_layout(weights: LayerWeights) -> Tensor:
    """Re-order a layer for the CPU kernels.

    Args:
        weights: schema and tensors of a layer or shard, on the CPU.

    Returns:
        uint8, the layer's block of bytes.

    Raises:
        ValueError: `unsupported` names a reason.
    """
    layer, p = weights.layer, weights.projections
    if reason := unsupported(layer):
        raise ValueError(reason)
    E, H, I = layer.num_experts, layer.hidden_size, layer.intermediate_size  # noqa: E741 - the paper's symbol
    together, names = "gate_up" in p, ("gate", "up") if layer.gated else ("up",)
    tables = {name: _LAYER.size + i * E * _MATRIX.size for i, name in enumerate((*names, "down"))}
    basis_at = tables["down"] + E * _MATRIX.size
    block = _Block(-(-(basis_at + _MATRIX.size) // ALIGN) * ALIGN)
    head = bytearray(block.size)
    jobs: list[_Job] = []
    inputs = [p[name] for name in ("gate_up", "gate", "up") if name in p]
    acts = {"input": ALIGN, "down": ALIGN}
    ranks = max([0, *(r for w in p.values() if w.spec.lowrank_total for r in w.part("lowrank_rank").tolist())])

    def describe(table: str, e: int, w: ProjectionWeights, coded: _Coded, first: int, columns: int) -> None:
        row = _matrix(block, w, e, coded, first, columns, jobs)
        _MATRIX.pack_into(head, tables[table] + e * _MATRIX.size, *row)

    for e in range(E):
        for i, w in enumerate(inputs):
            offset = inputs[0].spec.basis.rank if i and inputs[0].spec.basis else 0  # bases lie one after another
            coded = _coded(block, w, e, offset)
            acts["input"] = max(acts["input"], coded.acts)
            if together:
                describe("gate", e, w, coded, 0, I)
                describe("up", e, w, coded, I, I)
            else:
                describe(names[i], e, w, coded, 0, I)
        coded = _coded(block, p["down"], e, 0)
        acts["down"] = max(acts["down"], coded.acts)
        describe("down", e, p["down"], coded, 0, H)
    having = [w for w in inputs if w.spec.basis]
    rank, basis_acts = 0, 0
    if having:
        rank, basis_acts, row = _basis(block, having)
        _MATRIX.pack_into(head, basis_at, *row)
    _LAYER.pack_into(
        head, 0, MAGIC, block.size, E, H, I, basis_at if having else -1, rank, tables.get("gate", -1),
        tables["up"], tables["down"], int(bool(having)), int(len(inputs) == 1), basis_acts, acts["input"], acts["down"],
        ranks, ACTIVATION_NUMBERS[layer.hidden_act],
    )  # fmt: skip
    out = torch.empty(block.size, dtype=torch.uint8)
    library.large_pages(out)
    view = out.zero_().numpy()  # the bytes between pieces are zero: equal layers are equal blocks
    view[: len(head)] = np.frombuffer(head, np.uint8)
    for at, array in block.pieces:
        view[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(lambda job: job.run(out), jobs))
    return out


@dataclass
class _Job:
    """The codes of one matrix, to be brought into their place."""

    words: Tensor
    starts: np.ndarray
    runs: Sequence[_Run]
    halves_per_block: int
    first: int
    columns: int
    at: int

    def run(self, out: Tensor) -> None:
        before, steps = 0, sum(run.steps for run in self.runs)
        for run in self.runs:
            block = run.units // self.halves_per_block
            rows = np.where(run.units < 0, -1, self.starts[block] + run.shift)
            halves = (run.units % self.halves_per_block).astype(np.uint8)
            library.load().bitsmoe_pack(
                self.words.data_ptr(), self.words.itemsize, self.words.shape[1], rows.ctypes.data, halves.ctypes.data,
                len(rows), run.bits, self.first, self.columns, before, steps, out.data_ptr() + self.at,
            )  # fmt: skip
            before += run.steps


def _coded(block: _Block, w: ProjectionWeights, e: int, offset: int) -> _Coded:
    """Runs of one expert's projection, with where its components are read and their scales."""
    C = w.layer.components(w.name)
    bits = w.part("bits")[e].numpy()
    widths = bits.repeat(w.block_size // UNIT)[: -(-C // UNIT)]
    runs: list[_Run] = []
    component = act = 0
    for plane in RUNS:
        units = np.flatnonzero(np.isin(widths, [b for b, planes in PLANES.items() if plane in planes]))
        if not len(units):
            continue
        if plane[0] == 1 and len(units) % 2:
            units = np.append(units, -1)
        run = _Run(*plane, (1 << plane[0]) - 1, units, component, act)
        component += run.count
        act += -(-run.count // ALIGN) * ALIGN
        runs.append(run)
    if not runs:
        return _Coded([], -1, -1, -1)
    row = (np.concatenate([r.units for r in runs])[:, None] * UNIT + np.arange(UNIT)).reshape(-1)
    live = (row >= 0) & (row < C)
    row = np.where(live, row, 0)
    order = w.order(e)
    index = row if order is None else order.numpy()[row]
    scale = np.where(live, w.part("component_scale")[e].float().numpy()[row], 0).astype(np.float32)
    table = b"".join(_RUN.pack(r.bits, r.shift, r.steps, r.twice_half, r.component, r.act, r.count, 0) for r in runs)
    return _Coded(
        runs,
        block.put(np.frombuffer(table, np.uint8)),
        block.put((index + offset).astype(np.uint16)),
        block.put(scale),
    )


def _matrix(
    block: _Block, w: ProjectionWeights, e: int, coded: _Coded, first: int, columns: int, jobs: list[_Job]
) -> _Matrix:
    """The description of one matrix: outputs [first, first + columns) of an expert's projection."""
    K = w.layer.side(w.name, "input")
    padded = -(-columns // LANES) * LANES
    bias_at = -1
    if (bias := w.bias(e)) is not None:
        added = np.zeros(padded, np.float32)
        added[:columns] = bias[first : first + columns].numpy()
        bias_at = block.put(added)
    if e in w.spec.kept_experts:
        dense = w.part("kept")[w.spec.kept_experts.index(e), first : first + columns]
        at, kind = _dense(block, dense)
        return _Matrix(columns, K, dense_at=at, dense_kind=kind, bias_at=bias_at)
    feature = np.zeros(padded, np.float32)
    feature[:columns] = w.part("feature_scale")[e, first : first + columns].float().numpy()
    codes_at = block.reserve(padded // LANES * coded.steps * STEP_BYTES)
    bits = w.part("bits")[e].numpy().astype(np.int64)
    if coded.runs:
        end = w.row_ends[e]
        words = w.part("codes")[end - int(bits.sum()) : end].contiguous()
        starts = np.cumsum(bits) - bits
        jobs.append(_Job(words, starts, coded.runs, w.block_size // UNIT, first, columns, codes_at))
    rank, in_at, out_at = 0, -1, -1
    if w.spec.lowrank_total:
        ranks = w.part("lowrank_rank").tolist()
        rank, begin = ranks[e], sum(ranks[:e])
        if rank:
            rows = slice(begin, begin + rank)
            outer = np.zeros((rank, padded), np.float16)
            outer[:, :columns] = w.part("lowrank_out")[rows, first : first + columns].numpy()
            in_at, out_at = block.put(w.part("lowrank_in")[rows].numpy()), block.put(outer)
    return _Matrix(
        columns, K, len(coded.runs), coded.run_at, coded.steps, coded.index_at, coded.scale_at, block.put(feature),
        codes_at, rank=rank, in_at=in_at, out_at=out_at, bias_at=bias_at,
    )  # fmt: skip


def _dense(block: _Block, matrix: Tensor) -> tuple[int, int]:
    """16-bit weights [N, K] as [strips, K, 16]; where they are, and their kind."""
    N, K = matrix.shape
    words = matrix.contiguous().view(torch.int16).numpy()
    padded = np.zeros((-(-N // LANES) * LANES, K), np.int16)
    padded[:N] = words
    return block.put(padded.reshape(-1, LANES, K).transpose(0, 2, 1)), int(matrix.dtype == torch.float16)


def _basis(block: _Block, having: Sequence[ProjectionWeights]) -> tuple[int, int, _Matrix]:
    """All bases of gate and up as one matrix: its rows, bytes of a row of activations, its description."""
    basis = torch.cat([w.part("basis") for w in having])
    R, H = basis.shape
    if basis.dtype != torch.int8:
        at, kind = _dense(block, basis)
        return R, ALIGN, _Matrix(R, H, dense_at=at, dense_kind=kind)
    strips, steps = -(-R // LANES), -(-H // 4)
    codes = np.full((strips * LANES, steps * 4), 128, np.uint8)
    codes[:R, :H] = basis.numpy().view(np.uint8) ^ 128  # two's complement plus 128
    by_strip = codes.reshape(strips, LANES, steps, 4).transpose(0, 2, 1, 3)  # [strip, step, lane, byte]
    groups = [by_strip[g : g + STRIPS].transpose(1, 0, 2, 3).reshape(-1) for g in range(0, strips, STRIPS)]
    scale = np.zeros(strips * LANES, np.float32)
    scale[:R] = torch.cat([w.part("basis_scale") for w in having]).numpy()
    count = steps * 4
    run_at = block.put(np.frombuffer(_RUN.pack(8, 0, steps, 256, 0, 0, count, 0), np.uint8))
    feature_at, codes_at = block.put(scale), block.put(np.concatenate(groups))
    row = _Matrix(R, H, 1, run_at, steps, feature_at=feature_at, codes_at=codes_at)
    return R, -(-count // ALIGN) * ALIGN, row
