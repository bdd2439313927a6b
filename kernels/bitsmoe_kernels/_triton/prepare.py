"""Everything around the GEMM: who goes where, the shared basis, scaled activations.

T tokens      S slots, T * top_k      E experts held here
"""

import triton
import triton.language as tl

from bitsmoe_kernels._triton.codes import product, rounded


@triton.jit
def _expert_of(ids, s, S, E: tl.constexpr, EXPERTS: tl.constexpr, EXPERT_MAP: tl.constexpr, expert_map):
    """`reference.expert_of_slots` of slots s, int32."""
    expert = tl.load(ids + s, mask=s < S, other=-1)
    # Bounded before the cast: 2^32 + 1 must not become expert 1.
    here = (expert >= 0) & (expert < EXPERTS)
    expert = tl.where(here, expert, 0).to(tl.int32)
    if EXPERT_MAP:
        mapped = tl.load(expert_map + expert, mask=here, other=-1)
        here = (mapped >= 0) & (mapped < E)
        expert = mapped.to(tl.int32)
    return tl.where(here, expert, -1)


@triton.jit
def _route(e, ids, local, block_expert, block_slot, num_blocks, arrived, S, NT, block, expert_map,
           E: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
           EXPERTS: tl.constexpr, EXPERT_MAP: tl.constexpr):  # fmt: skip
    """Expert e's part of the routing: every program counts all slots, and writes the blocks of its own expert.

    Programs write to different places and read nothing that another writes.
    """
    counts = tl.zeros((BINS,), tl.int32)
    for first in range(0, S, CHUNK):
        s = first + tl.arange(0, CHUNK)
        expert = _expert_of(ids, s, S, E, EXPERTS, EXPERT_MAP, expert_map)
        here = expert >= 0
        counts += tl.histogram(tl.where(here, expert, 0), BINS, mask=here)
        tl.store(local + s, expert, mask=(s < S) & (first // CHUNK % tl.maximum(E, 1) == e))
    blocks = tl.cdiv(counts, block)
    own = tl.arange(0, BINS) == e
    end = tl.sum(tl.where(own, tl.cumsum(blocks, 0), 0))
    begin = end - tl.sum(tl.where(own, blocks, 0))
    count = tl.sum(tl.where(own, counts, 0))
    tl.store(num_blocks, tl.sum(blocks), mask=e == 0)
    for first in range(e * CHUNK, NT, tl.maximum(E, 1) * CHUNK):
        at = first + tl.arange(0, CHUNK)
        tl.store(arrived + at, tl.zeros((CHUNK,), tl.int32), mask=at < NT)
    for first in range(begin, end, CHUNK):
        b = first + tl.arange(0, CHUNK)
        tl.store(block_expert + b, tl.zeros((CHUNK,), tl.int32) + e, mask=b < end)
    place = begin * block
    if count > 0:
        for first in range(0, S, CHUNK):
            s = first + tl.arange(0, CHUNK)
            hit = (_expert_of(ids, s, S, E, EXPERTS, EXPERT_MAP, expert_map) == e).to(tl.int32)
            tl.store(block_slot + place + tl.cumsum(hit, 0) - hit, s, mask=hit > 0)
            place += tl.sum(hit)
    for first in range(place, end * block, CHUNK):
        rest = first + tl.arange(0, CHUNK)
        tl.store(block_slot + rest, tl.zeros((CHUNK,), tl.int32) - 1, mask=rest < end * block)


@triton.jit
def _coordinates(program, x, basis, basis_scale, z, T, H, R,
                 BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
                 ASM: tl.constexpr):  # fmt: skip
    """BN coordinates of BT tokens: z [T, R] float32 = (basis [R, H] * basis_scale [R]) x."""
    n = program % tl.cdiv(R, BN) * BN + tl.arange(0, BN)
    t = program // tl.cdiv(R, BN) * BT + tl.arange(0, BT)
    kk = tl.arange(0, BK)
    acc = tl.zeros((BN, BT), tl.float32)
    pb = basis + n[:, None].to(tl.int64) * H + kk[None, :]
    px = x + t[None, :].to(tl.int64) * H + kk[:, None]
    for first in tl.range(0, H, BK, num_stages=STAGES):
        inside = kk < H - first
        b = tl.load(pb, mask=(n[:, None] < R) & inside[None, :], other=0)
        right = tl.load(px, mask=(t[None, :] < T) & inside[:, None], other=0.0)
        acc = product(b.to(tl.float32).to(right.dtype), right, acc, ASM)
        pb += BK
        px += BK
    acc *= tl.load(basis_scale + n, mask=n < R, other=0.0)[:, None]
    tl.store(z + t[None, :].to(tl.int64) * R + n[:, None], acc, mask=(n[:, None] < R) & (t[None, :] < T))


# What changes with the number of tokens, or is the caller's, makes no variants: nothing is compiled while serving.
@triton.jit(do_not_specialize=["S", "NT", "block", "T"], do_not_specialize_on_alignment=["ids", "expert_map"])
def begin_kernel(ids, local, block_expert, block_slot, num_blocks, arrived, S, NT, block, expert_map,
                 x, basis, basis_scale, z, T, H, R,
                 E: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
                 EXPERTS: tl.constexpr, EXPERT_MAP: tl.constexpr, BASIS: tl.constexpr,
                 BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
                 ASM: tl.constexpr):  # fmt: skip
    """Slots in blocks of one expert each, and tokens' coordinates in the shared basis: neither needs the other.

    Blocks are in the order of experts, and slots in ascending order within an expert. One program for each expert, at
    least one, and before them those of the basis.

    ids: int32 or int64 [S], of EXPERTS global experts; all others are skipped. local: int32 [S], written: expert here
    or -1. expert_map: int32 [EXPERTS], local index or -1. block: slots of a block. BINS: a power of two, at least E and
    32. arrived: int32 [NT], cleared. z: float32 [T, R]. basis: [R, H], int8 or x's dtype.
    """
    program = tl.program_id(0)
    if BASIS:
        coordinates = tl.cdiv(R, BN) * tl.cdiv(T, BT)
        if program < coordinates:
            _coordinates(program, x, basis, basis_scale, z, T, H, R, BN, BT, BK, STAGES, ASM)
        else:
            _route(program - coordinates, ids, local, block_expert, block_slot, num_blocks, arrived, S, NT, block,
                   expert_map, E, BINS, CHUNK, EXPERTS, EXPERT_MAP)  # fmt: skip
    else:
        _route(program, ids, local, block_expert, block_slot, num_blocks, arrived, S, NT, block, expert_map,
               E, BINS, CHUNK, EXPERTS, EXPERT_MAP)  # fmt: skip


@triton.jit
def scale_kernel(source, local, index, factor, offset, tiles, act, corr, rank, lowrank, lowrank_start, out,
                 STRIDE, WIDTH, KMAX, NCORR, H,
                 ROWS_PER: tl.constexpr, PER: tl.constexpr, CHUNK: tl.constexpr, FP16: tl.constexpr,
                 LOWRANK: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """act[row, k] = source[token, index[k]] * factor[k], and the partial corrections of CHUNK components.

    source: [S / ROWS_PER, STRIDE], any float type. lowrank: [ranks, WIDTH].
    out: [S / ROWS_PER, H], the layer's: rows of tokens none of whose experts is here are cleared, as nobody else writes
    them. Nothing is with H = 0.
    Program (slot, chunk, which of the PER matrices of an expert).
    """
    slot, chunk, which = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    expert = tl.load(local + slot)
    if expert < 0:
        token = slot // ROWS_PER
        elsewhere = 1
        for j in tl.static_range(ROWS_PER):
            elsewhere = elsewhere & (tl.load(local + token * ROWS_PER + j) < 0).to(tl.int32)
        if elsewhere > 0:
            for i in range((chunk * PER + which) * CHUNK, H, tl.num_programs(1) * PER * CHUNK):
                n = i + tl.arange(0, CHUNK)
                tl.store(out + token * H + n, tl.zeros((CHUNK,), tl.float32), mask=n < H)
        return
    matrix = expert.to(tl.int64) * PER + which
    k = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = k < tl.sum(tl.load(tiles + matrix * 5 + tl.arange(0, 8), mask=tl.arange(0, 8) < 5, other=0)) * 64
    at = matrix * KMAX + k
    where = tl.load(index + at, mask=inside, other=0)
    f = tl.load(factor + at, mask=inside, other=0.0)
    own = inside & (where >= 0)
    v = tl.load(source + (slot // ROWS_PER) * STRIDE + where, mask=own & (f != 0), other=0.0).to(tl.float32) * f
    a = rounded(v, FP16, ASM)
    row = slot * PER + which
    tl.store(act + row * KMAX + k, a, mask=own)
    c = tl.sum(a.to(tl.float32) * tl.load(offset + at, mask=own, other=0.0), 0)
    tl.store(corr + row * NCORR + chunk, c)
    if LOWRANK:
        # The compensator's components: its inner products with the source; the rest of their tile is 0.
        r = tl.load(rank + matrix)
        first = tl.load(lowrank_start + matrix)
        begin = tl.sum(tl.load(tiles + matrix * 5 + tl.arange(0, 4))) * 64
        for j in range(chunk, tl.cdiv(r, 64) * 64, tl.num_programs(1)):
            total = 0.0
            if j < r:
                for i in range(0, WIDTH, CHUNK):
                    kk = i + tl.arange(0, CHUNK)
                    x = tl.load(source + (slot // ROWS_PER) * STRIDE + kk, mask=kk < WIDTH, other=0.0).to(tl.float32)
                    w = tl.load(lowrank + (first + j).to(tl.int64) * WIDTH + kk, mask=kk < WIDTH, other=0.0)
                    total += tl.sum(x * w.to(tl.float32), 0)
            tl.store(act + row * KMAX + begin + j, rounded(total, FP16, ASM))
