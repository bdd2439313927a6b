"""Branches, barriers, exchanges within a warp, the order of programs, and the parser."""

import pytest
import torch

from ptx_machine.faults import PtxError, UnknownInstructionError
from ptx_machine.parser import Address, Constant, Register, Symbol, Vector, parse
from snippets import load, results, run, store, text_of

WORDS = [(i * 2654435761) & 0xFFFFFFFF for i in range(64)]


def test_threads_that_part_meet_again() -> None:
    """Each thread runs a loop its own number of times; behind it all exchange."""
    out = torch.zeros(64, dtype=torch.int32)
    body = f"""mov.u32 %r0, %tid.x; mov.b32 %r1, 0; mov.b32 %r9, 0;
    $LOOP: setp.ge.s32 %p0, %r1, %r0; @%p0 bra $DONE; add.s32 %r9, %r9, %r1; add.s32 %r1, %r1, 1; bra.uni $LOOP;
    $DONE: and.b32 %r2, %r0, 1; setp.eq.s32 %p1, %r2, 0; @!%p1 bra $ODD; add.s32 %r9, %r9, 1000; bra $BOTH;
    $ODD: add.s32 %r9, %r9, 2000;
    $BOTH: shfl.sync.bfly.b32 %r9, %r9, 1, 31, -1; {store(9, 0)}"""
    run(body, [out], 64)
    assert out.tolist() == [(t ^ 1) * ((t ^ 1) - 1) // 2 + (2000 if (t ^ 1) % 2 else 1000) for t in range(64)]


def test_threads_that_return_are_not_waited_for() -> None:
    out = torch.zeros(64, dtype=torch.int32)
    body = f"""mov.u32 %r0, %tid.x; setp.lt.s32 %p0, %r0, 32; @%p0 ret; bar.sync 0; mov.b32 %r9, 1; {store(9, 0)}"""
    run(body, [out], 64)
    assert out.tolist() == [0] * 32 + [1] * 32


def test_a_warps_barrier_without_the_whole_warp() -> None:
    body = """mov.u32 %r0, %tid.x; setp.lt.s32 %p0, %r0, 16; @%p0 bra $A; bar.warp.sync -1; $A: bar.sync 0;"""
    with pytest.raises(PtxError, match="part of a warp"):
        run(body, [])


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize(("by", "bound"), [(1, 31), (1, 0), (5, 31), (2, 0x1C1F), (3, 0x1003), (16, 31)])
def test_shfl(mode: str, by: int, bound: int) -> None:
    """The manual's rule, lane by lane."""
    got = results(f"shfl.sync.{mode}.b32 %r9, %r0, {by}, {bound:#x}, -1;", ("b32", WORDS))
    clamp, mask = bound & 31, bound >> 8 & 31
    for thread, value in enumerate(got):
        lane = thread % 32
        last, first = lane & mask | clamp & (~mask & 31), lane & mask
        if mode == "up":
            other = lane - by
            inside = other >= last
        elif mode == "down":
            other = lane + by
            inside = other <= last
        elif mode == "bfly":
            other = lane ^ by
            inside = other <= last
        else:
            other = first | by & ~mask & 31
            inside = other <= last
        assert value == WORDS[thread - lane + (other if inside else lane)]


def test_redux() -> None:
    got = results("redux.sync.add.s32 %r9, %r0, -1;", ("b32", WORDS))
    assert got == [sum(WORDS[w : w + 32]) & 0xFFFFFFFF for w in (0, 32) for _ in range(32)]


def test_vote() -> None:
    got = results("setp.lt.u32 %p0, %r0, 1000; vote.sync.ballot.b32 %r9, %p0, -1;", ("b32", WORDS))
    want = [sum((WORDS[w + lane] < 1000) << lane for lane in range(32)) for w in (0, 32)]
    assert got == [want[0]] * 32 + [want[1]] * 32
    assert any(want)


def test_exchanges_by_a_part_of_a_warp() -> None:
    for text in (
        "vote.sync.ballot.b32 %r9, %p0, -1;",
        "shfl.sync.bfly.b32 %r9, %r0, 1, 31, -1;",
        "redux.sync.add.s32 %r9, %r0, -1;",
    ):
        with pytest.raises(PtxError, match="part of a warp"):
            run(f"mov.u32 %r0, %tid.x; setp.lt.s32 %p0, %r0, 5; @%p0 {text}", [])


def test_atomics_give_everyone_another_number() -> None:
    counter, out = torch.tensor([5], dtype=torch.int32), torch.zeros(96, dtype=torch.int32)
    body = """ld.param.b64 %rd0, [p0]; ld.param.b64 %rd1, [p1]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x;
    mov.b32 %r2, 2;
    atom.global.gpu.acq_rel.add.u32 %r3, [ %rd0 + 0 ], %r2; mul.lo.s32 %r4, %r1, 32; add.s32 %r4, %r4, %r0;
    mad.wide.u32 %rd2, %r4, 4, %rd1; st.global.b32 [ %rd2 + 0 ], { %r3 };"""
    orders = set()
    for seed in range(8):
        counter.fill_(5)
        run(body, [counter, out], grid=(3, 1, 1), seed=seed, together=3)
        assert sorted(out.tolist()) == list(range(5, 5 + 2 * 96, 2))
        assert counter.tolist() == [5 + 2 * 96]
        orders.add(tuple(out.tolist()[::32]))
    assert len(orders) > 2


def test_places_in_the_grid() -> None:
    out = torch.zeros(24, dtype=torch.int32)
    body = """ld.param.b64 %rd0, [p0]; mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ctaid.y; mov.u32 %r2, %ctaid.z;
    mov.u32 %r3, %nctaid.x;
    mov.u32 %r4, %nctaid.y; mov.u32 %r8, %tid.x; mad.lo.s32 %r5, %r2, %r4, %r1; mad.lo.s32 %r5, %r5, %r3, %r0;
    mul.lo.s32 %r6, %r2, 100; mad.lo.s32 %r6, %r1, 10, %r6; add.s32 %r6, %r6, %r0;
    mad.wide.u32 %rd1, %r5, 4, %rd0; setp.eq.s32 %p0, %r8, 0; @%p0 st.global.b32 [ %rd1 + 0 ], { %r6 };"""
    run(body, [out], grid=(2, 3, 4), together=5)
    assert out.tolist() == [100 * z + 10 * y + x for z in range(4) for y in range(3) for x in range(2)]


def test_parser() -> None:
    kernel = parse(text_of("""// begin inline asm
    {
    .reg .b32 t<2>;
    mov.b32 t1, 0f3F800000; add.s32 %r1, t1, -0x10U;
    }
    $L__BB0_1:                              // a comment
    .loc 1 216 26                        // gemm.py:216:26
    @!%p1 ld.global.v2.b32 { %r2, %r3 }, [ %rd1 + -8 ];
    .pragma "nounroll";
    ld.shared.b32 %r4, [memory+12];""", 2, 128))  # fmt: skip
    one, two, three, four, last = kernel.code
    assert one.operands == (Register("t1@1"), Constant(0x3F800000))
    assert two.operands == (Register("%r1"), Register("t1@1"), Constant(-16))
    assert three.opcode == ("ld", "global", "v2", "b32")
    assert three.guard == (Register("%p1"), True)
    assert three.operands == (Vector((Register("%r2"), Register("%r3"))), Address(Register("%rd1"), -8))
    assert three.place == "gemm.py:216:26"
    assert four.operands[1] == Address(Symbol("memory"), 12)
    assert last.opcode == ("ret",)
    assert kernel.labels == {"$L__BB0_1": 2}
    assert (kernel.threads, kernel.parameters, kernel.shared) == (128, ["p0", "p1"], "memory")
    assert kernel.registers["t1@1"] == "b32"


def test_what_the_parser_does_not_know_is_an_error() -> None:
    for text in (".local .b8 x[4];", "mov.b32 %r0, (%r1);", "add.s32 %r0 %r1"):
        with pytest.raises(UnknownInstructionError):
            run(text, [])
    with pytest.raises(UnknownInstructionError, match="no entry"):
        parse(".version 8.7\n")


def test_an_instruction_at_fault_is_named() -> None:
    with pytest.raises(PtxError, match=r"snippet: .*\n  at ld\.shared\.b32 %r0, \[%r1\]\n  of gemm\.py:7"):
        run(".loc	1 7 2  // gemm.py:7\nmov.b32 %r1, 0; ld.shared.b32 %r0, [%r1];", [], shared=16)


def test_loads_of_a_thread() -> None:
    """`snippets.load` itself: numbers that lie side by side."""
    a, out = torch.arange(64, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    run(load(0, 0, count=2) + "\nsub.s32 %r9, %r1, %r0;" + store(9, 1), [a, out])
    assert out.tolist() == [1] * 32
