"""Everything around the GEMM: who goes where, the shared basis, scaled activations.

T tokens      S slots, T * top_k      E experts held here
"""

import triton
import triton.language as tl

from bitsmoe_kernels._triton.codes import place_in_lanes, product, rounded


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
def _record(e, matrix, start, tiles, columns, E: tl.constexpr):
    """What the GEMMs need to know of a matrix of expert e, see `gemm.matrix_of`."""
    i = tl.arange(0, 16)
    there = tl.full((16,), E > 0, tl.int1)
    record = tl.load(start + matrix * 6 + i, mask=there & (i < 6), other=0)
    record += tl.load(tiles + matrix * 5 + i - 6, mask=there & (i >= 6) & (i < 11), other=0)
    record += tl.load(columns + matrix + i - 11, mask=there & (i == 11), other=0)
    return tl.where(i == 12, e, record)


@triton.jit
def _route(e, ids, local, block_expert, block_slot, num_blocks, block_matrix, S, MOST, block, expert_map,
           start, tiles, columns, down_start, down_tiles, down_columns, RECORDS: tl.constexpr,
           E: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
           EXPERTS: tl.constexpr, EXPERT_MAP: tl.constexpr):  # fmt: skip
    """Expert e's part of the routing: every program counts all slots, and writes the blocks of its own expert.

    Programs write to different places and read nothing that another writes.
    """
    if RECORDS > 0:
        # Asked for before anything else is known.
        matrix = _record(e, e * (RECORDS - 1), start, tiles, columns, E)
        other = _record(e, e * (RECORDS - 1) + RECORDS - 2, start, tiles, columns, E)
        of_down = _record(e, e, down_start, down_tiles, down_columns, E)
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
    every = tl.sum(blocks)
    tl.store(num_blocks, every, mask=e == 0)
    i = tl.arange(0, 16)
    # Blocks that are not in use are read too, and say so.
    for unused in range(every + e, MOST, tl.maximum(E, 1)):
        tl.store(block_expert + unused, -1)
        for first in range(0, block, CHUNK):
            at = first + tl.arange(0, CHUNK)
            tl.store(block_slot + unused * block + at, tl.zeros((CHUNK,), tl.int32) - 1, mask=at < block)
        for r in tl.static_range(RECORDS):
            tl.store(block_matrix + (unused * RECORDS + r) * 16 + i, tl.where(i == 12, -1, 0).to(tl.int64))
    for first in range(begin, end, CHUNK):
        own_blocks = first + tl.arange(0, CHUNK)
        tl.store(block_expert + own_blocks, tl.zeros((CHUNK,), tl.int32) + e, mask=own_blocks < end)
    if RECORDS > 0:
        for b in range(begin, end):
            record = block_matrix + b * (RECORDS * 16) + i
            tl.store(record, matrix)
            if RECORDS == 3:
                tl.store(record + 16, other)
            tl.store(record + (RECORDS - 1) * 16, of_down)
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
def _tokens(first, ids, arrived, out, S, T, TILES, H, expert_map,
            E: tl.constexpr, EXPERTS: tl.constexpr, EXPERT_MAP: tl.constexpr, TOP_K: tl.constexpr,
            TOKENS: tl.constexpr):  # fmt: skip
    """What is known of TOKENS tokens from `first` on: slots that nobody here computes, and rows that nobody writes."""
    t = first + tl.arange(0, TOKENS)
    missing = tl.zeros((TOKENS,), tl.int32)
    for j in range(TOP_K):
        missing += (_expert_of(ids, t * TOP_K + j, S, E, EXPERTS, EXPERT_MAP, expert_map) < 0).to(tl.int32)
    AT_ONCE: tl.constexpr = 32
    for n in range(0, TILES, AT_ONCE):
        at = n + tl.arange(0, AT_ONCE)
        tl.store(arrived + t[:, None] * TILES + at[None, :], missing[:, None] + tl.zeros_like(at)[None, :],
                 mask=(t[:, None] < T) & (at[None, :] < TILES))  # fmt: skip
    empty = (missing == TOP_K) & (t < T)
    if tl.max(empty.to(tl.int32), 0) > 0:
        for n in range(0, H, AT_ONCE):
            at = n + tl.arange(0, AT_ONCE)
            tl.store(out + t[:, None].to(tl.int64) * H + at[None, :], tl.zeros((TOKENS, AT_ONCE), tl.float32),
                     mask=empty[:, None] & (at[None, :] < H))  # fmt: skip


