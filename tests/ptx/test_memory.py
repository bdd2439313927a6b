"""Memory: bounds, alignment, races, copies that are waited for, and what one program may know of another."""

import pytest
import torch

from ptx_machine.faults import PtxError
from snippets import load, run, store

THREADS = "mov.u32 %r30, %tid.x; mul.lo.s32 %r31, %r30, 4; mov.b32 %r32, memory; add.s32 %r32, %r31, %r32;"


def words(n: int, value: int | None = None) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32) if value is None else torch.full((n,), value, dtype=torch.int32)


def test_what_lies_within_a_tensor_is_read_and_written() -> None:
    a, out = words(128), words(128, 0)
    run(load(0, 0, count=4) + store(0, 1, count=4), [a, out])
    assert torch.equal(a, out)


@pytest.mark.parametrize("size", [127, 124])
def test_bounds(size: int) -> None:
    for tensors, body in (
        ([words(size), words(128)], load(0, 0, count=4)),
        ([words(128), words(size)], store(0, 1, count=4)),
    ):
        with pytest.raises(PtxError, match=rf"of p\d \[{size}\] int32, which has {4 * size}"):
            run(body, tensors)


def test_nothing_lies_before_a_tensor_or_where_no_tensor_is() -> None:
    with pytest.raises(PtxError, match="4 bytes at -4 of p0"):
        run("ld.param.b64 %rd0, [p0]; ld.global.b32 { %r0 }, [ %rd0 + -4 ];", [words(4)])
    with pytest.raises(PtxError, match="of no tensor"):
        run("mov.b64 %rd0, 64; ld.global.b32 { %r0 }, [ %rd0 + 0 ];", [words(4)])
    with pytest.raises(PtxError, match="of no tensor"):
        run("ld.global.b32 { %r0 }, [ %rd0 + 0 ];", [words(4)])  # a register that nobody wrote


def test_vectors_are_aligned_and_tensors_to_no_more_than_16_bytes() -> None:
    body = "ld.param.b64 %rd0, [p0]; ld.global.v4.b32 { %r0, %r1, %r2, %r3 }, [ %rd0 + %s ];"
    run(body.replace("%s", "16"), [words(8)])
    for offset, tensor in (("8", words(8)), ("0", words(9)[1:])):
        with pytest.raises(PtxError, match="not aligned"):
            run(body.replace("%s", offset), [tensor])
    run(
        "ld.param.b64 %rd0, [p0]; cvt.u32.u64 %r0, %rd0; and.b32 %r9, %r0, 31;" + store(9, 1),
        [words(4), out := words(32)],
    )
    assert set(out.tolist()) == {16}


def test_shared_memory_has_bounds_and_alignment() -> None:
    with pytest.raises(PtxError, match="4 bytes at 128 of 128 in shared memory"):
        run(f"{THREADS} st.shared.b32 [%r32+4], %r30;", [], shared=128)
    with pytest.raises(PtxError, match="not aligned"):
        run(f"{THREADS} st.shared.v2.b32 [%r32], {{%r30, %r30}};", [], shared=256)


def test_shared_memory_that_nobody_wrote() -> None:
    with pytest.raises(PtxError, match="nobody has written"):
        run(f"{THREADS} ld.shared.b32 %r0, [%r32];", [], shared=128)


REVERSED = "xor.b32 %r33, %r30, {mask}; mul.lo.s32 %r33, %r33, 4; mov.b32 %r34, memory; add.s32 %r33, %r33, %r34;"


@pytest.mark.parametrize(("mask", "barrier", "races"), [
    (0, "", False), (1, "", True), (1, "bar.warp.sync -1;", False), (32, "bar.warp.sync -1;", True),
    (33, "bar.sync 0;", False),
])  # fmt: skip
def test_races_between_a_write_and_a_read(mask: int, barrier: str, races: bool) -> None:
    """Thread t reads what thread t xor mask wrote."""
    out = words(64, 0)
    body = f"{THREADS} {REVERSED.format(mask=mask)} st.shared.b32 [%r32], %r30; {barrier} ld.shared.b32 %r9, [%r33];"
    if races:
        with pytest.raises(PtxError, match="no barrier between"):
            run(body, [], 64, 256)
    else:
        run(body + store(9, 0), [out], 64, 256)
        assert out.tolist() == [t ^ mask for t in range(64)]


@pytest.mark.parametrize(("first", "second"), [("ld", "st"), ("st", "st")])
@pytest.mark.parametrize("barrier", ["", "bar.sync 0;"])
def test_races_with_a_write_that_comes_later(first: str, second: str, barrier: str) -> None:
    ops = {"ld": "ld.shared.b32 %r9, [%r33];", "st": "st.shared.b32 [%r33], %r30;"}
    body = f"""{THREADS} {REVERSED.format(mask=32)} st.shared.b32 [%r32], %r30; bar.sync 0; {ops[first]} {barrier}
    add.s32 %r30, %r30, 1; {ops["st"].replace("%r33", "%r32")}"""
    if barrier:
        run(body, [], 64, 256)
    else:
        with pytest.raises(PtxError, match="overwrites shared memory"):
            run(body, [], 64, 256)


