"""The matrices of one projection as the kernels read them: components grouped by width, in tiles of 64.

The kernels compute, for one matrix (one expert's projection, or its gate or up alone) and one token,

    act[k] = round(source[index[k]] * factor[k])
    y[n]   = scale[n] * (sum_k act[k] v[k, n] - sum_k act[k] offset[k])

plus the sum over dense components, unscaled. v = 1 + q 2^(p - m) is what a code becomes (`fields.py`). With factor =
s 2^(m - p) and offset = 1 + half 2^(p - m), half = (2^b - 1) / 2, that is the format's y = t sum s source (q - half).
Rounding act costs no more than its own rounding, as both sums see the rounded number.

Blocks of 16 components are sorted by width. What a width has left after whole tiles moves up into the next one's, with
its own offset. Only the widest class that an expert uses is padded. Codes wider than 4 bits become two components,
q = 16 (q div 16) + (q mod 16). Components of 0 bits vanish. Experts kept at 16 bits and the output side of compensators
are tiles of plain numbers (class `DENSE`).

    M matrices      K components, padded to tiles, of the largest matrix      N outputs of the widest matrix
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from bitsmoe_kernels.layout.fields import CLASSES, GROUP, LANES, TILE, mantissa_bits
from bitsmoe_kernels.layout.words import component_places, pack_words, unpack_words
from bitsmoe_kernels.reference import ProjectionWeights

UNIT = 16
"""Components that move together."""
PLANE_BITS = 4
"""Widest code of one component."""
STARTS = ("1", "2", "3", "3 extra", "4", "dense")
"""Columns of `Matrices.start`."""
WIDE_START, NARROW_START, DENSE_START = {2: 1, 3: 2, 4: 4}, {1: 0, 3: 3}, 5
"""Columns of `start` for a width's 32-bit words, for its 16-bit words, and for plain numbers."""


@dataclass(frozen=True)
class Matrices:
    """All matrices of one projection, as the kernels read them.

    Attributes:
        codes32: int32, tiles of 2, 3 and 4 bits: [tile, N, 4 lanes, words]. N is padded to a multiple of 16 here.
        codes16: int32, tiles of 1 bit and the extra words of 3 bits, two outputs in each: [tile, N / 16, 8, 4 lanes].
        dense: activations' dtype, [tile, N, 64].
        start: int64 [M, 6], element at which each class begins, in the order of `STARTS`, or would begin. Classes of a
            matrix lie one behind another.
        tiles: int32 [M, 5], tiles of 1, 2, 3, 4 bits and dense ones.
        columns: int32 [M], N of each matrix.
        index: int32 [M, K], where a component is read; -1: written by the compensator.
        factor: float32 [M, K], and
        offset: float32 [M, K]: see above; both 0 in padding.
        scale: float32 [M, N].
        bias: float32 [M, N]; empty without.
        rank: int32 [M], and
        lowrank: float16 [sum of ranks, inputs]: the input side of compensators; empty without.
        lowrank_start: int32 [M].
    """

    codes32: Tensor
    codes16: Tensor
    dense: Tensor
    start: Tensor
    tiles: Tensor
    columns: Tensor
    index: Tensor
    factor: Tensor
    offset: Tensor
    scale: Tensor
    bias: Tensor
    rank: Tensor
    lowrank: Tensor
    lowrank_start: Tensor


@dataclass
class Components:
    """The components that one matrix contracts, in the order of its tiles.

    Attributes:
        codes: uint8 [k, F] by class, whole tiles.
        dense: plain numbers [k, F], whole tiles; they follow the codes.
        index: where each component is read, in pieces. Pieces are in the order of the classes; dense components last.
        factor: as `Matrices.factor`, in the same pieces.
        offset: as `Matrices.offset`, in the same pieces.
    """

    codes: dict[int, Tensor] = field(default_factory=dict)
    dense: Tensor | None = None
    index: list[Tensor] = field(default_factory=list)
    factor: list[Tensor] = field(default_factory=list)
    offset: list[Tensor] = field(default_factory=list)