@triton.jit
def _coordinates(program, x, basis, basis_scale, z, T, H, R,
                 BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
                 EVEN: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """BN coordinates of BT tokens: a part of z [T, R, PARTS] float32, of the sum (basis [R, H] * basis_scale [R]) x.

    EVEN: whether BK divides H. Beyond the last row or token the last one is read again.
    """
    part = program % PARTS
    n = program // PARTS % tl.cdiv(R, BN) * BN + tl.arange(0, BN)
    t = program // PARTS // tl.cdiv(R, BN) * BT + tl.arange(0, BT)
    each = tl.cdiv(tl.cdiv(H, BK), PARTS) * BK
    begin = part * each
    kk = tl.arange(0, BK)
    acc = tl.zeros((BN, BT), tl.float32)
    pb = basis + tl.minimum(n, R - 1)[:, None].to(tl.int64) * H + (begin + kk)[None, :]
    px = x + tl.minimum(t, T - 1)[None, :].to(tl.int64) * H + (begin + kk)[:, None]
    scale = tl.load(basis_scale + n, mask=n < R, other=0.0)
    for first in tl.range(begin, tl.minimum(begin + each, H), BK, num_stages=STAGES):
        if EVEN:
            b, right = tl.load(pb), tl.load(px)
        else:
            inside = kk < H - first
            b, right = tl.load(pb, mask=inside[None, :], other=0), tl.load(px, mask=inside[:, None], other=0.0)
        acc = product(b.to(tl.float32).to(right.dtype), right, acc, ASM)
        pb += BK
        px += BK
    pz = z + (t[None, :].to(tl.int64) * R + n[:, None]) * PARTS + part
    tl.store(pz, acc * scale[:, None], mask=(n[:, None] < R) & (t[None, :] < T))


# What changes with the number of tokens, or is the caller's, makes no variants: nothing is compiled while serving.
@triton.jit(
    do_not_specialize=["S", "T", "TILES", "MOST", "block"], do_not_specialize_on_alignment=["ids", "expert_map"]
)
def begin_kernel(ids, local, block_expert, block_slot, num_blocks, block_matrix, arrived, out,
                 S, T, TILES, MOST, block, expert_map, start, tiles, columns, down_start, down_tiles, down_columns,
                 x, basis, basis_scale, z, H, R, RECORDS: tl.constexpr,
                 E: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, TOP_K: tl.constexpr,
                 TOKENS: tl.constexpr, EXPERTS: tl.constexpr, EXPERT_MAP: tl.constexpr,
                 BASIS: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
                 STAGES: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Slots in blocks of one expert each, and tokens' coordinates in the shared basis: neither needs the other.

    Blocks are in the order of experts, and slots in ascending order within an expert. Programs: one for each expert, at
    least one; one for each TOKENS tokens; those of the basis.

    ids: int32 or int64 [S], of EXPERTS global experts; all others are skipped. local: int32 [S], written: expert here
    or -1. expert_map: int32 [EXPERTS], local index or -1. block: slots of a block. BINS: a power of two, at least E and
    32. block_expert: int32 [MOST], -1 behind the last block. block_matrix: int64 [MOST, RECORDS, 16] of the one or two
    matrices of gate and up, and of down, see `gemm.matrix_of`; RECORDS 0: nobody asks. arrived: int32 [T, TILES],
    written: of each token's slots those that nobody here computes. out: [T, H], the layer's: rows of tokens that have
    no other slots are cleared, as nobody else writes them. z: float32 [T, R, PARTS], to be summed. basis: [R, H], int8
    or x's dtype.
    """
    program = tl.program_id(0)
    EXPERT_PROGRAMS: tl.constexpr = E if E > 0 else 1
    if program < EXPERT_PROGRAMS:
        _route(program, ids, local, block_expert, block_slot, num_blocks, block_matrix, S, MOST, block, expert_map,
               start, tiles, columns, down_start, down_tiles, down_columns, RECORDS, E, BINS, CHUNK,
               EXPERTS, EXPERT_MAP)  # fmt: skip
    else:
        program -= EXPERT_PROGRAMS
        token_programs = tl.cdiv(T, TOKENS)
        if program < token_programs:
            _tokens(program * TOKENS, ids, arrived, out, S, T, TILES, H, expert_map, E, EXPERTS, EXPERT_MAP, TOP_K,
                    TOKENS)  # fmt: skip
        elif BASIS:
            _coordinates(program - token_programs, x, basis, basis_scale, z, T, H, R, BN, BT, BK, PARTS, STAGES,
                         EVEN, ASM)  # fmt: skip


@triton.jit
def _sum_of_parts(source, PARTS: tl.constexpr, ASM: tl.constexpr):
    """The sums of PARTS neighbours each, in their order. source: pointers to the first ones; float32 if there are 4."""
    if ASM and PARTS == 4:
        # One read: the compiler does not see that they are neighbours.
        first, second, third, last = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l", [source.to(tl.int64)],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip
        return first + second + third + last
    else:
        v = tl.load(source).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            v += tl.load(source + part).to(tl.float32)
        return v


@triton.jit
def _components(first, CHUNK: tl.constexpr, LANES: tl.constexpr):
    """CHUNK components from `first` on, a multiple of 64, and their places, see `codes.place_in_lanes`.

    Of lanes: [4 lanes, 8 pairs, tiles, 2]. So the compiler sees that both of a pair are neighbours here and there.
    """
    if LANES == 0:
        k = first + tl.arange(0, CHUNK)
        return k, k
    else:
        TILES: tl.constexpr = CHUNK // 64
        tile = first + tl.arange(0, TILES)[None, None, :, None] * 64
        a = tl.arange(0, 8)[None, :, None, None]
        lane = tl.arange(0, 4)[:, None, None, None]
        c = tl.arange(0, 2)[None, None, None, :]
        place = tile + lane * 16 + a * 2 + c
        if LANES == 2:
            return tile + a * 8 + lane * 2 + c, place
        else:
            return tile + a // 2 * 16 + lane * 4 + a % 2 * 2 + c, place


@triton.jit(do_not_specialize=["block"])
def scale_kernel(source, block_expert, block_slot, index, factor, offset, tiles, act, corr,
                 rank, lowrank, lowrank_start,
                 block, STRIDE, WIDTH, KMAX, NCORR,
                 ROWS_PER: tl.constexpr, PER: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr,
                 PARTS: tl.constexpr, LANES: tl.constexpr, FP16: tl.constexpr, LOWRANK: tl.constexpr,
                 ASM: tl.constexpr):  # fmt: skip
    """act[row, k] = source[token, index[k]] * factor[k], and the partial corrections of CHUNK components.

    source: [S / ROWS_PER, STRIDE, PARTS], any float type: the sum of the parts. lowrank: [ranks, WIDTH], with one part.
    LANES: order of act's components, see `codes.place_in_lanes`.
    block: slots of a block. Program (at most SLOTS slots of a block, chunk, which of the PER matrices of an expert).
    """
    each = tl.cdiv(block, SLOTS)
    b, chunk, which = tl.program_id(0) // each, tl.program_id(1), tl.program_id(2)
    expert = tl.load(block_expert + b)
    if expert < 0:
        return
    matrix = expert.to(tl.int64) * PER + which
    k, place = _components(chunk * CHUNK, CHUNK, LANES)
    at = matrix * KMAX + k
    where = tl.load(index + at, mask=k < KMAX, other=-1)
    f = tl.load(factor + at, mask=k < KMAX, other=0.0)
    o = tl.load(offset + at, mask=k < KMAX, other=0.0)
    # A compensator's components are written below.
    own = (where >= 0) if LOWRANK else (k < KMAX)
    where = tl.maximum(where, 0) * PARTS
    first = tl.program_id(0) % each * SLOTS
    s = first + tl.arange(0, SLOTS)
    pslot = block_slot + b * block + first
    # Slots of a block come first, and -1 behind them.
    count = tl.sum((tl.load(block_slot + b * block + s, mask=s < block, other=-1) >= 0).to(tl.int32), 0)
    after = tl.load(pslot)
    for i in range(count):
        slot = after.to(tl.int64)
        after = tl.load(pslot + tl.minimum(i + 1, count - 1))
        psource = source + slot // ROWS_PER * STRIDE * PARTS
        v = _sum_of_parts(psource + where, PARTS, ASM)
        # Padding stays 0 whatever is read.
        a = rounded(tl.where(f == 0, 0.0, v * f), FP16, ASM)
        row = slot * PER + which
        tl.store(act + row * KMAX + place, a, mask=own)
        tl.store(corr + row * NCORR + chunk, tl.sum(a.to(tl.float32) * o))
        if LOWRANK:
            # The compensator's components: its inner products with the source; the rest of their tile is 0.
            r = tl.load(rank + matrix)
            ranks = tl.load(lowrank_start + matrix)
            begin = tl.sum(tl.load(tiles + matrix * 5 + tl.arange(0, 4))) * 64
            for j in range(chunk, tl.cdiv(r, 64) * 64, tl.num_programs(1)):
                total = 0.0
                if j < r:
                    for n in range(0, WIDTH, CHUNK):
                        kk = n + tl.arange(0, CHUNK)
                        px = source + slot // ROWS_PER * STRIDE + kk
                        x = tl.load(px, mask=kk < WIDTH, other=0.0).to(tl.float32)
                        w = tl.load(lowrank + (ranks + j).to(tl.int64) * WIDTH + kk, mask=kk < WIDTH, other=0.0)
                        total += tl.sum(x * w.to(tl.float32), 0)
                tl.store(act + row * KMAX + begin + place_in_lanes(j, LANES), rounded(total, FP16, ASM))