def test_two_threads_may_write_the_same_value_only() -> None:
    one = "mov.b32 %r32, memory; st.shared.b32 [%r32], {value}; ld.param.b64 %rd0, [p0]; "
    one += "st.global.b32 [ %rd0 + 0 ], {{ {value} }};"
    run("mov.b32 %r1, 5; " + one.format(value="%r1"), [words(1)], shared=16)
    for part in (0, 1):
        piece = one.format(value="%r30").replace(
            "st.global" if part else "st.shared", "@%p0 st." + ("global" if part else "shared")
        )
        with pytest.raises(PtxError, match="different values"):
            run("mov.pred %p0, 0; mov.u32 %r30, %tid.x; " + piece, [words(1)], shared=16)


def copies(wait: str, barrier: str = "bar.sync 0;", read: int = 0, size: str = "16") -> str:
    """Two groups of copies of 16 bytes for each thread; then one of them is read."""
    return f"""mov.u32 %r30, %tid.x; mul.lo.s32 %r31, %r30, 16; mov.b32 %r32, memory; add.s32 %r32, %r31, %r32;
    ld.param.b64 %rd0, [p0]; mad.wide.u32 %rd1, %r30, 16, %rd0; mov.b32 %r40, {size};
    cp.async.cg.shared.global [ %r32 + 0 ], [ %rd1 + 0 ], 0x10, %r40; cp.async.commit_group;
    cp.async.cg.shared.global [ %r32 + 512 ], [ %rd1 + 512 ], 0x10; cp.async.commit_group;
    {wait} {barrier} xor.b32 %r31, %r31, 16; mov.b32 %r33, memory; add.s32 %r33, %r33, %r31;
    ld.shared.v4.b32 {{%r0, %r1, %r2, %r3}}, [%r33+{read}]; {store(0, 1, count=4)}"""


def test_copies_arrive_when_they_are_waited_for() -> None:
    a, out = words(256), words(128, -1)
    want = a.reshape(2, 16, 2, 4).flip(2).reshape(2, 128)
    run(copies("cp.async.wait_group 1;"), [a, out], shared=1024)
    assert torch.equal(out, want[0])
    run(copies("cp.async.wait_group 0;", read=512), [a, out], shared=1024)
    assert torch.equal(out, want[1])
    run(copies("cp.async.wait_group 0;", size="0"), [a, out], shared=1024)
    assert not out.any()
    for wait, read in (("", 0), ("cp.async.wait_group 2;", 0), ("cp.async.wait_group 1;", 512)):
        with pytest.raises(PtxError, match="was not waited for"):
            run(copies(wait, read=read), [a, out], shared=1024)
    with pytest.raises(PtxError, match="no barrier between"):
        run(copies("cp.async.wait_group 0;", barrier=""), [a, out], shared=1024)


def test_copies_do_not_overwrite_what_others_still_read() -> None:
    again = "cp.async.cg.shared.global [ %r32 + 0 ], [ %rd1 + 512 ], 0x10;"
    body = copies("cp.async.wait_group 0;")
    run(body + "bar.sync 0;" + again, [words(256), words(128)], shared=1024)
    with pytest.raises(PtxError, match="overwrites shared memory that others read"):
        run(body + again, [words(256), words(128)], shared=1024)


def test_copies_have_bounds_and_zeros_have_none() -> None:
    with pytest.raises(PtxError, match="of p0"):
        run(copies("cp.async.wait_group 0;"), [words(128), words(128)], shared=1024)
    body = copies("cp.async.wait_group 1;", size="0").replace("%rd1 + 512 ], 0x10", "%rd1 + 512 ], 0x10, %r40")
    run(body, [words(4), words(128)], shared=1024)


