"""Matrix instructions: every number in its place, and the layouts as the PTX manual states them."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from ptx_machine.faults import PtxError
from ptx_machine.fragments import product
from ptx_machine.matrix import described
from snippets import load, run, store
from tensor_core import MatrixUnit

WARP = range(32)


def a_place(lane: int, i: int) -> tuple[int, int]:
    """Row and column of the manual's a_i of mma.m16n8k16, 16-bit numbers."""
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    column = thread * 2 + (i & 1) + (0 if i < 4 else 8)
    return row, column


def b_place(lane: int, i: int) -> tuple[int, int]:
    """Of b_i."""
    group, thread = lane >> 2, lane % 4
    return thread * 2 + (i & 1) + (0 if i < 2 else 8), group


def c_place(lane: int, i: int) -> tuple[int, int]:
    """Of c_i and d_i."""
    group, thread = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def halves(matrix: torch.Tensor, place: Callable[[int, int], tuple[int, int]], count: int) -> torch.Tensor:
    """A fragment [32 lanes, count] of a matrix."""
    return torch.stack([torch.stack([matrix[place(lane, i)] for i in range(count)]) for lane in WARP]).contiguous()


def numbers(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Distinct small integers: every sum of their products is exact, and none goes unnoticed."""
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
    return (order.reshape(rows, columns) - rows * columns // 2).to(dtype)


KINDS = {"f16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_mma(kind: str) -> None:
    A, B = numbers(16, 16, KINDS[kind], 0), numbers(16, 8, KINDS[kind], 1)
    C = torch.randint(-1000, 1000, (16, 8), generator=torch.Generator().manual_seed(2)).float()
    out = torch.zeros(32, 4)
    body = [load(0, 0, count=4), load(4, 1, count=2), load(6, 2, count=4)]
    body.append(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
                "{%r10, %r11, %r12, %r13}, {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%r6, %r7, %r8, %r9};")  # fmt: skip
    given = [halves(A, a_place, 8), halves(B, b_place, 4), halves(C, c_place, 4), out]
    run("\n".join([*body, store(10, 3, count=4)]), given)
    want = A.double() @ B.double() + C.double()
    for lane in WARP:
        for i in range(4):
            assert out[lane, i] == want[c_place(lane, i)]


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count: int, trans: str) -> None:
    """Thread 8 i + r names row r of matrix i; lane l gets numbers 2 (l mod 4) and the next of row l / 4."""
    rows = torch.arange(32 * 8, dtype=torch.int16).reshape(32, 8)
    out, back = torch.zeros(32, count, 2, dtype=torch.int16), torch.zeros(32, 4, dtype=torch.int32)
    registers = ", ".join(f"%r{10 + i}" for i in range(count))
    # Rows lie in shared memory in another order, 48 bytes apart.
    body = f"""{load(0, 0, count=4)}
    mov.u32 %r20, %tid.x; mul.lo.s32 %r21, %r20, 5; and.b32 %r21, %r21, 31; mul.lo.s32 %r22, %r21, 48;
    mov.b32 %r23, memory; add.s32 %r22, %r22, %r23;
    st.shared.v4.b32 [%r22], {{%r0, %r1, %r2, %r3}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r22];
    {store(10, 1, count=count)}
    bar.sync 0;
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r22], {{{registers}}};
    bar.sync 0;
    ld.shared.v4.b32 {{%r0, %r1, %r2, %r3}}, [%r22];
    {store(0, 2, count=4)}"""
    run(body, [rows, out, back], shared=32 * 48)
    for lane in WARP:
        for i in range(count):
            pair = [(lane // 4, 2 * (lane % 4) + e) for e in range(2)]
            if trans:
                pair = [(column, row) for row, column in pair]
            assert out[lane, i].tolist() == [int(rows[8 * i + r, c]) for r, c in pair]
    assert torch.equal(back, rows.view(torch.int32))


def test_rows_of_ldmatrix_are_aligned() -> None:
    body = """mov.u32 %r0, %tid.x; mul.lo.s32 %r1, %r0, 16; mov.b32 %r2, memory; add.s32 %r1, %r1, %r2;
    st.shared.v2.b32 [%r1], {%r0, %r0}; bar.sync 0; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r1+8];"""
    with pytest.raises(PtxError, match="not aligned to 16"):
        run(body, [], shared=1024)


def swizzled(address: int, bits: int) -> int:
    """The manual's swizzle: in 16-byte units, the last `bits` of three bits of an address by those 3 places above."""
    unit = address // 16
    changed = unit ^ (unit >> 3 & 2**bits - 1)
    return changed * 16 + address % 16


