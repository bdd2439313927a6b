"""The GEMM of `gemm.py` for blocks of few tokens, in Gluon: codes go from memory to the matrix unit's registers.

Every thread reads the words of the very weights that it multiplies. So nothing passes through shared memory, and warps
do not wait for each other. A program asks for words of every width at its start, and its loops find them in L2.
Arguments, results and layouts in memory are those of `gemm.py`. Every architecture computes mma.sync:

    m16n8k16, thread 4 g + j:   weights of outputs g and g + 8, components 2 j, 2 j + 1, 2 j + 8, 2 j + 9
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from bitsmoe_kernels._triton import codes, gemm

WARPS = gl.constexpr(4)
ASKED, LEAST_LOG2, MOST_LOG2 = gl.constexpr(4096), gl.constexpr(2), gl.constexpr(5)
"""Tiles of a width that all programs together ask for; logarithms of the least and the most that each of them does.
What is asked for must stay in L2 until it is used. So few programs may ask for all tiles, many for the first ones."""
_LANES = gl.constexpr([[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]])
"""Lane 4 g + j of a tensor whose rows are outputs or tokens and whose columns are lanes' words."""


@gluon.constexpr_function
def _thread_layout(words):
    """int32 [32, 4 words]: row 8 w + g is thread (g, j) of warp w, which holds the words of lane j."""
    registers, lanes = [[0, 1]] * (words == 2), [[r, words * c] for r, c in _LANES.value]
    return gl.DistributedLinearLayout(registers, lanes, [[8, 0], [16, 0]], [], [32, 4 * words])


@gluon.constexpr_function
def _words_layout(n):
    """int32 [n, 4]: output 64 r + 16 w + 8 h + g in thread (g, j) of warp w."""
    return gl.DistributedLinearLayout(
        [[8, 0], *([first, 0] for first in (64, 128) if first < n)], _LANES.value, [[16, 0], [32, 0]], [], [n, 4]
    )


@gluon.constexpr_function
def _act_layout(rows, kwidth):
    """int32 [rows, 32]: activations as they lie in memory, two in a word, kwidth neighbours in a thread."""
    neighbours, lanes = ([0, 4], [[0, 1], [0, 2]]) if kwidth == 2 else ([0, 1], [[0, 2], [0, 4]])
    registers = [neighbours, [0, 8], [0, 16]] + [[8, 0]] * (rows == 16)
    return gl.DistributedLinearLayout(registers, [*lanes, [1, 0], [2, 0], [4, 0]], [[0, 0], [0, 0]], [], [rows, 32])