def components_of(w: ProjectionWeights, expert: int, dtype: torch.dtype, kwidth: int, source: int = 0) -> Components:
    """Components of one matrix, grouped by class and padded to whole tiles."""
    out = Components()
    C, G = w.layer.components(w.name), w.block_size
    bits = w.part("bits")[expert].long()
    device = bits.device
    unit_bits = bits.repeat_interleave(G // UNIT)[: -(-C // UNIT)]
    # Every unit as (unit, bits, plane); plane 1 holds what is above the lowest four bits.
    entries: list[list[tuple[int, int, int]]] = [[] for _ in range(PLANE_BITS + 1)]
    for unit, b in enumerate(unit_bits.tolist()):
        for plane, width in ((0, min(b, PLANE_BITS)), (1, b - PLANE_BITS)):
            if width > 0:
                entries[width].append((unit, width, plane))
    if any(entries):
        codes = w.codes(expert)
        pad = len(unit_bits) * UNIT - C
        codes = torch.cat([codes, codes.new_zeros(pad, codes.shape[1])])
        order = w.order(expert)
        order = torch.arange(C, device=device) if order is None else order
        order = torch.cat([order + source, order.new_zeros(pad)])
        scale = torch.cat([w.part("component_scale")[expert].float(), torch.zeros(pad, device=device)])
        m = mantissa_bits(dtype == torch.float16)
        place = {b: component_places(b, dtype, kwidth).to(device) for b in CLASSES}
        carry: list[tuple[int, int, int]] = []
        per_tile = TILE // UNIT
        for b in CLASSES:
            here, carry = entries[b] + carry, []
            if not here:
                continue
            extra = len(here) % per_tile
            if extra and any(entries[b + 1 :]):
                here, carry = here[:-extra], here[-extra:]
            here = here + [(-1, 1, 0)] * (-len(here) % per_tile)
            if not here:
                continue
            units, wide, high = (torch.tensor(v, device=device) for v in zip(*here, strict=True))
            row = (units.clamp(min=0)[:, None] * UNIT + torch.arange(UNIT, device=device)).flatten()
            live = (units >= 0).repeat_interleave(UNIT) & (row < C)
            bits_of, plane_of = wide.repeat_interleave(UNIT), high.repeat_interleave(UNIT)
            q = (codes[row] >> (PLANE_BITS * plane_of)[:, None]) & ((1 << bits_of) - 1)[:, None]
            out.codes[b] = (q * live[:, None]).to(torch.uint8)
            lift = torch.exp2((m - place[b]).float()).repeat(len(here) // per_tile)
            out.index.append(order[row] * live)
            out.factor.append(scale[row] * live * lift * torch.exp2((PLANE_BITS * plane_of).float()))
            half = (torch.exp2(bits_of.float()) - 1) / 2
            out.offset.append((1 + half / lift) * live)
    _add_dense(out, w, expert, device)
    return out


def _add_dense(out: Components, w: ProjectionWeights, expert: int, device: torch.device) -> None:
    """Tiles of plain numbers: an expert kept at 16 bits, or the output side of its compensator."""
    if expert in w.spec.kept_experts:
        rows, index = w.weight(expert).T, torch.arange(w.layer.side(w.name, "input"), device=device)
    elif (pair := w.lowrank(expert)) is not None and len(pair[1]):
        rows, index = pair[1], torch.full((len(pair[1]),), -1, device=device)
    else:
        return
    pad = -len(rows) % TILE
    out.dense = torch.cat([rows, rows.new_zeros(pad, rows.shape[1])])
    padding = torch.full((pad,), -1 if int(index[0]) < 0 else 0, device=device)
    out.index.append(torch.cat([index, padding]))
    out.factor.append(torch.cat([torch.ones(len(rows), device=device), torch.zeros(pad, device=device)]))
    out.offset.append(torch.zeros(len(rows) + pad, device=device))


class MatrixContent(NamedTuple):
    """One matrix before it is packed.

    Attributes:
        weights: its projection.
        expert: which expert's.
        components: what it contracts.
        columns: the column of the file's matrix for each output, int64 [N].
        live: bool [N], False for outputs that are padding.
    """

    weights: ProjectionWeights
    expert: int
    components: Components
    columns: Tensor
    live: Tensor


@dataclass
class _Buffer:
    """Tensors one after another in one flat one."""

    parts: list[Tensor] = field(default_factory=list)
    size: int = 0

    def put(self, words: Tensor) -> int:
        """Append; returns the element at which it begins."""
        self.parts.append(words.flatten())
        self.size += words.numel()
        return self.size - words.numel()

    def joined(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """All of it; one zero where there is nothing, for kernels need an address."""
        return torch.cat(self.parts) if self.parts else torch.zeros(1, dtype=dtype, device=device)


def pack_matrices(parts: Sequence[MatrixContent], dtype: torch.dtype, kwidth: int) -> Matrices:
    """Pack the matrices of one projection (or of gate and up) one after another.

    Args:
        parts: the matrices, in the order in which kernels count them.
        dtype: of activations, float16 or bfloat16.
        kwidth: see `KernelLayer`.
    """
    M = len(parts)
    device = parts[0].weights.part("bits").device
    K = max((sum(map(len, part.components.index)) for part in parts), default=0) or TILE
    N = max(len(part.columns) for part in parts) or 1
    words32, words16, dense = _Buffer(), _Buffer(), _Buffer()
    start = torch.zeros(M, len(STARTS), dtype=torch.int64)
    tiles = torch.zeros(M, len(CLASSES) + 1, dtype=torch.int32)
    index = torch.zeros(M, K, dtype=torch.int32, device=device)
    factor, offset = torch.zeros(M, K, device=device), torch.zeros(M, K, device=device)
    scale = torch.zeros(M, N, device=device)
    bias = torch.zeros(M, N if any(part.weights.spec.bias for part in parts) else 0, device=device)
    rank, first = torch.zeros(M, dtype=torch.int32), torch.zeros(M, dtype=torch.int32)
    lowrank: list[Tensor] = []
    for i, (w, expert, components, columns, live) in enumerate(parts):
        for c, b in enumerate(CLASSES):
            for starts, words in ((WIDE_START, words32), (NARROW_START, words16)):
                if b in starts:
                    start[i, starts[b]] = words.size
            if b not in components.codes:
                continue
            wide, narrow = pack_words(_padded(components.codes[b][:, columns]), b, kwidth)
            tiles[i, c] = len(components.codes[b]) // TILE
            if wide is not None:
                words32.put(wide)
            if narrow is not None:
                words16.put(narrow)
        if components.dense is not None:
            block = _padded(components.dense[:, columns] * live)
            block = block.view(len(block) // TILE, TILE, block.shape[1]).mT
            tiles[i, len(CLASSES)] = len(block)
            start[i, DENSE_START] = dense.put(block.to(dtype))
        k = sum(map(len, components.index))
        if k:
            index[i, :k] = torch.cat(components.index).int()
            factor[i, :k], offset[i, :k] = torch.cat(components.factor), torch.cat(components.offset)
        t = torch.ones(len(columns), device=device)
        if components.codes:
            t = w.part("feature_scale")[expert].float()[columns]
            if dtype == torch.float16:
                # Powers of two move from the activations' factor to the outputs' scale: float16 cannot overflow.
                coded = sum(map(len, components.codes.values()))
                unit = torch.exp2(factor[i, :coded].abs().amax().clamp(min=1e-30).log2().ceil())
                factor[i, :coded] /= unit
                t = t * unit
        scale[i, : len(columns)] = t * live
        if bias.numel() and (added := w.bias(expert)) is not None:
            bias[i, : len(columns)] = added[columns] * live
        if expert not in w.spec.kept_experts and (pair := w.lowrank(expert)) is not None:
            rank[i], first[i] = len(pair[0]), sum(map(len, lowrank))
            lowrank.append(pair[0].half())
    return Matrices(
        codes32=words32.joined(torch.int32, device),
        codes16=words16.joined(torch.int32, device),
        dense=dense.joined(dtype, device),
        start=start.to(device), tiles=tiles.to(device),
        columns=torch.tensor([len(part.columns) for part in parts], dtype=torch.int32, device=device),
        index=index, factor=factor, offset=offset, scale=scale, bias=bias, rank=rank.to(device),
        lowrank=torch.cat(lowrank) if lowrank else torch.zeros(0, 1, dtype=torch.float16, device=device),
        lowrank_start=first.to(device),
    )  # fmt: skip


def _padded(columns: Tensor) -> Tensor:
    """With zero columns up to a multiple of 16."""
    return torch.nn.functional.pad(columns, (0, -columns.shape[1] % GROUP))


def matrix_rows(matrices: Matrices, i: int, kwidth: int) -> tuple[dict[int, Tensor], Tensor]:
    """Inverse of the packing for one matrix: codes uint8 [k, N] by class and dense rows [k, N], N padded."""
    N = -(-int(matrices.columns[i]) // GROUP) * GROUP
    counts, start = matrices.tiles[i].tolist(), matrices.start[i].tolist()

    def cut(words: Tensor, at: int, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        return words[at : at + size].view(shape)

    codes = {}
    for c, b in enumerate(CLASSES):
        n = counts[c]
        if n == 0:
            continue
        wide = narrow = None
        if b in WIDE_START:
            wide = cut(matrices.codes32, start[WIDE_START[b]], n, N, LANES, 2 if b == 4 else 1)
        if b in NARROW_START:
            narrow = cut(matrices.codes16, start[NARROW_START[b]], n, N // GROUP, GROUP // 2, LANES)
        codes[b] = unpack_words(wide, narrow, b, kwidth)
    n = counts[len(CLASSES)]
    dense = cut(matrices.dense, start[DENSE_START], n, N, TILE).mT.reshape(n * TILE, N)
    return codes, dense
