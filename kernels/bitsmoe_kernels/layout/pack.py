"""From the file's neutral layout to the kernels': components grouped by width in tiles of 64, codes as in `fields.py`.

The kernels compute, for one matrix (one expert's projection, or its gate or up alone) and one token,

    act[k] = round(source[index[k]] * factor[k])
    y[n]   = scale[n] * (sum_k act[k] v[k, n] - sum_k act[k] offset[k])

plus the sum over dense components, unscaled. v = 1 + q 2^(p - m) is what a code becomes (`fields.py`). With factor =
s 2^(m - p) and offset = 1 + half 2^(p - m), half = (2^b - 1) / 2, that is the format's y = t sum s source (q - half);
rounding act costs no more than its rounding, as both sums see the rounded number.

Blocks of 16 components are sorted by width. What a width has left after whole tiles moves up into the next one's, with
its own offset; only the widest class an expert uses is padded. Codes wider than 4 bits become two components,
q = 16 (q div 16) + (q mod 16). Components of 0 bits vanish. Experts kept at 16 bits and the output side of compensators
are tiles of plain numbers (class `DENSE`).

Gate and up are stored for the components of down, in their order: row 2 i is the gate and row 2 i + 1 the up of down's
component i, so that the kernel of gate and up writes what that of down reads. Where gate and up are stored apart each
is a matrix of its own, gate of expert e at 2 e and up at 2 e + 1.

    M matrices      K components, padded to tiles, of the largest matrix      N outputs of the widest matrix
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from bitsmoe_kernels.format.schema import Layer, ProjectionName
from bitsmoe_kernels.layout.fields import CLASSES, GROUP, LANES, PAIRS, TILE, field_place, mantissa_bits
from bitsmoe_kernels.reference import LayerWeights, ProjectionWeights

UNIT = 16
"""Components that move together."""
PLANE_BITS = 4
"""Widest code of one component."""
STARTS = ("1", "2", "3", "3 extra", "4", "dense")
"""Columns of `Matrices.start`."""
WIDE_START, NARROW_START, DENSE_START = {2: 1, 3: 2, 4: 4}, {1: 0, 3: 3}, 5
"""Which of them is of a width's 32-bit words, of its 16-bit ones, of plain numbers."""