@gluon.constexpr_function
def _ends_layout(neighbours, n):
    """[n, rows]: `neighbours` outputs of a row in a thread, for vectors in memory; a warp has few rows."""
    across = min(32, n // neighbours)
    return gl.BlockedLayout([neighbours, 1], [across, 32 // across], [1, WARPS.value], [0, 1])


@gluon.constexpr_function
def _unit():
    """What the matrix unit leaves in registers."""
    return gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8])


@gluon.jit
def _ask_for(words, tiles, stride, width, LINES: gl.constexpr, EVEN: gl.constexpr):
    """Bring at most MOST tiles to L2, `stride` words apart: LINES lines of each, of which `width` words are there.

    Four threads ask for a tile, or once more for the last one. EVEN: all lines are there.
    """
    if tiles > 0:
        thread = gl.arange(0, WARPS * 32, gl.BlockedLayout([1], [32], [WARPS], [0]))
        at = words + gl.minimum(thread // 4, tiles - 1) * stride
        for i in gl.static_range(LINES // 4):
            line = thread % 4 * 32 + i * 128
            gl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
                [(at + (line if EVEN else gl.minimum(line, width - 1))).to(gl.int64)], dtype=gl.int32, is_pure=False,
                pack=1,
            )  # fmt: skip


@gluon.jit
def _load(at, row, rows, FIRST: gl.constexpr, EVEN: gl.constexpr):
    """Words FIRST rows behind those at `at`, which are of row `row`."""
    return gl.load(at) if EVEN else gl.load(at, mask=row + FIRST < rows, other=0)


@gluon.jit
def _both(at, n, rows, FIRST: gl.constexpr, ROW: gl.constexpr, EVEN: gl.constexpr):
    """Words of outputs FIRST and FIRST + 8 behind `at`, [32, ROW, 2]."""
    return gl.join(
        _load(at + FIRST * ROW, n, rows, FIRST, EVEN), _load(at + (FIRST + 8) * ROW, n, rows, FIRST + 8, EVEN)
    )


@gluon.jit
def _wide(at, n, rows, BN: gl.constexpr, WORDS: gl.constexpr, EVEN: gl.constexpr):
    """The 32-bit words of a tile, [BN, 4] or [BN, 8].

    at [32, 4 WORDS]: where thread (g, j) of warp w finds those of output 16 w + g, which is n. Further outputs lie at
    fixed distances from it. The compiler has to see that: then all loads share an address.
    """
    ROW: gl.constexpr = 4 * WORDS
    words = _both(at, n, rows, 0, ROW, EVEN)
    if BN == 64:
        words = gl.permute(gl.reshape(words, (4, 8, ROW, 2)), (0, 3, 1, 2))
    elif BN == 128:
        words = gl.join(words, _both(at, n, rows, 64, ROW, EVEN))
        words = gl.permute(gl.reshape(words, (4, 8, ROW, 2, 2)), (4, 0, 3, 1, 2))
    else:
        words = gl.join(words, _both(at, n, rows, 64, ROW, EVEN))
        more = gl.join(_both(at, n, rows, 128, ROW, EVEN), _both(at, n, rows, 192, ROW, EVEN))
        words = gl.permute(gl.reshape(gl.join(words, more), (4, 8, ROW, 2, 2, 2)), (5, 4, 0, 3, 1, 2))
    return gl.reshape(words, (BN, ROW))


@gluon.jit
def _narrow(at, half, rows, BN: gl.constexpr, EVEN: gl.constexpr):
    """The 16-bit words of a tile, [BN / 2, 4]. at [32, 4]: those of outputs 16 w + g and 16 w + 8 + g."""
    words = _load(at, half, rows // 2, 0, EVEN)
    if BN == 128:
        words = gl.permute(gl.join(words, _load(at + 128, half, rows // 2, 32, EVEN)), (2, 0, 1))
    elif BN == 256:
        words = gl.join(words, _load(at + 128, half, rows // 2, 32, EVEN))
        more = gl.join(_load(at + 256, half, rows // 2, 64, EVEN), _load(at + 384, half, rows // 2, 96, EVEN))
        words = gl.permute(gl.join(words, more), (3, 2, 0, 1))
    return gl.reshape(words, (BN // 2, 4))


@gluon.jit
def _words(wide, narrow, n, half, tile, rows, BITS: gl.constexpr, BN: gl.constexpr, EVEN: gl.constexpr):
    """A tile's words; a number where a width has none."""
    first, second = 0, 0
    if BITS > 1:
        first = _wide(wide + tile * (rows * (8 if BITS == 4 else 4)), n, rows, BN, 2 if BITS == 4 else 1, EVEN)
    if BITS == 1 or BITS == 3:
        second = _narrow(narrow + tile * (rows * 2), half, rows, BN, EVEN)
    return first, second


@gluon.jit
def _multiply(wide, narrow, act, acc, BITS: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr, KWIDTH: gl.constexpr,
              FP16: gl.constexpr):  # fmt: skip
    """acc and a tile's products. act int32 [BT, 32], as it lies in memory."""
    one: gl.constexpr = _words_layout(BN)
    if BITS == 1 or BITS == 3:
        narrow = gl.convert_layout(codes.narrow_words(narrow, BN, True), one, assert_trivial=True)
    if BITS == 1:
        first, second = narrow, narrow
    elif BITS == 2:
        first = gl.convert_layout(wide, one, assert_trivial=True)
        second = first
    elif BITS == 3:
        first, second = gl.convert_layout(wide, one, assert_trivial=True), narrow
    else:
        first, second = gl.split(gl.reshape(wide, (BN, 4, 2)))
        first = gl.convert_layout(first, one, assert_trivial=True)
        second = gl.convert_layout(second, one, assert_trivial=True)
    left: gl.constexpr = gl.DotOperandLayout(0, _unit(), 2)
    right: gl.constexpr = gl.DotOperandLayout(1, _unit(), 2)
    weights = gl.convert_layout(codes.numbers(first, second, BITS, BN, 2, FP16, True), left, assert_trivial=True)
    if KWIDTH == 4:
        act = gl.reshape(gl.permute(gl.reshape(act, (BT, 4, 4, 2)), (0, 1, 3, 2)), (BT, 32))
    pairs = gl.join(codes.as_float(act, FP16), codes.as_float(act >> 16, FP16))
    act = gl.permute(gl.reshape(pairs, (BT, 64)), (1, 0))
    return mma_v2(weights, gl.convert_layout(act, right, assert_trivial=True), acc)


@gluon.jit
def _segment(acc, codes32, codes16, wide, narrow, count, act, act_offsets, n0, rows,
             BITS: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr, KWIDTH: gl.constexpr, FP16: gl.constexpr,
             EVEN: gl.constexpr):  # fmt: skip
    """All tiles of one class; see `gemm._segment`. act: int32 words of its first tile, at act_offsets [BT, 32]."""
    WORDS: gl.constexpr = 2 if BITS == 4 else 1
    of_wide: gl.constexpr = _thread_layout(WORDS)
    of_narrow: gl.constexpr = _thread_layout(1)
    lane = gl.arange(0, 4 * WORDS, gl.SliceLayout(0, of_wide))[None, :]
    thread = gl.arange(0, 32, gl.SliceLayout(1, of_wide))[:, None]
    n = thread // 8 * 16 + thread % 8
    wide = codes32 + wide + n0 * 4 * WORDS + (n * 4 * WORDS + lane)
    n = n0 + n + 0 * lane
    lane = gl.arange(0, 4, gl.SliceLayout(0, of_narrow))[None, :]
    half = gl.arange(0, 32, gl.SliceLayout(1, of_narrow))[:, None]
    narrow = codes16 + narrow + n0 * 2 + (half * 4 + lane)
    half = n0 // 2 + half + 0 * lane
    if count > 0:
        # Beyond the last tile the last one is read again, and not used.
        end = count - 1
        w0, v0 = _words(wide, narrow, n, half, 0, rows, BITS, BN, EVEN)
        a0 = gl.load(act + act_offsets)
        w1, v1 = _words(wide, narrow, n, half, gl.minimum(1, end), rows, BITS, BN, EVEN)
        for i in range(0, end, 2):
            a1 = gl.load(act + (i + 1) * 32 + act_offsets)
            acc = _multiply(w0, v0, a0, acc, BITS, BN, BT, KWIDTH, FP16)
            after = gl.minimum(i + 2, end)
            w0, v0 = _words(wide, narrow, n, half, after, rows, BITS, BN, EVEN)
            a0 = gl.load(act + after * 32 + act_offsets)
            acc = _multiply(w1, v1, a1, acc, BITS, BN, BT, KWIDTH, FP16)
            after = gl.minimum(i + 3, end)
            w1, v1 = _words(wide, narrow, n, half, after, rows, BITS, BN, EVEN)
        if count % 2 != 0:
            acc = _multiply(w0, v0, a0, acc, BITS, BN, BT, KWIDTH, FP16)
    return acc


@gluon.jit
def _ahead(num_blocks):
    """Tiles of each width that a program asks for: a power of two, without a division."""
    programs, ahead = num_blocks * gl.num_programs(0), 1 << LEAST_LOG2
    for more in gl.static_range(LEAST_LOG2 + 1, MOST_LOG2 + 1):
        ahead = gl.where(programs <= ASKED >> more, 1 << more, ahead)
    return ahead


@gluon.jit
def _ask(codes32, codes16, m, n0, rows, blocks, BN: gl.constexpr, EVEN: gl.constexpr, WIDTHS: gl.constexpr):
    """Bring the first words of every width to L2. Comes before anything else that is read: it takes longest."""
    wide, narrow = gemm.starts_of(m, rows)
    here, ahead = gl.minimum(rows - n0, BN), _ahead(blocks)
    for c in gl.static_range(4):
        if WIDTHS & (1 << c):
            tiles = gl.minimum(m[2 + c], ahead)
            if c > 0:
                words = 8 if c == 3 else 4
                _ask_for(codes32 + wide[c] + n0 * words, tiles, rows * words, here * words,
                         BN // (4 if c == 3 else 8), EVEN)  # fmt: skip
            if c == 0 or c == 2:
                _ask_for(codes16 + narrow[c] + n0 * 2, tiles, rows * 2, here * 2, BN // 16, EVEN)


@gluon.jit
def _parts(corr, row, width, NCORR: gl.constexpr, NCORR_POW2: gl.constexpr):
    """The first `width` partial corrections of each row, [BT, NCORR_POW2]."""
    sums: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [WARPS, 1], [1, 0])
    at = gl.arange(0, NCORR_POW2, gl.SliceLayout(0, sums))[None, :]
    prow = corr + gl.convert_layout(row, gl.SliceLayout(1, sums))[:, None] * NCORR
    return gl.load(prow + at, mask=at < width, other=0.0)


@gluon.jit
def _outputs(act, corr, codes32, codes16, dense, scale, bias, m, row, KMAX, NMAX, matrix, n0, N, rows,
             NCORR: gl.constexpr, NCORR_POW2: gl.constexpr, CORR_CHUNK: gl.constexpr,
             BN: gl.constexpr, BT: gl.constexpr, KWIDTH: gl.constexpr, FP16: gl.constexpr,
             EVEN: gl.constexpr, DENSE: gl.constexpr, BIAS: gl.constexpr, WIDTHS: gl.constexpr,
             MADE: gl.constexpr):  # fmt: skip
    """See `gemm._outputs`. row [BT]: in the layout of activations' rows. MADE: result's layout.

    Small programs read what their outputs need before their loops: nothing waits for it at the end.
    """
    EARLY: gl.constexpr = BN == 64
    if EARLY:
        n = n0 + gl.arange(0, BN, gl.SliceLayout(1, MADE))
        t = gemm.of_outputs(scale, matrix * NMAX, n, N, EVEN)
    acts: gl.constexpr = _act_layout(BT, KWIDTH)
    unit: gl.constexpr = _unit()
    coded = gl.zeros((BN, BT), gl.float32, unit)
    pairs = act.to(gl.pointer_type(gl.int32), bitcast=True)
    act_offsets = row[:, None] * (KMAX // 2) + gl.arange(0, 32, gl.SliceLayout(0, acts))[None, :]
    wide, narrow = gemm.starts_of(m, rows)
    done = m[2] + m[3] + m[4] + m[5]
    if EARLY:
        parts = _parts(corr, row, tl.cdiv(done * 64, CORR_CHUNK), NCORR, NCORR_POW2)
    for c in gl.static_range(4):
        if WIDTHS & (1 << c):
            coded = _segment(coded, codes32, codes16, wide[c], narrow[c], m[2 + c], pairs, act_offsets, n0, rows,
                             c + 1, BN, BT, KWIDTH, FP16, EVEN)  # fmt: skip
            pairs += m[2 + c] * 32
    if DENSE:
        plain = gl.zeros((BN, BT), gl.float32, unit)
        left: gl.constexpr = gl.DotOperandLayout(0, unit, 2)
        right: gl.constexpr = gl.DotOperandLayout(1, unit, 2)
        nn = n0 + gl.arange(0, BN, gl.SliceLayout(1, left))[:, None]
        kk = gl.arange(0, 64, gl.SliceLayout(0, left))[None, :]
        pweight = dense + m[6] + nn * 64 + kk
        there = gl.convert_layout(row, gl.SliceLayout(0, right))
        pright = act + there[None, :] * KMAX + (done * 64 + gl.arange(0, 64, gl.SliceLayout(1, right))[:, None])
        for _ in range(m[7]):
            plain = mma_v2(gl.load(pweight, mask=(nn < rows) & (kk >= 0), other=0.0), gl.load(pright), plain)
            pweight += rows * 64
            pright += 64
        plain = gl.convert_layout(plain, MADE)
    if not EARLY:
        parts = _parts(corr, row, tl.cdiv(done * 64, CORR_CHUNK), NCORR, NCORR_POW2)
    correction = gl.sum(parts, 1)
    coded = gl.convert_layout(coded, MADE) - gl.convert_layout(correction, gl.SliceLayout(0, MADE))[None, :]
    if not EARLY:
        n = n0 + gl.arange(0, BN, gl.SliceLayout(1, MADE))
        t = gemm.of_outputs(scale, matrix * NMAX, n, N, EVEN)
    coded *= t[:, None]
    if DENSE:
        coded += plain
    if BIAS:
        coded += gemm.of_outputs(bias, matrix * NMAX, n, N, EVEN)[:, None]
    return coded


@gluon.jit
def _rows(block_slot, block, BT: gl.constexpr, layout: gl.constexpr):
    """Rows [BT] of a block, int64 and 0 where there is none, and whether there is one."""
    slot = gl.load(block_slot + block * BT + gl.arange(0, BT, layout))
    return gl.where(slot >= 0, slot, 0).to(gl.int64), slot >= 0


@gluon.jit
def gate_up_direct(act, corr, codes32, codes16, dense, scale, bias, block_matrix, block_slot, num_blocks,
                   down_factor, down_offset, out, out_corr,
                   KMAX, NMAX, KDOWN, OUT_STRIDE,
                   NCORR: gl.constexpr, NCORR_POW2: gl.constexpr, CORR_CHUNK: gl.constexpr, OUT_NCORR: gl.constexpr,
                   BN: gl.constexpr, BT: gl.constexpr, SPLIT: gl.constexpr, FUSED: gl.constexpr, DENSE: gl.constexpr,
                   ACT: gl.constexpr, BIAS: gl.constexpr,
                   WIDTHS: gl.constexpr, KWIDTH: gl.constexpr, FP16: gl.constexpr):  # fmt: skip
    """`gemm.gate_up_kernel`."""
    block = gl.program_id(1)
    RECORDS: gl.constexpr = 3 if SPLIT else 2
    expert, N, m = gemm.matrix_of(block_matrix, block * RECORDS)
    blocks = gl.load(num_blocks)
    HALF: gl.constexpr = BN // 2
    acts: gl.constexpr = gl.SliceLayout(1, _act_layout(BT, KWIDTH))
    row, _ = _rows(block_slot, block, BT, acts)
    if expert < 0:
        return
    ONE: gl.constexpr = SPLIT or ACT == gemm.NO_GATE  # a tile holds outputs of one of gate and up
    n0 = gl.program_id(0) * (HALF if ONE else BN)
    matrix = expert * (2 if SPLIT else 1)
    if n0 >= N:
        return
    _ask(codes32, codes16, m, n0, N, blocks, HALF if ONE else BN, True, WIDTHS)
    made: gl.constexpr = _ends_layout(HALF // 16, HALF)
    at = gl.program_id(0) * HALF + gl.arange(0, HALF, gl.SliceLayout(1, made))
    EARLY: gl.constexpr = BN == 64
    factor, offset = 0.0, 0.0
    if FUSED and EARLY:
        component = expert * KDOWN + at
        factor, offset = gl.load(down_factor + component), gl.load(down_offset + component)
    if SPLIT:
        gate = _outputs(act, corr, codes32, codes16, dense, scale, bias, m, row * 2, KMAX, NMAX, matrix,
                        n0, N, N, NCORR, NCORR_POW2, CORR_CHUNK, HALF, BT, KWIDTH, FP16, True, DENSE,
                        BIAS, WIDTHS, made)  # fmt: skip
        _, _, m = gemm.matrix_of(block_matrix, block * RECORDS + 1)
        _ask(codes32, codes16, m, n0, N, blocks, HALF, True, WIDTHS)
        up = _outputs(act, corr, codes32, codes16, dense, scale, bias, m, row * 2 + 1, KMAX, NMAX, matrix + 1, n0,
                      N, N, NCORR, NCORR_POW2, CORR_CHUNK, HALF, BT, KWIDTH, FP16,
                      True, DENSE, BIAS, WIDTHS, made)  # fmt: skip
    elif ACT == gemm.NO_GATE:
        up = _outputs(act, corr, codes32, codes16, dense, scale, bias, m, row, KMAX, NMAX, matrix,
                      n0, N, N, NCORR, NCORR_POW2, CORR_CHUNK, HALF, BT, KWIDTH, FP16, True, DENSE, BIAS,
                      WIDTHS, made)  # fmt: skip
        gate = up
    else:
        y = _outputs(act, corr, codes32, codes16, dense, scale, bias, m, row, KMAX, NMAX, matrix,
                     n0, N, N, NCORR, NCORR_POW2, CORR_CHUNK, BN, BT, KWIDTH, FP16, True, DENSE, BIAS,
                     WIDTHS, _ends_layout(HALF // 8, BN))  # fmt: skip
        gate, up = gl.split(gl.permute(gl.reshape(y, (HALF, 2, BT)), (0, 2, 1)))
        gate = gl.convert_layout(gate, made, assert_trivial=True)
        up = gl.convert_layout(up, made, assert_trivial=True)
    if FUSED and not EARLY:
        component = expert * KDOWN + at
        factor, offset = gl.load(down_factor + component), gl.load(down_offset + component)
    row_out, valid = _rows(block_slot, block, BT, gl.SliceLayout(0, made))
    gemm.store_hidden(gemm.gated(gate, up, ACT), at, row_out, valid, factor, offset, out, out_corr, OUT_STRIDE,
                      OUT_NCORR, FUSED, FP16, True)  # fmt: skip


@gluon.jit(do_not_specialize_on_alignment=["weight"])
def down_direct(act, corr, codes32, codes16, dense, scale, bias, block_matrix, block_slot, num_blocks,
                weight, local, partial, arrived, out,
                KMAX, H,
                NCORR: gl.constexpr, NCORR_POW2: gl.constexpr, CORR_CHUNK: gl.constexpr, TOP_K: gl.constexpr,
                BN: gl.constexpr, BT: gl.constexpr, EVEN: gl.constexpr, DENSE: gl.constexpr, BIAS: gl.constexpr,
                RECORDS: gl.constexpr, WIDTHS: gl.constexpr, KWIDTH: gl.constexpr,
                FP16: gl.constexpr):  # fmt: skip
    """`gemm.down_kernel`."""
    block = gl.program_id(1)
    expert, _, m = gemm.matrix_of(block_matrix, block * RECORDS + RECORDS - 1)
    blocks = gl.load(num_blocks)
    made: gl.constexpr = _ends_layout(4, BN)
    of_rows: gl.constexpr = gl.SliceLayout(0, made)
    row_in, _ = _rows(block_slot, block, BT, gl.SliceLayout(1, _act_layout(BT, KWIDTH)))
    if expert < 0:
        return
    n0 = gl.program_id(0) * BN
    stored_rows = tl.cdiv(H, 16) * 16
    _ask(codes32, codes16, m, n0, stored_rows, blocks, BN, EVEN, WIDTHS)
    row, valid = _rows(block_slot, block, BT, of_rows)
    token = row // TOP_K
    EARLY: gl.constexpr = BN == 64
    if EARLY:
        w = gl.load(weight + row)
        # Which of a token's slots are computed here, one bit for each.
        here = gl.zeros((BT,), gl.int32, of_rows)
        for j in gl.static_range(TOP_K):
            here |= (gl.load(local + token * TOP_K + j) >= 0).to(gl.int32) << j
    y = _outputs(act, corr, codes32, codes16, dense, scale, bias, m, row_in, KMAX, H, expert, n0, H,
                 stored_rows, NCORR, NCORR_POW2, CORR_CHUNK, BN, BT, KWIDTH, FP16, EVEN, DENSE,
                 BIAS, WIDTHS, made)  # fmt: skip
    n = n0 + gl.arange(0, BN, gl.SliceLayout(1, made))
    # Only the last program of a row has outputs that are not there.
    stored = valid[None, :] & (n < (n0 + BN if EVEN else H))[:, None]
    if not EARLY:
        w = gl.load(weight + row)
    y *= w[None, :]
    gl.store(partial + row[None, :] * H + n[:, None], y, mask=stored)
    # All threads' stores before the count goes up, and the count before others' stores are read.
    tl.debug_barrier()
    one = gl.full((BT,), 1, gl.int32, of_rows)
    before = gl.atomic_add(arrived + token * gl.num_programs(0) + gl.program_id(0), one, mask=valid, sem="acq_rel")
    tl.debug_barrier()
    last = valid & (before + 1 == TOP_K)
    y = gl.zeros((BN, BT), gl.float32, made)
    pothers = partial + (token * TOP_K)[None, :] * H + n[:, None]
    if EARLY:
        for j in gl.static_range(TOP_K):
            added = last & ((here >> j) % 2 != 0)
            y += gl.load(pothers + j * H, mask=stored & added[None, :], other=0.0, volatile=True)
    else:
        for j in tl.range(TOP_K, loop_unroll_factor=1):
            added = last & (gl.load(local + token * TOP_K + j) >= 0)
            y += gl.load(pothers + j * H, mask=stored & added[None, :], other=0.0, volatile=True)
    gl.store(out + token[None, :] * H + n[:, None], codes.rounded(y, FP16, True), mask=stored & last[None, :])