def b_address(mode: int, n: int, k: int, stride: int, leading: int) -> int:
    """Where B[k, n] lies behind the start of a matrix whose columns run along k: canonical layouts of the manual."""
    if mode == 0:  # core matrices: 8 rows of 16 bytes
        return n // 8 * stride + k // 8 * leading + n % 8 * 16 + k % 8 * 2
    width = {1: 128, 2: 64, 3: 32}[mode]
    return swizzled(n // 8 * stride + n % 8 * width + k * 2, {1: 3, 2: 2, 3: 1}[mode])


MODES = {0: 128, 1: 64, 2: 32, 3: 16}
"""Swizzle of a descriptor -> numbers along k that a stored row has (with 0: eight blocks of 16)."""


@pytest.mark.parametrize("mode", MODES)
def test_descriptors_against_the_manuals_formula(mode: int) -> None:
    leading, stride, start = 256, 2048, 4096
    descriptor = start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62
    got = described(descriptor, 32)
    for n in range(32):
        for k in range(0, 16, 8):
            assert got[n, k // 8] == start + b_address(mode, n, k, stride, leading)


def wgmma(kind: str, columns: int, wait: str = "wgmma.wait_group.sync.aligned 0;", behind: str = "") -> str:
    """Two products of 64 x 16 times 16 x n of one warp group; B is at 1024 in shared memory, along k for both."""
    n = columns // 2
    sums = ", ".join(f"%r{100 + i}" for i in range(n))
    zeros = "\n".join(f"mov.b32 %r{100 + i}, 0;" for i in range(n))
    products = [f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{sums}}}, "
                f"{{%r{4 * i}, %r{4 * i + 1}, %r{4 * i + 2}, %r{4 * i + 3}}}, %rd{10 + i}, %p1, 1, 1, 0;"
                for i in range(2)]  # fmt: skip
    return "\n".join([
        load(0, 0, count=8), zeros, "mov.pred %p1, -1;",
        f"mov.b64 %rd10, {1024 >> 4 | 1024 >> 4 << 32 | 1 << 62}; add.s64 %rd11, %rd10, 2;",
        "wgmma.fence.sync.aligned;", *products, "wgmma.commit_group.sync.aligned;", behind, wait,
        store(100, 2, count=n),
    ])  # fmt: skip


def into_shared(words: int, fence: str = "fence.proxy.async.shared::cta;") -> str:
    """Words of parameter 1 to shared memory from 1024 on, by 128 threads."""
    lines = ["mov.u32 %r200, %tid.x; mul.lo.s32 %r203, %r200, 4; mov.b32 %r202, memory; add.s32 %r203, %r203, %r202;"]
    for i in range(0, words, 128):
        one = load(201, 1).replace("%rd199 + 0", f"%rd199 + {4 * i}")
        lines.append(f"{one} st.shared.b32 [%r203+{1024 + 4 * i}], %r201;")
    return "\n".join([*lines, fence, "bar.sync 0;"])


