"""The mixed-bit grouped GEMM: weights are the left operand, a block of tokens of one expert the right one.

    name          shape                dtype        meaning
    act           [rows, KMAX]         fp16/bf16    scaled activations of each row, see `layout/matrices.py`
    corr          [rows, NCORR]        fp32         partial sums of act * offset
    codes32, codes16, dense, start, tiles, columns, scale: `layout/matrices.py`
    block_expert  [blocks]             int32        expert of each block of rows; -1: the block is not in use
    block_slot    [blocks, BT]         int32        slots (token * top_k + choice) of each block; -1: none
    num_blocks    [1]                  int32        blocks in use

A row of `act` is a slot, or two of them side by side (SPLIT). One program makes BN outputs of one block.
"""

import triton
import triton.language as tl

from bitsmoe_kernels._triton.codes import narrow_words, numbers, product, rounded


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
def _contract(act, codes32, codes16, dense, start, tiles, matrix, n0, rows,
              BN: tl.constexpr, BT: tl.constexpr, KWIDTH: tl.constexpr, FP16: tl.constexpr, ASM: tl.constexpr,
              EVEN: tl.constexpr, DENSE: tl.constexpr, WIDTHS: tl.constexpr,
              UNROLL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """sum over coded components of act v, and over dense ones of act w: two [BN, BT].

    WIDTHS: one bit for each class that occurs, 1 for 1-bit codes to 8 for 4-bit ones.
    """
    coded = tl.zeros((BN, BT), tl.float32)
    plain = tl.zeros((BN, BT), tl.float32)
    starts, counts = start + matrix * 6, tiles + matrix * 5
    for c in tl.static_range(4):
        if WIDTHS & (1 << c):
            # Columns of `start`: 1, 2, 3, 3 extra, 4, dense. Without the hint words would be loaded one by one.
            count = tl.load(counts + c)
            wide = tl.multiple_of(tl.load(starts + (c if c < 3 else 4)), 16)
            narrow = tl.multiple_of(tl.load(starts + (3 if c == 2 else 0)), 16)
            coded = _segment(coded, codes32, codes16, wide, narrow, count, act, n0, rows,
                             c + 1, BN, BT, KWIDTH, FP16, ASM, EVEN, UNROLL, STAGES)  # fmt: skip
            act += count * 64
    if DENSE:
        kk, n = tl.arange(0, 64), n0 + tl.arange(0, BN)
        pweight = dense + tl.multiple_of(tl.load(starts + 5), 16) + n[:, None] * 64 + kk[None, :]
        pact = act + kk[:, None]
        for _ in tl.range(tl.load(counts + 4), num_stages=STAGES):
            plain = product(tl.load(pweight, mask=n[:, None] < rows, other=0.0), tl.load(pact), plain, ASM)
            pweight += rows * 64
            pact += 64
    return coded, plain


@triton.jit
def _outputs(act, corr, codes32, codes16, dense, start, tiles, scale, bias, row, KMAX, NMAX, matrix, n0, N, rows,
             NCORR: tl.constexpr, NCORR_POW2: tl.constexpr, CORR_CHUNK: tl.constexpr,
             BN: tl.constexpr, BT: tl.constexpr, KWIDTH: tl.constexpr, FP16: tl.constexpr, ASM: tl.constexpr,
             EVEN: tl.constexpr, DENSE: tl.constexpr, BIAS: tl.constexpr, WIDTHS: tl.constexpr,
             UNROLL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """BN outputs of one matrix from the first n0 on, for the activations `row` [BT]: float32 [BN, BT].

    NMAX: a matrix's share of `scale` and of `bias`. N: its outputs; EVEN: whether BN divides it. rows:
    stored ones, a multiple of 16.
    """
    width = tl.cdiv(tl.sum(tl.load(tiles + matrix * 5 + tl.arange(0, 4))) * 64, CORR_CHUNK)
    coded, plain = _contract(act + row[None, :] * KMAX, codes32, codes16, dense, start, tiles, matrix, n0, rows,
                             BN, BT, KWIDTH, FP16, ASM, EVEN, DENSE, WIDTHS, UNROLL, STAGES)  # fmt: skip
    at = tl.arange(0, NCORR_POW2)
    parts = tl.load(corr + row[:, None] * NCORR + at[None, :], mask=at[None, :] < width, other=0.0)
    return finished(coded - tl.sum(parts, 1)[None, :], plain, scale, bias, matrix * NMAX, n0 + tl.arange(0, BN), N,
                    EVEN, BIAS)  # fmt: skip


# What follows up to the kernels has no layouts of its own: `direct.py` calls it too.
@triton.jit
def finished(coded, plain, scale, bias, first, n, N, EVEN: tl.constexpr, BIAS: tl.constexpr):
    """Outputs n [BN] of a matrix from its sums [BN, BT]. first: where its share of `scale` and of `bias` begins."""
    t = scale + first + n
    y = coded * (tl.load(t) if EVEN else tl.load(t, mask=n < N, other=0.0))[:, None] + plain
    if BIAS:
        b = bias + first + n
        y += (tl.load(b) if EVEN else tl.load(b, mask=n < N, other=0.0))[:, None]
    return y


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
    else:
        return gate * tl.sigmoid(gate) * up


@triton.jit
def store_hidden(h, at, row, valid, first, down_factor, down_offset, out, out_corr, OUT_STRIDE,
                 OUT_NCORR: tl.constexpr, FUSED: tl.constexpr, FP16: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """What `gate_up_kernel` writes of h [HALF, BT]: components at [HALF] of down, for rows [BT].

    first: where the expert's components begin in down's tables.
    """
    pout = out + row[None, :] * OUT_STRIDE + at[:, None]
    if FUSED:
        factor, offset = tl.load(down_factor + first + at), tl.load(down_offset + first + at)
        # Padding stays 0 whatever comes out of it.
        a = rounded(tl.where(factor[:, None] == 0, 0.0, h * factor[:, None]), FP16, ASM)
        tl.store(pout, a, mask=valid[None, :])
        c = tl.sum(a.to(tl.float32) * offset[:, None], 0)
        tl.store(out_corr + row * OUT_NCORR + tl.program_id(0), c, mask=valid)
    else:
        tl.store(pout, h, mask=valid[None, :])


@triton.jit
def gate_up_kernel(act, corr, codes32, codes16, dense, start, tiles, columns, scale, bias,
                   block_expert, block_slot, num_blocks,
                   down_factor, down_offset, out, out_corr,
                   KMAX, NMAX, KDOWN, OUT_STRIDE,
                   NCORR: tl.constexpr, NCORR_POW2: tl.constexpr, CORR_CHUNK: tl.constexpr, OUT_NCORR: tl.constexpr,
                   BN: tl.constexpr, BT: tl.constexpr, SPLIT: tl.constexpr, FUSED: tl.constexpr, DENSE: tl.constexpr,
                   ACT: tl.constexpr, BIAS: tl.constexpr,
                   WIDTHS: tl.constexpr, KWIDTH: tl.constexpr, FP16: tl.constexpr, ASM: tl.constexpr,
                   UNROLL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """h = act(gate, up) of BN / 2 components of down.

    FUSED: writes down's scaled activations `out` [slots, OUT_STRIDE] and their partial corrections `out_corr` [slots,
    OUT_NCORR], one for each program of a row; else h itself, float32 [slots, OUT_STRIDE].
    """
    block = tl.program_id(1)
    expert = tl.load(block_expert + block)
    if expert < 0:
        return
    slot = tl.load(block_slot + block * BT + tl.arange(0, BT))
    valid = slot >= 0
    row = tl.where(valid, slot, 0).to(tl.int64)
    HALF: tl.constexpr = BN // 2
    at = tl.program_id(0) * HALF + tl.arange(0, HALF)
    n0 = tl.program_id(0) * (HALF if SPLIT else BN)
    matrix = expert.to(tl.int64) * (2 if SPLIT else 1)
    N = tl.multiple_of(tl.load(columns + matrix), 16)
    if n0 >= N:
        return
    if SPLIT:
        gate = _outputs(act, corr, codes32, codes16, dense, start, tiles, scale, bias, row * 2, KMAX, NMAX, matrix,
                        n0, N, N, NCORR, NCORR_POW2, CORR_CHUNK, HALF, BT, KWIDTH, FP16, ASM, True, DENSE, BIAS,
                        WIDTHS, UNROLL, STAGES)  # fmt: skip
        up = _outputs(act, corr, codes32, codes16, dense, start, tiles, scale, bias, row * 2 + 1, KMAX, NMAX,
                      matrix + 1, n0, N, N, NCORR, NCORR_POW2, CORR_CHUNK, HALF, BT, KWIDTH, FP16, ASM, True, DENSE,
                      BIAS, WIDTHS, UNROLL, STAGES)  # fmt: skip
    else:
        y = _outputs(act, corr, codes32, codes16, dense, start, tiles, scale, bias, row, KMAX, NMAX, matrix,
                     n0, N, N, NCORR, NCORR_POW2, CORR_CHUNK, BN, BT, KWIDTH, FP16, ASM, True, DENSE, BIAS,
                     WIDTHS, UNROLL, STAGES)  # fmt: skip
        gate, up = tl.split(tl.permute(tl.reshape(y, (HALF, 2, BT)), (0, 2, 1)))
    store_hidden(gated(gate, up, ACT), at, row, valid, expert.to(tl.int64) * KDOWN, down_factor, down_offset, out,
                 out_corr, OUT_STRIDE, OUT_NCORR, FUSED, FP16, ASM)  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["weight"])
def down_kernel(act, corr, codes32, codes16, dense, start, tiles, columns, scale, bias,
                block_expert, block_slot, num_blocks,
                weight, local, partial, arrived, out,
                KMAX, H,
                NCORR: tl.constexpr, NCORR_POW2: tl.constexpr, CORR_CHUNK: tl.constexpr, TOP_K: tl.constexpr,
                BN: tl.constexpr, BT: tl.constexpr, EVEN: tl.constexpr, DENSE: tl.constexpr, BIAS: tl.constexpr,
                WIDTHS: tl.constexpr, KWIDTH: tl.constexpr, FP16: tl.constexpr, ASM: tl.constexpr,
                UNROLL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Outputs of every slot to `partial` [slots, H] float32, times the routing weight; the last of a token sums them.

    weight: routing weight of each slot, float32. local: expert of each slot here, -1: elsewhere. arrived: int32
    [tokens, grid's first size], before: of a token's slots those that are elsewhere. The sum runs in the order of the
    slots, whoever is last: always the same.
    """
    block = tl.program_id(1)
    expert = tl.load(block_expert + block)
    if expert < 0:
        return
    slot = tl.load(block_slot + block * BT + tl.arange(0, BT))
    valid = slot >= 0
    row = tl.where(valid, slot, 0).to(tl.int64)
    n0 = tl.program_id(0) * BN
    n = n0 + tl.arange(0, BN)
    inside = n < H
    matrix = expert.to(tl.int64)
    y = _outputs(act, corr, codes32, codes16, dense, start, tiles, scale, bias, row, KMAX, H, matrix, n0, H,
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