@dataclass(frozen=True)
class Matrices:
    """All matrices of one projection, as the kernels read them.

    Attributes:
        codes32: int32, tiles of 2, 3 and 4 bits: [tile, N, 4 lanes, words]. N is padded to a multiple of 16 here.
        codes16: int32, tiles of 1 bit and the extra words of 3 bits, two outputs in each: [tile, N / 16, 8, 4 lanes].
        dense: activations' dtype, [tile, N, 64].
        start: int64 [M, 6], element at which each class begins, in the order of `STARTS`.
        tiles: int32 [M, 5], tiles of 1, 2, 3, 4 bits and dense ones.
        columns: int32 [M], N of each matrix.
        index: int32 [M, K], where a component is read; -1: written by the compensator.
        factor: float32 [M, K], and
        offset: float32 [M, K]: see above; both 0 in padding.
        scale: float32 [M, N].
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
    rank: Tensor
    lowrank: Tensor
    lowrank_start: Tensor


@dataclass(frozen=True)
class KernelLayer:
    """The routed experts of one layer (or of one rank's shard) in the kernels' layout.

    Attributes:
        inputs: gate and up, one matrix for each expert or two (`split`).
        down: one matrix for each expert.
        bases: of gate and up together, [R, H] int8 or the activations' dtype; None without a basis.
        basis_scale: float32 [R]; None without a basis.
        split: whether gate and up are matrices of their own.
        fused: whether gate and up are stored in the order of down's components.
        input_widths: one bit for each class of `inputs` that occurs (1: 1-bit codes ... 8: 4-bit codes).
        down_widths: likewise of `down`.
        kwidth: neighbouring components that one thread of the matrix unit holds: 2 (wgmma) or 4 (mma).
    """

    inputs: Matrices
    down: Matrices
    basis: Tensor | None
    basis_scale: Tensor | None
    split: bool
    fused: bool
    input_widths: int
    down_widths: int
    kwidth: int

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        out = {f"{p}_{f.name}": getattr(getattr(self, p), f.name) for p in ("inputs", "down") for f in fields(Matrices)}
        return out | {k: v for k, v in (("basis", self.basis), ("basis_scale", self.basis_scale)) if v is not None}

    def static(self) -> dict[str, int]:
        """What is not a tensor."""
        return {k: int(getattr(self, k)) for k in ("split", "fused", "input_widths", "down_widths", "kwidth")}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], static: Mapping[str, int]) -> "KernelLayer":
        """Inverse of `tensors` and `static`."""
        inputs, down = (Matrices(*(tensors[f"{p}_{f.name}"] for f in fields(Matrices))) for p in ("inputs", "down"))
        return cls(
            inputs, down, tensors.get("basis"), tensors.get("basis_scale"),
            bool(static["split"]), bool(static["fused"]),
            static["input_widths"], static["down_widths"], static["kwidth"],
        )  # fmt: skip


def unsupported(layer: Layer) -> str | None:
    """Why the kernels cannot compute this layer; None where they can."""
    if layer.projections["down"].component_axis == "output":
        return "its down projection has components on the output side (--basis paper)"
    if any(p.component_axis == "output" for p in layer.projections.values()):
        return "gate or up has components on the output side"
    if layer.projections["down"].basis:
        return "its down projection has a basis"
    if any(p.basis and (p.kept_experts or p.lowrank_total) for p in layer.projections.values()):
        return "a projection has both a basis and experts at 16 bits or compensators"
    if len({p.basis and p.basis.bits for name, p in layer.projections.items() if name != "down"}) > 1:
        return "gate and up have bases of different kinds"
    return None


@dataclass
class _Rows:
    """Components of one matrix: codes [k, F] by class, and what belongs to each."""

    codes: dict[int, Tensor] = field(default_factory=dict)
    dense: Tensor | None = None  # [k, F]
    index: list[Tensor] = field(default_factory=list)
    factor: list[Tensor] = field(default_factory=list)
    offset: list[Tensor] = field(default_factory=list)


def to_kernel_layout(weights: LayerWeights, dtype: torch.dtype, kwidth: int) -> KernelLayer:
    """Re-order a layer for the kernels.

    Args:
        weights: schema and tensors of a layer or shard.
        dtype: of activations, float16 or bfloat16.
        kwidth: see `KernelLayer`.

    Raises:
        ValueError: `unsupported` names a reason.
    """
    if reason := unsupported(weights.layer):
        raise ValueError(reason)
    layer, p = weights.layer, weights.projections
    E = layer.num_experts
    inner = layer.intermediate_size
    down_rows = [_rows(p["down"], e, dtype, kwidth) for e in range(E)]
    fused = not layer.projections["down"].lowrank_total
    if fused:
        channels = [torch.cat(r.index) if r.index else torch.empty(0, dtype=torch.int64) for r in down_rows]
        live = [torch.cat(r.factor) != 0 if r.factor else torch.empty(0, dtype=torch.bool) for r in down_rows]
    else:
        padded = -(-inner // TILE) * TILE
        at = torch.arange(padded, device=p["down"].part("bits").device)
        channels, live = [at.clamp(max=inner - 1)] * E, [at < inner] * E
    every = torch.arange(layer.hidden_size, device=p["down"].part("bits").device)
    down = _matrices([(p["down"], e, rows, every, every >= 0) for e, rows in enumerate(down_rows)], dtype, kwidth)
    split = "gate" in p
    parts = []
    for e in range(E):
        at, on = channels[e].to(every.device), live[e].to(every.device)
        if split:
            parts += [(p[n], e, _rows(p[n], e, dtype, kwidth, _source(p, n)), at, on) for n in ("gate", "up")]
        else:
            both = torch.stack([at, at + inner], 1).flatten()
            parts.append((p["gate_up"], e, _rows(p["gate_up"], e, dtype, kwidth), both, on.repeat_interleave(2)))
    inputs = _matrices(parts, dtype, kwidth)
    basis, basis_scale = _bases([p[n] for n in (("gate", "up") if split else ("gate_up",))], dtype)
    return KernelLayer(inputs, down, basis, basis_scale, split, fused, _widths(inputs), _widths(down), kwidth)


def _widths(m: Matrices) -> int:
    return sum(1 << c for c in range(len(CLASSES)) if bool(m.tiles[:, c].any()))


def _source(p: Mapping[ProjectionName, ProjectionWeights], name: ProjectionName) -> int:
    """Where a projection's components begin among those of all bases."""
    gate = p["gate"].spec.basis
    return gate.rank if name == "up" and gate and p["up"].spec.basis else 0


def _bases(projections: Sequence[ProjectionWeights], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    having = [w for w in projections if w.spec.basis]
    if not having:
        return None, None
    basis = torch.cat([w.part("basis") for w in having])
    if basis.dtype == torch.int8:
        return basis, torch.cat([w.part("basis_scale") for w in having])
    return basis.to(dtype), torch.ones(len(basis), device=basis.device)


def _rows(w: ProjectionWeights, expert: int, dtype: torch.dtype, kwidth: int, source: int = 0) -> _Rows:
    """Components of one matrix, grouped by class and padded to whole tiles."""
    out = _Rows()
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
        place, m = {b: _places(b, dtype, kwidth).to(device) for b in CLASSES}, mantissa_bits(dtype == torch.float16)
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


def _add_dense(out: _Rows, w: ProjectionWeights, expert: int, device: torch.device) -> None:
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


def _matrices(
    parts: Sequence[tuple[ProjectionWeights, int, _Rows, Tensor, Tensor]], dtype: torch.dtype, kwidth: int
) -> Matrices:
    """Pack matrices one after another; each comes with its expert, rows, columns and which of the columns are live."""
    M = len(parts)
    device = parts[0][0].part("bits").device
    K = max((sum(map(len, r.index)) for _, _, r, _, _ in parts), default=0) or TILE
    N = max(len(columns) for *_, columns, _ in parts) or 1
    words32, words16, dense = _Buffer(), _Buffer(), _Buffer()
    start = torch.zeros(M, len(STARTS), dtype=torch.int64)
    tiles = torch.zeros(M, len(CLASSES) + 1, dtype=torch.int32)
    index = torch.zeros(M, K, dtype=torch.int32, device=device)
    factor, offset = torch.zeros(M, K, device=device), torch.zeros(M, K, device=device)
    scale = torch.zeros(M, N, device=device)
    rank, first = torch.zeros(M, dtype=torch.int32), torch.zeros(M, dtype=torch.int32)
    lowrank: list[Tensor] = []
    for i, (w, expert, rows, columns, live) in enumerate(parts):
        for c, b in enumerate(CLASSES):
            if b not in rows.codes:
                continue
            wide, narrow = pack_words(_padded(rows.codes[b][:, columns]), b, kwidth)
            tiles[i, c] = len(rows.codes[b]) // TILE
            if wide is not None:
                start[i, WIDE_START[b]] = words32.put(wide)
            if narrow is not None:
                start[i, NARROW_START[b]] = words16.put(narrow)
        if rows.dense is not None:
            block = _padded(rows.dense[:, columns] * live)
            block = block.view(len(block) // TILE, TILE, block.shape[1]).mT
            tiles[i, len(CLASSES)] = len(block)
            start[i, DENSE_START] = dense.put(block.to(dtype))
        k = sum(map(len, rows.index))
        if k:
            index[i, :k] = torch.cat(rows.index).int()
            factor[i, :k], offset[i, :k] = torch.cat(rows.factor), torch.cat(rows.offset)
        t = torch.ones(len(columns), device=device)
        if rows.codes:
            t = w.part("feature_scale")[expert].float()[columns]
            if dtype == torch.float16:
                # Powers of two move from the activations' factor to the outputs' scale: float16 cannot overflow.
                coded = sum(map(len, rows.codes.values()))
                unit = torch.exp2(factor[i, :coded].abs().amax().clamp(min=1e-30).log2().ceil())
                factor[i, :coded] /= unit
                t = t * unit
        scale[i, : len(columns)] = t * live
        if expert not in w.spec.kept_experts and (pair := w.lowrank(expert)) is not None:
            rank[i], first[i] = len(pair[0]), sum(map(len, lowrank))
            lowrank.append(pair[0].half())
    return Matrices(
        codes32=words32.joined(torch.int32, device),
        codes16=words16.joined(torch.int32, device),
        dense=dense.joined(dtype, device),
        start=start.to(device), tiles=tiles.to(device),
        columns=torch.tensor([len(c) for *_, c, _ in parts], dtype=torch.int32, device=device),
        index=index, factor=factor, offset=offset, scale=scale, rank=rank.to(device),
        lowrank=torch.cat(lowrank) if lowrank else torch.zeros(0, 1, dtype=torch.float16, device=device),
        lowrank_start=first.to(device),
    )  # fmt: skip


def _padded(columns: Tensor) -> Tensor:
    """With zero columns up to a multiple of 16."""
    return torch.nn.functional.pad(columns, (0, -columns.shape[1] % GROUP))


def positions(kwidth: int) -> Tensor:
    """The component of a tile that code (a, c) of each lane stands for, int64 [4, 8, 2]."""
    j, a, c = torch.meshgrid(torch.arange(LANES), torch.arange(PAIRS), torch.arange(2), indexing="ij")
    if kwidth == 2:
        return a * 8 + j * 2 + c
    return (a // 2) * 16 + j * 4 + (a % 2) * 2 + c


def _places(bits: int, dtype: torch.dtype, kwidth: int) -> Tensor:
    """p of each of a tile's components, int64 [64]."""
    out = torch.empty(TILE, dtype=torch.int64)
    place = torch.tensor([field_place(bits, a, dtype == torch.float16) for a in range(PAIRS)])
    out[positions(kwidth).flatten()] = place[None, :, None].expand(LANES, PAIRS, 2).flatten()
    return out


def pack_words(codes: Tensor, bits: int, kwidth: int) -> tuple[Tensor | None, Tensor | None]:
    """Codes of one class to words.

    Args:
        codes: uint8 [64 n, N], below 2^bits; N a multiple of 16.
        bits: 1 to 4.
        kwidth: 2 or 4.

    Returns:
        int32 [n, N, 4, words] or None, int32 [n, N / 16, 8, 4] or None.
    """
    N = codes.shape[1]
    at = positions(kwidth).flatten().to(codes.device)
    n = len(codes) // TILE  # said, for N may be 0
    q = codes.view(n, TILE, N)[:, at].view(n, LANES, PAIRS, 2, N).permute(0, 4, 1, 2, 3).int()
    if bits == 1:
        return None, _in_twos(_joined(q, [(a, c, a + 8 * c) for a in range(PAIRS) for c in (0, 1)]))
    if bits == 2:
        return _joined(q, [(a, c, 2 * a + 16 * c) for a in range(PAIRS) for c in (0, 1)])[..., None], None
    if bits == 4:
        halves = [[(a, c, 4 * (a % 4) + 16 * c) for a in range(4 * h, 4 * h + 4) for c in (0, 1)] for h in (0, 1)]
        return torch.stack([_joined(q, one) for one in halves], -1), None
    wide = _joined(q, [(a, c, 3 * a + 16 * c) for a in range(5) for c in (0, 1)])
    top, low = q[..., 7, :] >> 2, q[..., 7, :] & 3
    wide = wide | top[..., 0] << 15 | top[..., 1] << 31
    narrow = _joined(q, [(a, c, 3 * (a - 5) + 8 * c) for a in (5, 6) for c in (0, 1)])
    return wide[..., None], _in_twos(narrow | low[..., 0] << 6 | low[..., 1] << 14)


def _in_twos(narrow: Tensor) -> Tensor:
    """16-bit words [n, N, 4] of outputs n and n + 8 in one word each."""
    low, high = narrow.view(len(narrow), -1, 2, GROUP // 2, LANES).unbind(2)
    return low | high << 16


def _one_by_one(narrow: Tensor) -> Tensor:
    """Inverse of `_in_twos`."""
    return torch.stack([narrow & 0xFFFF, narrow >> 16 & 0xFFFF], 2).view(len(narrow), -1, LANES)


def _joined(q: Tensor, places: list[tuple[int, int, int]]) -> Tensor:
    word = torch.zeros(q.shape[:-2], dtype=torch.int32, device=q.device)
    for a, c, at in places:
        word |= q[..., a, c] << at
    return word


def unpack_words(wide: Tensor | None, narrow: Tensor | None, bits: int, kwidth: int) -> Tensor:
    """Inverse of `pack_words`: uint8 [64 n, N]."""
    some = wide if wide is not None else narrow
    assert some is not None
    if narrow is not None:
        narrow = _one_by_one(narrow)
    n, N = (wide if wide is not None else narrow).shape[:2]  # type: ignore[union-attr]
    q = torch.zeros(n, N, LANES, PAIRS, 2, dtype=torch.int32, device=some.device)
    mask = (1 << bits) - 1
    for a in range(PAIRS):
        for c in (0, 1):
            if bits == 1:
                assert narrow is not None
                q[..., a, c] = narrow >> (a + 8 * c) & 1
            elif bits == 2:
                assert wide is not None
                q[..., a, c] = wide[..., 0] >> (2 * a + 16 * c) & mask
            elif bits == 4:
                assert wide is not None
                q[..., a, c] = wide[..., a // 4] >> (4 * (a % 4) + 16 * c) & mask
            else:
                assert wide is not None
                assert narrow is not None
                if a < 5:
                    q[..., a, c] = wide[..., 0] >> (3 * a + 16 * c) & mask
                elif a < 7:
                    q[..., a, c] = narrow >> (3 * (a - 5) + 8 * c) & mask
                else:
                    top = wide[..., 0] >> (15 + 16 * c) & 1
                    q[..., a, c] = (narrow >> (6 + 8 * c) & 3) | top << 2
    out = torch.empty(n, TILE, N, dtype=torch.uint8, device=some.device)
    out[:, positions(kwidth).flatten().to(some.device)] = q.permute(0, 2, 3, 4, 1).reshape(n, TILE, N).to(torch.uint8)
    return out.view(n * TILE, N)


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