def operands(kind: str, columns: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Fragments of A [64, 32], B as it lies in shared memory, room for the sums; and the product."""
    A, B = numbers(64, 32, torch.float32, 3) % 17 - 8, numbers(32, columns, torch.float32, 4) % 13 - 6
    fragments = [halves(A[16 * w : 16 * w + 16, 16 * s : 16 * s + 16].to(KINDS[kind]), a_place, 8)
                 for w in range(4) for s in range(2)]  # fmt: skip
    a = torch.stack(fragments).reshape(4, 2, 32, 8).transpose(1, 2).contiguous()
    memory = torch.zeros(columns * 64, dtype=KINDS[kind])
    for n in range(columns):
        for k in range(32):
            memory[b_address(1, n, k, 1024, 0) // 2] = B[k, n]
    return [a, memory, torch.zeros(128, columns // 2)], A.double() @ B.double()


@pytest.mark.parametrize("columns", [8, 16, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_wgmma(kind: str, columns: int) -> None:
    """Warp w holds rows 16 w to 16 w + 15; registers 4 j to 4 j + 3 are mma's of columns 8 j to 8 j + 7."""
    given, want = operands(kind, columns)
    run(into_shared(columns * 32) + wgmma(kind, columns), given, 128, 1024 + columns * 128)
    for thread in range(128):
        for i in range(columns // 2):
            row, column = c_place(thread % 32, i % 4)
            assert given[2][thread, i] == want[16 * (thread // 32) + row, 8 * (i // 4) + column]


@pytest.mark.parametrize(
    ("planted", "fault"),
    [
        ({"wait": "wgmma.wait_group.sync.aligned 1;"}, None),
        ({"behind": "mov.b32 %r5, 0;"}, "register .* of A changed"),
        ({"behind": "st.shared.b32 [%r203+1024], %r0;"}, "product in flight reads"),
    ],
)
def test_a_product_in_flight_is_left_alone(planted: dict[str, str], fault: str | None) -> None:
    given, _want = operands("f16", 16)
    body = into_shared(16 * 32) + wgmma("f16", 16, **planted)
    if fault is None:
        run(body, given, 128, 4096)
        assert given[2].isnan().all()
    else:
        with pytest.raises(PtxError, match=fault):
            run(body, given, 128, 4096)


def test_stores_are_fenced_before_wgmma_reads_them() -> None:
    given, _ = operands("f16", 16)
    with pytest.raises(PtxError, match=r"no fence\.proxy\.async"):
        run(into_shared(16 * 32, fence="") + wgmma("f16", 16), given, 128, 4096)
    body = (into_shared(16 * 32) + wgmma("f16", 16)).replace("bar.sync 0;", "")
    with pytest.raises(PtxError, match="no barrier between"):
        run(body, given, 128, 4096)


def cut(x: Fraction, unit: Fraction) -> Fraction:
    return int(x / unit) * unit  # toward zero


@pytest.mark.parametrize(("terms", "extra"), [(16, 2), (8, 1)])
def test_sums_of_matrix_units(terms: int, extra: int) -> None:
    """Aligned to the largest, cut, added, cut: number by number in fractions."""
    gen = np.random.default_rng(0)
    a, b = (gen.normal(size=shape).astype(np.float16).astype(np.float32) for shape in ((3, 16, 16), (3, 16, 8)))
    c = (gen.normal(size=(3, 16, 8)) * 1000).astype(np.float32)
    got = product(a, b, c, MatrixUnit(terms, extra))
    differs = False
    for w, row, column in np.ndindex(3, 16, 8):
        total = Fraction(float(c[w, row, column]))
        for first in range(0, 16, terms):
            each = [total] + [Fraction(float(a[w, row, k])) * Fraction(float(b[w, k, column]))
                              for k in range(first, first + terms)]  # fmt: skip
            largest = max(abs(x) for x in each)
            exponent = max(e for e in range(-60, 60) if Fraction(2) ** e <= largest)
            total = sum(cut(x, Fraction(2) ** (exponent - 23 - extra)) for x in each)
            top = max(e for e in range(-60, 60) if Fraction(2) ** e <= abs(total))
            total = cut(total, Fraction(2) ** (top - 23))
        assert Fraction(float(got[w, row, column])) == total
        differs |= float(total) != float(
            np.float32((a[w, row].astype(float) * b[w, :, column]).sum() + c[w, row, column])
        )
    assert differs
