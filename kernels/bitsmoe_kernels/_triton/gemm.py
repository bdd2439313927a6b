"""The mixed-bit grouped GEMM: weights are the left operand, a block of tokens of one expert the right one.

    name          shape                dtype        meaning
    act           [rows, KMAX]         fp16/bf16    scaled activations of each row, see `layout/matrices.py`
    corr          [rows, NCORR]        fp32         partial sums of act * offset
    codes32, codes16, dense, scale, bias: `layout/matrices.py`
    block_matrix  [blocks, RECORDS, 16]  int64      of each block's matrices, see `matrix_of`
    block_slot    [blocks, BT]         int32        slots (token * top_k + choice) of each block; -1: none

A row of `act` is a slot, or two of them side by side (SPLIT). One program makes BN outputs of one block.
"""

import triton
import triton.language as tl

from bitsmoe_kernels._triton.codes import narrow_words, numbers, places_in_lanes, product, rounded

NO_GATE = tl.constexpr(4)
"""The activation of experts that have no gate, see `gated`."""


@triton.jit
def _tile(acc, pwide, pnarrow, pact, live, live_narrow, BITS: tl.constexpr, BN: tl.constexpr, KWIDTH: tl.constexpr,
          FP16: tl.constexpr, ASM: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """One tile of 64 components. Pointers: pwide [BN, 4 words of a lane], pnarrow [BN / 2, 4], pact [64, BT]."""
    if BITS == 1 or BITS == 3:
        narrow = tl.load(pnarrow) if EVEN else tl.load(pnarrow, mask=live_narrow, other=0)
        narrow = narrow_words(narrow, BN, ASM)
    if BITS > 1:
        wide = tl.load(pwide) if EVEN else tl.load(pwide, mask=live, other=0)
    if BITS == 1:
        first, second = narrow, narrow
    elif BITS == 2:
        first, second = wide, wide
    elif BITS == 3:
        first, second = wide, narrow
    else:
        # Both words of a lane lie side by side: one load, parted without moving between threads.
        first, second = tl.split(tl.reshape(wide, (BN, 4, 2)))
    return product(numbers(first, second, BITS, BN, KWIDTH, FP16, ASM), tl.load(pact), acc, ASM)


@triton.jit
def _segment(acc, codes32, codes16, wide, narrow, count, act, n0, rows,
             BITS: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, KWIDTH: tl.constexpr, FP16: tl.constexpr,
             ASM: tl.constexpr, EVEN: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """All tiles of one class.

    wide, narrow: where its words begin. act [1, BT]: pointers to the class's first component of each row. n0: first
    output. rows: stored ones, a multiple of 16.
    """
    WORDS: tl.constexpr = 8 if BITS == 4 else 4
    n, half = n0 + tl.arange(0, BN)[:, None], n0 // 2 + tl.arange(0, BN // 2)[:, None]
    lane, lane4 = tl.arange(0, WORDS)[None, :], tl.arange(0, 4)[None, :]
    pwide, pnarrow = codes32 + wide + n * WORDS + lane, codes16 + narrow + half * 4 + lane4
    live, live_narrow = (n < rows) & (lane >= 0), (half < rows // 2) & (lane4 >= 0)
    pact = act + tl.arange(0, 64)[:, None]
    for _ in tl.range(count // UNROLL, num_stages=STAGES):
        for u in tl.static_range(UNROLL):
            acc = _tile(acc, pwide + u * rows * WORDS, pnarrow + u * rows * 2, pact + u * 64, live, live_narrow,
                        BITS, BN, KWIDTH, FP16, ASM, EVEN)  # fmt: skip
        pwide += UNROLL * rows * WORDS
        pnarrow += UNROLL * rows * 2
        pact += UNROLL * 64
    if UNROLL > 1:
        for _ in tl.range(count % UNROLL, num_stages=STAGES):
            acc = _tile(acc, pwide, pnarrow, pact, live, live_narrow, BITS, BN, KWIDTH, FP16, ASM, EVEN)
            pwide += rows * WORDS
            pnarrow += rows * 2
            pact += 64
    return acc


@triton.jit
def matrix_of(block_matrix, record):
    """What is known of a block's matrix, in one read: its expert, its outputs, and what lies where.

    A record: `start` and `tiles` of `layout/matrices.py`, `columns`, and the expert, -1 if the block is not in use.
    """
    p = block_matrix + record * 16
    # Without the hints words would be loaded one by one.
    narrow, wide = tl.multiple_of(tl.load(p), 16), tl.multiple_of(tl.load(p + 1), 16)
    count1, count2 = tl.load(p + 6).to(tl.int32), tl.load(p + 7).to(tl.int32)
    count3, count4 = tl.load(p + 8).to(tl.int32), tl.load(p + 9).to(tl.int32)
    plain, plain_count = tl.multiple_of(tl.load(p + 5), 16), tl.load(p + 10).to(tl.int32)
    N = tl.multiple_of(tl.load(p + 11).to(tl.int32), 16)
    return tl.load(p + 12), N, (narrow, wide, count1, count2, count3, count4, plain, plain_count)


@triton.jit
def starts_of(m, rows):
    """Where a matrix's words of 1, 2, 3 and 4 bits begin, wide and narrow: those of all widths lie one behind another.

    1-bit codes have narrow words alone, 2-bit and 4-bit ones wide words alone. What stands in their place is not read.
    """
    narrow, wide, count1, count2, count3, _, _, _ = m
    step = rows.to(tl.int64)
    wide3 = tl.multiple_of(wide + count2 * step * 4, 16)
    wide4 = tl.multiple_of(wide3 + count3 * step * 4, 16)
    narrow3 = tl.multiple_of(narrow + count1 * step * 2, 16)
    return (wide, wide, wide3, wide4), (narrow, narrow, narrow3, narrow)


@triton.jit
def _contract(act, codes32, codes16, dense, m, n0, rows,
              BN: tl.constexpr, BT: tl.constexpr, KWIDTH: tl.constexpr, FP16: tl.constexpr, ASM: tl.constexpr,
              EVEN: tl.constexpr, DENSE: tl.constexpr, WIDTHS: tl.constexpr,
              UNROLL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """sum over coded components of act v, and over dense ones of act w: two [BN, BT].

    WIDTHS: one bit for each class that occurs, 1 for 1-bit codes to 8 for 4-bit ones.
    """
    coded = tl.zeros((BN, BT), tl.float32)
    plain = tl.zeros((BN, BT), tl.float32)
    wide, narrow = starts_of(m, rows)
    for c in tl.static_range(4):
        if WIDTHS & (1 << c):
            coded = _segment(coded, codes32, codes16, wide[c], narrow[c], m[2 + c], act, n0, rows,
                             c + 1, BN, BT, KWIDTH, FP16, ASM, EVEN, UNROLL, STAGES)  # fmt: skip
            act += m[2 + c] * 64
    if DENSE:
        kk, n = tl.arange(0, 64), n0 + tl.arange(0, BN)
        pweight = dense + m[6] + n[:, None] * 64 + kk[None, :]
        pact = act + kk[:, None]
        for _ in tl.range(m[7], num_stages=STAGES):
            plain = product(tl.load(pweight, mask=n[:, None] < rows, other=0.0), tl.load(pact), plain, ASM)
            pweight += rows * 64
            pact += 64
    return coded, plain


@triton.jit
def _outputs(act, corr, codes32, codes16, dense, scale, bias, m, row, KMAX, NMAX, matrix, n0, N, rows,
             NCORR: tl.constexpr, NCORR_POW2: tl.constexpr, CORR_CHUNK: tl.constexpr,
             BN: tl.constexpr, BT: tl.constexpr, KWIDTH: tl.constexpr, FP16: tl.constexpr, ASM: tl.constexpr,
             EVEN: tl.constexpr, DENSE: tl.constexpr, BIAS: tl.constexpr, WIDTHS: tl.constexpr,
             UNROLL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """BN outputs of one matrix from the first n0 on, for the activations `row` [BT]: float32 [BN, BT].

    m: see `matrix_of`. NMAX: a matrix's share of `scale` and of `bias`. N: its outputs; EVEN: whether BN divides it.
    rows: stored ones, a multiple of 16.
    """
    width = tl.cdiv((m[2] + m[3] + m[4] + m[5]) * 64, CORR_CHUNK)
    coded, plain = _contract(act + row[None, :] * KMAX, codes32, codes16, dense, m, n0, rows,
                             BN, BT, KWIDTH, FP16, ASM, EVEN, DENSE, WIDTHS, UNROLL, STAGES)  # fmt: skip
    at = tl.arange(0, NCORR_POW2)
    parts = tl.load(corr + row[:, None] * NCORR + at[None, :], mask=at[None, :] < width, other=0.0)
    n = n0 + tl.arange(0, BN)
    y = (coded - tl.sum(parts, 1)[None, :]) * of_outputs(scale, matrix * NMAX, n, N, EVEN)[:, None] + plain
    if BIAS:
        y += of_outputs(bias, matrix * NMAX, n, N, EVEN)[:, None]
    return y


# What follows up to the kernels has no layouts of its own: `direct.py` calls it too.
@triton.jit
def of_outputs(table, first, n, N, EVEN: tl.constexpr):
    """Scale or bias of outputs n [BN] of a matrix, whose share of the table begins at `first`."""
    return tl.load(table + first + n) if EVEN else tl.load(table + first + n, mask=n < N, other=0.0)


@triton.jit
def gated(gate, up, ACT: tl.constexpr):
    """act(gate, up), the activation by its number in `expert_mlp.ACTIVATION_NUMBERS`."""
    if ACT == 1:  # gelu by tanh, in terms of the sigmoid
        return gate * tl.sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)) * up
    elif ACT == 2:  # swigluoai; comparisons that let NaN through
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        return gate * tl.sigmoid(1.702 * gate) * (up + 1.0)
    elif ACT == 3:  # silu of clamped numbers
        gate = tl.where(gate > 10.0, 10.0, gate)
        up = tl.where(up > 10.0, 10.0, tl.where(up < -10.0, -10.0, up))
        return gate * tl.sigmoid(gate) * up
    elif ACT == NO_GATE:  # relu2 of up alone; a comparison that lets NaN through
        up = tl.where(up < 0.0, 0.0, up)
        return up * up
    else:
        return gate * tl.sigmoid(gate) * up


@triton.jit
def store_hidden(h, at, row, valid, factor, offset, out, out_corr, OUT_STRIDE,
                 OUT_NCORR: tl.constexpr, FUSED: tl.constexpr, LANES: tl.constexpr, FP16: tl.constexpr,
                 ASM: tl.constexpr):  # fmt: skip
    """What `gate_up_kernel` writes of h [HALF, BT]: components at [HALF] of down, for rows [BT].

    factor, offset: of these components. LANES: see `codes.place_in_lanes`.
    """
    pout = out + row[None, :] * OUT_STRIDE
    if FUSED:
        pout += places_in_lanes(at, LANES)[:, None]
        # Padding stays 0 whatever comes out of it.
        a = rounded(tl.where(factor[:, None] == 0, 0.0, h * factor[:, None]), FP16, ASM)
        tl.store(pout, a, mask=valid[None, :])
        c = tl.sum(a.to(tl.float32) * offset[:, None], 0)
        tl.store(out_corr + row * OUT_NCORR + tl.program_id(0), c, mask=valid)
    else:
        tl.store(pout + at[:, None], h, mask=valid[None, :])


@triton.jit
def gate_up_kernel(act, corr, codes32, codes16, dense, scale, bias, block_matrix, block_slot,
                   down_factor, down_offset, out, out_corr,
                   KMAX, NMAX, KDOWN, OUT_STRIDE,
                   NCORR: tl.constexpr, NCORR_POW2: tl.constexpr, CORR_CHUNK: tl.constexpr, OUT_NCORR: tl.constexpr,
                   BN: tl.constexpr, BT: tl.constexpr, SPLIT: tl.constexpr, FUSED: tl.constexpr, DENSE: tl.constexpr,
                   ACT: tl.constexpr, BIAS: tl.constexpr,
                   WIDTHS: tl.constexpr, KWIDTH: tl.constexpr, FP16: tl.constexpr, ASM: tl.constexpr,
                   UNROLL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """h = act(gate, up), or act(up), of BN / 2 components of down.

    FUSED: writes down's scaled activations `out` [slots, OUT_STRIDE] and their partial corrections `out_corr` [slots,
    OUT_NCORR], one for each program of a row; else h itself, float32 [slots, OUT_STRIDE].
    """
    block = tl.program_id(1)
    RECORDS: tl.constexpr = 3 if SPLIT else 2
    expert, N, m = matrix_of(block_matrix, block * RECORDS)
    slot = tl.load(block_slot + block * BT + tl.arange(0, BT))
    if expert < 0:
        return
    valid = slot >= 0
    row = tl.where(valid, slot, 0).to(tl.int64)
    HALF: tl.constexpr = BN // 2
    at = tl.program_id(0) * HALF + tl.arange(0, HALF)
    n0 = tl.program_id(0) * (HALF if SPLIT or ACT == NO_GATE else BN)
    matrix = expert * (2 if SPLIT else 1)
    if n0 >= N:
        return
    if SPLIT:
        gate = _outputs(act, corr, codes32, codes16, dense, scale, bias, m, row * 2, KMAX, NMAX, matrix,
                        n0, N, N, NCORR, NCORR_POW2, CORR_CHUNK, HALF, BT, KWIDTH, FP16, ASM, True, DENSE, BIAS,
                        WIDTHS, UNROLL, STAGES)  # fmt: skip
        _, _, m = matrix_of(block_matrix, block * RECORDS + 1)
        up = _outputs(act, corr, codes32, codes16, dense, scale, bias, m, row * 2 + 1, KMAX, NMAX, matrix + 1, n0,
                      N, N, NCORR, NCORR_POW2, CORR_CHUNK, HALF, BT, KWIDTH, FP16, ASM, True, DENSE,
                      BIAS, WIDTHS, UNROLL, STAGES)  # fmt: skip
    elif ACT == NO_GATE:
        up = _outputs(act, corr, codes32, codes16, dense, scale, bias, m, row, KMAX, NMAX, matrix,
                      n0, N, N, NCORR, NCORR_POW2, CORR_CHUNK, HALF, BT, KWIDTH, FP16, ASM, True, DENSE, BIAS,
                      WIDTHS, UNROLL, STAGES)  # fmt: skip
        gate = up
    else:
        y = _outputs(act, corr, codes32, codes16, dense, scale, bias, m, row, KMAX, NMAX, matrix,
                     n0, N, N, NCORR, NCORR_POW2, CORR_CHUNK, BN, BT, KWIDTH, FP16, ASM, True, DENSE, BIAS,
                     WIDTHS, UNROLL, STAGES)  # fmt: skip
        gate, up = tl.split(tl.permute(tl.reshape(y, (HALF, 2, BT)), (0, 2, 1)))
    component = expert * KDOWN + at
    factor, offset = (tl.load(down_factor + component), tl.load(down_offset + component)) if FUSED else (0.0, 0.0)
    store_hidden(gated(gate, up, ACT), at, row, valid, factor, offset, out, out_corr, OUT_STRIDE, OUT_NCORR, FUSED,
                 0, FP16, ASM)  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["weight"])
def down_kernel(act, corr, codes32, codes16, dense, scale, bias, block_matrix, block_slot,
                weight, local, partial, arrived, out,
                KMAX, H,
                NCORR: tl.constexpr, NCORR_POW2: tl.constexpr, CORR_CHUNK: tl.constexpr, TOP_K: tl.constexpr,
                BN: tl.constexpr, BT: tl.constexpr, EVEN: tl.constexpr, DENSE: tl.constexpr, BIAS: tl.constexpr,
                RECORDS: tl.constexpr, WIDTHS: tl.constexpr, KWIDTH: tl.constexpr, FP16: tl.constexpr,
                ASM: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Outputs of every slot to `partial` [slots, H] float32, times the routing weight; the last of a token sums them.

    weight: routing weight of each slot, float32. local: expert of each slot here, -1: elsewhere. arrived: int32
    [tokens, grid's first size], before: of a token's slots those that are elsewhere. The sum runs in the order of the
    slots, whoever is last: always the same.
    """
    block = tl.program_id(1)
    expert, _, m = matrix_of(block_matrix, block * RECORDS + RECORDS - 1)
    slot = tl.load(block_slot + block * BT + tl.arange(0, BT))
    if expert < 0:
        return
    valid = slot >= 0
    row = tl.where(valid, slot, 0).to(tl.int64)
    n0 = tl.program_id(0) * BN
    n = n0 + tl.arange(0, BN)
    inside = n < H
    y = _outputs(act, corr, codes32, codes16, dense, scale, bias, m, row, KMAX, H, expert, n0, H,
                 tl.cdiv(H, 16) * 16, NCORR, NCORR_POW2, CORR_CHUNK, BN, BT, KWIDTH, FP16, ASM, EVEN, DENSE,
                 BIAS, WIDTHS, UNROLL, STAGES) * tl.load(weight + row)[None, :]  # fmt: skip
    tl.store(partial + row[None, :] * H + n[:, None], y, mask=inside[:, None] & valid[None, :])
    token = row // TOP_K
    # All threads' stores before the count goes up, and the count before others' stores are read.
    tl.debug_barrier()
    before = tl.atomic_add(arrived + token * tl.num_programs(0) + tl.program_id(0), 1, mask=valid, sem="acq_rel")
    tl.debug_barrier()
    last = valid & (before + 1 == TOP_K)
    y = tl.zeros((BN, BT), tl.float32)
    for j in tl.range(TOP_K, num_stages=1, loop_unroll_factor=1):
        here = last & (tl.load(local + token * TOP_K + j) >= 0)
        y += tl.load(partial + (token * TOP_K + j)[None, :] * H + n[:, None],
                     mask=inside[:, None] & here[None, :], other=0.0, volatile=True)  # fmt: skip
    pout = out + token[None, :] * H + n[:, None]
    tl.store(pout, rounded(y, FP16, ASM), mask=inside[:, None] & last[None, :])
