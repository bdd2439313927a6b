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
def _thread_layout():
    """[32, 4]: row 8 w + g, column j is thread (g, j) of warp w."""
    return gl.DistributedLinearLayout([], _LANES.value, [[8, 0], [16, 0]], [], [32, 4])


@gluon.constexpr_function
def _words_layout(n):
    """int32 [n, 4]: output 64 r + 16 w + 8 h + g in thread (g, j) of warp w."""
    return gl.DistributedLinearLayout(
        [[8, 0], *([first, 0] for first in (64, 128) if first < n)], _LANES.value, [[16, 0], [32, 0]], [], [n, 4]
    )


@gluon.constexpr_function
def _act_layout(rows):
    """int32 [rows, 4, 8]: activations, two in a word: thread (g, j) holds those of lane j, which are neighbours."""
    registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4]] + [[8, 0, 0]] * (rows == 16)
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0, 0], [0, 0, 0]], [], [rows, 4, 8])


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
    """Bring tiles to L2, `stride` words apart: LINES lines of each, of which `width` words are there.

    EVEN: all lines are there.
    """
    THREADS: gl.constexpr = WARPS * 32
    thread = gl.arange(0, THREADS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    line = thread % LINES * 32
    at = words + (line if EVEN else gl.minimum(line, width - 1))
    for first in range(0, tiles, THREADS // LINES):
        # Threads beyond the last tile ask for it once more.
        tile = gl.minimum(first + thread // LINES, tiles - 1)
        gl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [(at + tile * stride).to(gl.int64)], dtype=gl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def _load(at, row, rows, FIRST: gl.constexpr, EVEN: gl.constexpr):
    """Words FIRST rows behind those at `at`, which are of row `row`."""
    return gl.load(at) if EVEN else gl.load(at, mask=row + FIRST < rows, other=0)


@gluon.jit
def _both(at, n, rows, FIRST: gl.constexpr, EVEN: gl.constexpr):
    """Words of outputs FIRST and FIRST + 8 behind `at`, [32, 4, 2]."""
    return gl.join(_load(at + FIRST * 4, n, rows, FIRST, EVEN), _load(at + FIRST * 4 + 32, n, rows, FIRST + 8, EVEN))


@gluon.jit
def _wide(at, n0, rows, BN: gl.constexpr, EVEN: gl.constexpr):
    """The words of a tile that are not shared by two outputs, [BN, 4].

    at [32, 4]: where thread (g, j) of warp w finds those of output 16 w + g. Further outputs lie at fixed distances
    from it. The compiler has to see that: then all loads share an address.
    """
    thread = gl.arange(0, 32, gl.SliceLayout(1, _thread_layout()))[:, None]
    n = n0 + (thread // 8 * 16 + thread % 8)
    words = _both(at, n, rows, 0, EVEN)
    if BN == 64:
        words = gl.permute(gl.reshape(words, (4, 8, 4, 2)), (0, 3, 1, 2))
    elif BN == 128:
        words = gl.join(words, _both(at, n, rows, 64, EVEN))
        words = gl.permute(gl.reshape(words, (4, 8, 4, 2, 2)), (4, 0, 3, 1, 2))
    else:
        words = gl.join(words, _both(at, n, rows, 64, EVEN))
        more = gl.join(_both(at, n, rows, 128, EVEN), _both(at, n, rows, 192, EVEN))
        words = gl.permute(gl.reshape(gl.join(words, more), (4, 8, 4, 2, 2, 2)), (5, 4, 0, 3, 1, 2))
    return gl.convert_layout(gl.reshape(words, (BN, 4)), _words_layout(BN), assert_trivial=True)


@gluon.jit
def _narrow(at, n0, rows, BN: gl.constexpr, EVEN: gl.constexpr):
    """The 16-bit words of a tile, spread, [BN, 4]. at [32, 4]: those of outputs 16 w + g and 16 w + 8 + g."""
    half = n0 // 2 + gl.arange(0, 32, gl.SliceLayout(1, _thread_layout()))[:, None]
    words = _load(at, half, rows // 2, 0, EVEN)
    if BN == 128:
        words = gl.permute(gl.join(words, _load(at + 128, half, rows // 2, 32, EVEN)), (2, 0, 1))
    elif BN == 256:
        words = gl.join(words, _load(at + 128, half, rows // 2, 32, EVEN))
        more = gl.join(_load(at + 256, half, rows // 2, 64, EVEN), _load(at + 384, half, rows // 2, 96, EVEN))
        words = gl.permute(gl.join(words, more), (3, 2, 0, 1))
    return gl.reshape(words, (BN // 2, 4))


@gluon.jit
def _tile(wide, narrow, act, n0, rows, BITS: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr, EVEN: gl.constexpr):
    """A tile's words, a number where a width has none, and its activations, int32 [BT, 4, 8]."""
    first, second = 0, 0
    if BITS > 1:
        first = _wide(wide, n0, rows, BN, EVEN)
    if BITS == 1 or BITS == 3:
        second = _narrow(narrow, n0, rows, BN, EVEN)
    word = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, _act_layout(BT))))
    return first, second, gl.load(act[:, :, None] + word[None, None, :])


@gluon.jit
def _multiply(acc, wide, narrow, act, BITS: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr, FP16: gl.constexpr):
    """acc and the products of a tile, see `_tile`."""
    if BITS == 1 or BITS == 3:
        narrow = gl.convert_layout(codes.narrow_words(narrow, BN, True), _words_layout(BN), assert_trivial=True)
    if BITS == 1:
        first, second = narrow, narrow
    elif BITS == 2:
        first, second = wide, wide
    elif BITS == 3:
        first, second = wide, narrow
    else:
        first, second = wide.to(gl.int32), (wide >> 32).to(gl.int32)
    left: gl.constexpr = gl.DotOperandLayout(0, _unit(), 2)
    right: gl.constexpr = gl.DotOperandLayout(1, _unit(), 2)
    weights = gl.convert_layout(codes.numbers(first, second, BITS, BN, 2, FP16, True), left, assert_trivial=True)
    act = gl.reshape(gl.permute(act, (0, 2, 1)), (BT, 32))
    pairs = gl.join(codes.as_float(act, FP16), codes.as_float(act >> 16, FP16))
    act = gl.permute(gl.reshape(pairs, (BT, 64)), (1, 0))
    return mma_v2(weights, gl.convert_layout(act, right, assert_trivial=True), acc)


@gluon.jit
def _segment(acc, wide, narrow, act, count, n0, rows,
             BITS: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr, FP16: gl.constexpr,
             EVEN: gl.constexpr):  # fmt: skip
    """All tiles of one class; see `gemm._segment`.

    wide, narrow [32, 4], act [BT, 4]: where the words of a thread's first output, and those of a lane's activations,
    begin. They are returned behind the class's last tile.
    """
    step, step_narrow = rows * 4, rows * 2
    if count > 0:
        w0, v0, a0 = _tile(wide, narrow, act, n0, rows, BITS, BN, BT, EVEN)
        left = count - 1
        while left > 0:
            w1, v1, a1 = _tile(wide + step, narrow + step_narrow, act + 32, n0, rows, BITS, BN, BT, EVEN)
            acc = _multiply(acc, w0, v0, a0, BITS, BN, BT, FP16)
            # Beyond the last tile it is read again, and not used.
            on = gl.minimum(left, 2)
            left -= 2
            act += on * 32
            if BITS > 1:
                wide += on * step
            if BITS == 1 or BITS == 3:
                narrow += on * step_narrow
            w0, v0, a0 = _tile(wide, narrow, act, n0, rows, BITS, BN, BT, EVEN)
            acc = _multiply(acc, w1, v1, a1, BITS, BN, BT, FP16)
        if count % 2 != 0:
            acc = _multiply(acc, w0, v0, a0, BITS, BN, BT, FP16)
        act += 32
        if BITS > 1:
            wide += step
        if BITS == 1 or BITS == 3:
            narrow += step_narrow
    return acc, wide, narrow, act


@gluon.jit
def _coded(act, codes32, codes16, m, row, KMAX, n0, rows, BN: gl.constexpr, BT: gl.constexpr, FP16: gl.constexpr,
           EVEN: gl.constexpr, WIDTHS: gl.constexpr):  # fmt: skip
    """The sum over coded components of `gemm._contract`. Words of all widths lie one behind another."""
    thread = gl.arange(0, 32, gl.SliceLayout(1, _thread_layout()))[:, None]
    lane = gl.arange(0, 4, gl.SliceLayout(0, _thread_layout()))[None, :]
    of_thread = n0 * 4 + ((thread // 8 * 16 + thread % 8) * 4 + lane)
    wide = codes32 + m[1] + of_thread
    narrow = codes16 + m[0] + n0 * 2 + (thread * 4 + lane)
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, _act_layout(BT))))[None, :]
    act = act.to(gl.pointer_type(gl.int32), bitcast=True) + row[:, None] * (KMAX // 2) + lane * 8
    acc = gl.zeros((BN, BT), gl.float32, _unit())
    for c in gl.static_range(3):
        if WIDTHS & (1 << c):
            acc, wide, narrow, act = _segment(acc, wide, narrow, act, m[2 + c], n0, rows, c + 1, BN, BT, FP16, EVEN)
    if WIDTHS & 8:
        # Two words of an output lie side by side.
        wide = (wide + of_thread).to(gl.pointer_type(gl.int64), bitcast=True)
        acc, wide, narrow, act = _segment(acc, wide, narrow, act, m[5], n0, rows, 4, BN, BT, FP16, EVEN)
    return acc


@gluon.jit
def _ahead():
    """Tiles that a program asks for at a time: a power of two, without a division."""
    programs, ahead = gl.num_programs(0) * gl.num_programs(1), 1 << LEAST_LOG2
    for more in gl.static_range(LEAST_LOG2 + 1, MOST_LOG2 + 1):
        ahead = gl.where(programs <= ASKED >> more, 1 << more, ahead)
    return ahead


@gluon.jit
def _ask(codes32, codes16, m, n0, rows, BN: gl.constexpr, EVEN: gl.constexpr, WIDTHS: gl.constexpr):
    """Bring the first words of every kind to L2. Comes before anything else that is read: it takes longest."""
    here, ahead = gl.minimum(rows - n0, BN), _ahead()
    if WIDTHS & 6:
        _ask_for(codes32 + m[1] + n0 * 4, gl.minimum(m[3] + m[4], ahead), rows * 4, here * 4, BN // 8, EVEN)
    if WIDTHS & 5:
        _ask_for(codes16 + m[0] + n0 * 2, gl.minimum(m[2] + m[4], ahead), rows * 2, here * 2, BN // 16, EVEN)
    if WIDTHS & 8:
        wide, _ = gemm.starts_of(m, rows)
        _ask_for(codes32 + wide[3] + n0 * 8, gl.minimum(m[5], ahead), rows * 8, here * 8, BN // 4, EVEN)


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
    done = m[2] + m[3] + m[4] + m[5]
    if EARLY:
        parts = _parts(corr, row, tl.cdiv(done * 64, CORR_CHUNK), NCORR, NCORR_POW2)
    coded = _coded(act, codes32, codes16, m, row, KMAX, n0, rows, BN, BT, FP16, EVEN, WIDTHS)
    if DENSE:
        unit: gl.constexpr = _unit()
        plain = gl.zeros((BN, BT), gl.float32, unit)
        left: gl.constexpr = gl.DotOperandLayout(0, unit, 2)
        right: gl.constexpr = gl.DotOperandLayout(1, unit, 2)
        nn = n0 + gl.arange(0, BN, gl.SliceLayout(1, left))[:, None]
        kk = gl.arange(0, 64, gl.SliceLayout(0, left))[None, :]
        at = codes.place_in_lanes(gl.arange(0, 64, gl.SliceLayout(1, right)), KWIDTH)[:, None]
        pweight = dense + m[6] + nn * 64 + kk
        there = gl.convert_layout(row, gl.SliceLayout(0, right))
        pright = act + there[None, :] * KMAX + (done * 64 + at)
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
def gate_up_direct(act, corr, codes32, codes16, dense, scale, bias, block_matrix, block_slot,
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
    HALF: gl.constexpr = BN // 2
    acts: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, _act_layout(BT)))
    row, _ = _rows(block_slot, block, BT, acts)
    if expert < 0:
        return
    ONE: gl.constexpr = SPLIT or ACT == gemm.NO_GATE  # a tile holds outputs of one of gate and up
    n0 = gl.program_id(0) * (HALF if ONE else BN)
    matrix = expert * (2 if SPLIT else 1)
    if n0 >= N:
        return
    _ask(codes32, codes16, m, n0, N, HALF if ONE else BN, True, WIDTHS)
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
        _ask(codes32, codes16, m, n0, N, HALF, True, WIDTHS)
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
                      OUT_NCORR, FUSED, KWIDTH, FP16, True)  # fmt: skip


@gluon.jit
def _slots_here(local, token, TOP_K: gl.constexpr):
    """Which of a token's slots are computed here, one bit for each."""
    here = token.to(gl.int32) * 0
    for j in gl.static_range(TOP_K):
        here |= (gl.load(local + token * TOP_K + j) >= 0).to(gl.int32) << j
    return here


@gluon.jit(do_not_specialize_on_alignment=["weight"])
def down_direct(act, corr, codes32, codes16, dense, scale, bias, block_matrix, block_slot,
                weight, local, partial, arrived, out,
                KMAX, H,
                NCORR: gl.constexpr, NCORR_POW2: gl.constexpr, CORR_CHUNK: gl.constexpr, TOP_K: gl.constexpr,
                BN: gl.constexpr, BT: gl.constexpr, EVEN: gl.constexpr, DENSE: gl.constexpr, BIAS: gl.constexpr,
                RECORDS: gl.constexpr, WIDTHS: gl.constexpr, KWIDTH: gl.constexpr,
                FP16: gl.constexpr):  # fmt: skip
    """`gemm.down_kernel`."""
    block = gl.program_id(1)
    expert, _, m = gemm.matrix_of(block_matrix, block * RECORDS + RECORDS - 1)
    made: gl.constexpr = _ends_layout(4, BN)
    of_rows: gl.constexpr = gl.SliceLayout(0, made)
    row_in, _ = _rows(block_slot, block, BT, gl.SliceLayout(1, gl.SliceLayout(2, _act_layout(BT))))
    if expert < 0:
        return
    n0 = gl.program_id(0) * BN
    stored_rows = tl.cdiv(H, 16) * 16
    _ask(codes32, codes16, m, n0, stored_rows, BN, EVEN, WIDTHS)
    EARLY: gl.constexpr = BN == 64
    if EARLY:
        row, valid = _rows(block_slot, block, BT, of_rows)
        w, here = gl.load(weight + row), _slots_here(local, row // TOP_K, TOP_K)
    y = _outputs(act, corr, codes32, codes16, dense, scale, bias, m, row_in, KMAX, H, expert, n0, H,
                 stored_rows, NCORR, NCORR_POW2, CORR_CHUNK, BN, BT, KWIDTH, FP16, EVEN, DENSE,
                 BIAS, WIDTHS, made)  # fmt: skip
    if not EARLY:
        row, valid = _rows(block_slot, block, BT, of_rows)
        w = gl.load(weight + row)
    token = row // TOP_K
    n = n0 + gl.arange(0, BN, gl.SliceLayout(1, made))
    # Only the last program of a row has outputs that are not there.
    stored = valid[None, :] & (n < (n0 + BN if EVEN else H))[:, None]
    in_lanes: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    slot, counts = _rows(block_slot, block, BT, in_lanes)
    y *= w[None, :]
    gl.store(partial + row[None, :] * H + n[:, None], y, mask=stored)
    # All threads' stores before the count goes up, and the count before others' stores are read.
    tl.debug_barrier()
    one = gl.full((BT,), 1, gl.int32, in_lanes)
    before = gl.atomic_add(arrived + slot // TOP_K * gl.num_programs(0) + gl.program_id(0), one, mask=counts,
                           sem="acq_rel")  # fmt: skip
    tl.debug_barrier()
    ends = (counts & (before + 1 == TOP_K)).to(gl.int32)
    # Most programs end no token.
    if gl.max(ends, 0) > 0:
        last = valid & (gl.convert_layout(ends, of_rows) > 0)
        y = gl.zeros((BN, BT), gl.float32, made)
        pothers = partial + (token * TOP_K)[None, :] * H + n[:, None]
        if not EARLY:
            here = _slots_here(local, token, TOP_K)
        for j in tl.range(TOP_K, loop_unroll_factor=TOP_K if EARLY else 1):
            added = last & ((here >> j) % 2 != 0)
            y += gl.load(pothers + j * H, mask=stored & added[None, :], other=0.0, volatile=True)
        gl.store(out + token[None, :] * H + n[:, None], codes.rounded(y, FP16, True), mask=stored & last[None, :])
