"""Following a warp through machine code: small listings by hand, with numbers that Python computes."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from benchmarks.kernels.walk import PARAMETERS, Walk, WalkError, products

FIRST = PARAMETERS[90]


def listing(*code: str) -> list[str]:
    return [t if t.startswith(".") else f"        /*{i:04x}*/    {t} ;" for i, t in enumerate(code)]


def walked(*code: str, arguments: tuple[Any, ...] = (), sizes: tuple[int, ...] = ()) -> Walk:
    return Walk(listing(*code, "EXIT"), 90, sizes, arguments, (3, 1), (5, 2)).run()


def register(walk: Walk, name: str) -> list[int] | None:
    value, known = walk._registers[name]
    return value.tolist() if known.all() else None


def one(walk: Walk, name: str) -> int | None:
    values = register(walk, name)
    return None if values is None else values[0]


def argument(n: int) -> str:
    return f"c[0x0][{FIRST + 4 * n:#x}]"


def test_loops_turn_as_often_as_arguments_say() -> None:
    code = (f"MOV R1, {argument(0)}", ".L_x_1:", "HMMA.16816.F32.BF16 R4, R8, R10, R4", "VIADD R1, R1, 0xffffffff",
            "ISETP.GT.AND P0, PT, R1, RZ, PT", "@P0 BRA `(.L_x_1)")  # fmt: skip
    for turns in (1, 5):
        found = walked(*code, arguments=(turns,), sizes=(4,)).executed
        assert found["HMMA.16816.F32.BF16"] == turns
        assert sum(found.values()) == 1 + 4 * turns + 1
        assert products(found) == turns * 16 * 8 * 16


def test_a_branch_on_what_is_unknown_is_not_taken() -> None:
    """Code that it may skip counts, and a loop turns once."""
    found = walked(
        "MUFU.EX2 R1, R2", ".L_x_1:", "FADD R3, R3, R1", "FSETP.GT.AND P0, PT, R1, R3, PT", "@P0 BRA `(.L_x_1)",
        "@!P0 BRA `(.L_x_2)", "FMUL R1, R1, R1", ".L_x_2:", "FADD R1, R1, R1",
    ).executed  # fmt: skip
    assert sum(found.values()) == 1 + 3 + 1 + 1 + 1 + 1
    assert found["FMUL"] == 1


def test_the_one_branch_onwards_that_is_unknown_can_be_taken() -> None:
    """Both ways differ by what lies between. With two such branches nobody says which one is meant."""
    code = ("LDS R1, [R2]", "ISETP.NE.AND P0, PT, R1, RZ, PT", "@!P0 EXIT", "FADD R3, R3, R1", "FADD R3, R3, R1")

    def executed(*more: str, skip: bool) -> int:
        return sum(Walk(listing(*code, *more, "EXIT"), 90, (), (), (0,), (1,), skip=skip).run().executed.values())

    assert executed(skip=False) == 6
    assert executed(skip=True) == 3
    other = ("@P1 BRA `(.L_x_1)", "FMUL R1, R1, R1", ".L_x_1:", "FADD R1, R1, R1")
    assert executed(*other, skip=False) == 9
    with pytest.raises(WalkError, match="not the only branch"):
        Walk(listing(*other, *code, "EXIT"), 90, (), (), (0,), (1,), skip=True).run()


def test_threads_that_part_meet_again() -> None:
    """What some of them do is executed once for all of them."""
    code = ("S2R R1, SR_TID.X", "ISETP.LT.AND P0, PT, R1, 0x8, PT", "@P0 BRA `(.L_x_1)", "VIADD R2, R1, 0x64",
            "BRA `(.L_x_2)", ".L_x_1:", "VIADD R2, R1, 0x1", ".L_x_2:", "VIADD R3, R2, 0x1")  # fmt: skip
    walk = walked(*code)
    assert register(walk, "R3") == [n + 2 if n < 8 else n + 101 for n in range(32)]
    assert sum(walk.executed.values()) == 8
    # All threads go the same way where they agree.
    skipped = walked(*(line.replace("0x8", "0x80") for line in code))
    assert sum(skipped.executed.values()) == 6


def test_memory_and_addresses() -> None:
    table = np.arange(100, 140, dtype=np.int32)
    walk = walked(
        "S2R R0, SR_TID.X", f"LDC.64 R2, {argument(0)}", "IMAD.WIDE R4, R0, 0x4, R2", "LDG.E R6, desc[UR4][R4.64+0x8]",
        f"LEA R8, P0, R0, {argument(0)}, 0x2", f"LEA.HI.X R9, R0, {argument(1)}, RZ, 0x2, P0",
        "LDG.E.64 R10, [R8.64]", "LDG.E R12, [R2.64+0x400]",
        arguments=(table,), sizes=(8,),
    )  # fmt: skip
    assert register(walk, "R6") == [102 + n for n in range(32)]
    assert register(walk, "R10") == [100 + n for n in range(32)]
    assert register(walk, "R11") == [101 + n for n in range(32)]
    assert register(walk, "R12") is None  # beyond the tensor


@pytest.mark.parametrize(("a", "b"), [(17, 5), (-17, 5), (2**31 - 1, -3), (-1, -1)])
def test_arithmetic(a: int, b: int) -> None:
    mask = 2**32 - 1
    walk = walked(
        f"MOV R0, {argument(0)}", f"MOV R1, {argument(1)}", "IMAD R2, R0, R1, 0x7", "IMAD.WIDE R4, R0, R1, RZ",
        "IMAD.HI.U32 R6, R0, R1, RZ", "IADD3 R7, P0, R0, R1, RZ", "IADD3.X R8, R9, R10, RZ, P0, !PT",
        "SHF.R.S32.HI R11, RZ, 0x3, R0", "SHF.R.U32.HI R12, RZ, 0x3, R0", "SHF.L.U64.HI R13, R0, 0x4, R1",
        "LOP3.LUT R14, R0, 0xf0, R1, 0xf8, !PT", "VIMNMX R15, R0, R1, PT", "VIMNMX.U32 R16, R0, R1, !PT",
        "IABS R17, R0", "LEA.HI.X.SX32 R18, R0, R1, 0x2, P0", "PRMT R19, R0, 0x5410, R1", "SGXT R20, R0, 0x4",
        "IADD3 R21, P1, R0, -R1, RZ", "ISETP.GE.U32.AND P2, PT, R0, R1, PT", "SEL R22, R0, R1, P2",
        arguments=(a & mask, b & mask), sizes=(4, 4),
    )  # fmt: skip
    ua, ub = a & mask, b & mask
    carry = ua + ub >> 32
    assert walk._predicates["P0"][0][0] == carry
    assert walk._predicates["P1"][0][0] == (ua >= ub)
    expected = {
        "R2": a * b + 7, "R4": a * b, "R5": a * b >> 32, "R6": ua * ub >> 32, "R7": a + b, "R11": a >> 3,
        "R12": ua >> 3, "R13": (ub << 32 | ua) << 4 >> 32, "R14": ua | (0xF0 & ub), "R15": min(a, b),
        "R16": max(ua, ub), "R17": abs(a), "R18": (a << 2 >> 32) + b + carry, "R19": ua & 0xFFFF | ub << 16,
        "R20": (a & 15) - 16 * (a >> 3 & 1), "R21": a - b, "R22": ua if ua >= ub else ub,
    }  # fmt: skip
    assert {name: one(walk, name) for name in expected} == {name: v & mask for name, v in expected.items()}
    assert one(walk, "R8") is None  # of registers that nothing wrote


def test_what_half_of_the_inputs_decides_is_known() -> None:
    walk = walked("LOP3.LUT R1, R9, 0x0, RZ, 0xc0, !PT", "ISETP.NE.AND P0, PT, RZ, RZ, PT",
                  "ISETP.GT.AND P1, PT, R9, RZ, P0")  # fmt: skip
    assert one(walk, "R1") == 0
    assert walk._predicates["P1"][1].all()
    assert not walk._predicates["P1"][0].any()


def test_products_of_a_warp() -> None:
    assert products(Counter({"HGMMA.64x32x16.F32.BF16": 3, "HMMA.1688.F32": 2})) == 3 * 16 * 32 * 16 + 2 * 16 * 8 * 8