COUNTED = """ld.param.b64 %rd0, [p0]; ld.param.b64 %rd1, [p1]; ld.param.b64 %rd2, [p2];
mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x;
mul.lo.s32 %r2, %r1, 32; add.s32 %r3, %r2, %r0; mad.wide.u32 %rd3, %r3, 4, %rd0; st.global.b32 [ %rd3 + 0 ], {{ %r3 }};
{before} setp.eq.s32 %p0, %r0, 0; mov.b32 %r5, 1;
@%p0 atom.global.gpu.{order}.add.u32 %r4, [ %rd1 + 0 ], %r5;
mov.b32 %r6, memory; @%p0 st.shared.b32 [%r6], %r4; bar.sync 0; ld.shared.b32 %r7, [%r6];
setp.ne.s32 %p1, %r7, 3; @%p1 bra $END;
xor.b32 %r8, %r0, 31; mul.wide.u32 %rd4, %r8, 4; add.s64 %rd4, %rd4, %rd0;
ld.global.b32 {{ %r10 }}, [ %rd4 + 0 ]; ld.global.b32 {{ %r11 }}, [ %rd4 + 128 ];
ld.global.b32 {{ %r12 }}, [ %rd4 + 256 ]; ld.global.b32 {{ %r13 }}, [ %rd4 + 384 ];
add.s32 %r9, %r10, %r11; add.s32 %r9, %r9, %r12; add.s32 %r9, %r9, %r13;
mad.wide.u32 %rd5, %r0, 4, %rd2; st.global.b32 [ %rd5 + 0 ], {{ %r9 }};
$END:
"""
"""Four programs write 32 words each; the last one to count adds them all up."""


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("together", [1, 4])
def test_the_last_program_may_read_what_the_others_released(seed: int, together: int) -> None:
    tensors = [words(128, -1), words(1, 0), words(32, -1)]
    run(COUNTED.format(before="bar.sync 0;", order="acq_rel"), tensors, 32, 16, (4, 1, 1), seed, together)
    assert tensors[2].tolist() == [4 * (31 - t) + 32 * 6 for t in range(32)]
    assert tensors[1].tolist() == [4]


@pytest.mark.parametrize(("before", "order"), [
    ("", "acq_rel"), ("bar.sync 0;", "relaxed"), ("bar.sync 0;", "release"), ("bar.sync 0;", "acquire"),
])  # fmt: skip
@pytest.mark.parametrize("together", [1, 4])
def test_what_is_not_released_or_not_acquired_may_not_be_read(before: str, order: str, together: int) -> None:
    with pytest.raises(PtxError, match="nothing that orders"):
        run(
            COUNTED.format(before=before, order=order),
            [words(128), words(1, 0), words(32)],
            32,
            16,
            (4, 1, 1),
            0,
            together,
        )


def test_programs_do_not_write_to_one_place() -> None:
    body = "mov.u32 %r0, %ctaid.x; ld.param.b64 %rd0, [p0]; st.global.b32 [ %rd0 + 0 ], { %r0 };"
    with pytest.raises(PtxError, match=r"different values|nothing that orders"):
        run(body, [words(1, 7)], grid=(2, 1, 1))
    run(body.replace("%ctaid.x", "%nctaid.x"), [out := words(1, 7)], grid=(2, 1, 1))
    assert out.tolist() == [2]


def test_threads_of_a_program_need_a_barrier_in_global_memory_too() -> None:
    body = f"""mov.u32 %r30, %tid.x; {store(30, 0)} %s ld.param.b64 %rd0, [p0]; xor.b32 %r31, %r30, 1;
    mad.wide.u32 %rd1, %r31, 4, %rd0; ld.global.b32 {{ %r9 }}, [ %rd1 + 0 ]; {store(9, 1)}"""
    run(body.replace("%s", "bar.sync 0;"), [words(32, 0), out := words(32)])
    assert out.tolist() == [t ^ 1 for t in range(32)]
    with pytest.raises(PtxError, match="nothing that orders"):
        run(body.replace("%s", ""), [words(32, 0), words(32)])


@pytest.mark.parametrize(("before", "behind"), [("", "bar.sync 0;"), ("bar.sync 0;", "")])
def test_atomics_in_shared_memory_meet_without_a_barrier(before: str, behind: str) -> None:
    """Two warps add up. The first number needs a barrier behind it, and so does the last sum."""
    out = torch.zeros(64, dtype=torch.int32)

    def body(before: str, behind: str) -> str:
        return f"""mov.u32 %r0, %tid.x; mov.u32 %r1, memory; setp.eq.u32 %p0, %r0, 0;
        @%p0 st.shared.b32 [%r1], 0; {before}
        atom.shared.add.u32 %r2, [%r1], %r0; {behind} ld.shared.b32 %r9, [%r1]; {store(9, 0)}"""

    run(body("bar.sync 0;", "bar.sync 0;"), [out], 64, 16)
    assert out.tolist() == [sum(range(64))] * 64
    with pytest.raises(PtxError, match="no barrier"):
        run(body(before, behind), [out], 64, 16)


def test_a_prefetch_reads_nothing_but_needs_an_address() -> None:
    numbers = torch.zeros(4, dtype=torch.int32)
    run("ld.param.b64 %rd0, [p0]; prefetch.global.L2 [%rd0 + 12];", [numbers])
    with pytest.raises(PtxError, match="bytes at"):
        run("ld.param.b64 %rd0, [p0]; prefetch.global.L2 [%rd0 + 16];", [numbers])
