"""Arithmetic, logic and conversions, one number at a time, against integers and fractions of Python."""

import itertools
import math
import random
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from ptx_machine.faults import UnknownInstructionError
from snippets import results, run

RANDOM = random.Random(0)
WORDS = [0, 1, 2, 5, 31, 32, 33, 255, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xDEADBEEF]
WORDS += [RANDOM.getrandbits(32) for _ in range(40)]
OTHERS = [RANDOM.choice(WORDS) for _ in WORDS]
AMOUNTS = [RANDOM.choice([0, 1, 4, 7, 16, 31, 32, 33, 63, 200]) for _ in WORDS]
LONG = [RANDOM.getrandbits(64) for _ in WORDS]
FLOATS = [0.0, -0.0, 1.0, -1.5, 3.0e38, -3.0e38, 1e-40, math.inf, -math.inf, math.nan, 65504.0, 65520.0, 1 / 3]
FLOATS += [RANDOM.gauss(0, 10.0 ** RANDOM.randint(-8, 8)) for _ in range(60)]


def signed(v: int, bits: int = 32) -> int:
    v &= (1 << bits) - 1
    return v - (v >> bits - 1 << bits)


def bits_of(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


def float_of(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def nearest(x: Fraction, mantissa: int, smallest: int) -> Fraction:
    """The number of that many bits nearest to x, ties to even; `smallest`: exponent of the last bit at most."""
    if not x:
        return x
    exponent = math.floor(math.log2(abs(x)))
    exponent += (abs(x) >= Fraction(2) ** (exponent + 1)) - (abs(x) < Fraction(2) ** exponent)
    unit = Fraction(2) ** max(exponent - mantissa + 1, smallest)
    return round(x / unit) * unit  # Python rounds halves to even


def truncated(a: int, b: int) -> int:
    """a / b, toward zero."""
    return int(Fraction(a, b))


@pytest.mark.parametrize(
    ("opcode", "rule"),
    [
        ("add.s32", lambda a, b: a + b),
        ("sub.s32", lambda a, b: a - b),
        ("mul.lo.s32", lambda a, b: a * b),
        ("mul.hi.u32", lambda a, b: a * b >> 32),
        ("mul.hi.s32", lambda a, b: signed(a) * signed(b) >> 32),
        ("div.s32", lambda a, b: truncated(signed(a), signed(b))),
        ("rem.s32", lambda a, b: signed(a) - truncated(signed(a), signed(b)) * signed(b)),
        ("min.s32", lambda a, b: min(signed(a), signed(b))),
        ("max.s32", lambda a, b: max(signed(a), signed(b))),
        ("and.b32", lambda a, b: a & b),
        ("or.b32", lambda a, b: a | b),
        ("xor.b32", lambda a, b: a ^ b),
    ],
)
def test_integers(opcode: str, rule: Callable[[int, int], int]) -> None:
    pairs = [(a, b) for a, b in zip(WORDS, OTHERS, strict=True) if b or opcode[:3] not in ("div", "rem")]
    got = results(f"{opcode} %r9, %r0, %r1;", *(("b32", one) for one in zip(*pairs, strict=True)))
    assert got == [rule(a, b) & 0xFFFFFFFF for a, b in pairs]


@pytest.mark.parametrize(
    ("opcode", "rule"),
    [
        ("mul.wide.s32", lambda a, b, c: signed(a) * signed(b)),
        ("mul.wide.u32", lambda a, b, c: a * b),
        ("mad.wide.s32", lambda a, b, c: signed(a) * signed(b) + c),
        ("mad.wide.u32", lambda a, b, c: a * b + c),
    ],
)
def test_wide_products(opcode: str, rule: Callable[[int, int, int], int]) -> None:
    third = ", %rd2" if opcode.startswith("mad") else ""
    got = results(f"{opcode} %rd9, %r0, %r1{third};", ("b32", WORDS), ("b32", OTHERS), ("b64", LONG), out="b64")
    assert got == [rule(*v) & (1 << 64) - 1 for v in zip(WORDS, OTHERS, LONG, strict=True)]


@pytest.mark.parametrize("kind", ["u16", "s16"])
def test_wide_products_of_16_bits(kind: str) -> None:
    halves = [([w & 0xFFFF for w in words]) for words in (WORDS, OTHERS)]
    got = results(f"mad.wide.{kind} %r9, %rs0, %rs1, %r2;", *(("b16", one) for one in halves), ("b32", OTHERS))

    def number(half: int) -> int:
        return half - (1 << 16) * (half >> 15) if kind == "s16" else half

    expected = [number(a) * number(b) + c for a, b, c in zip(*halves, OTHERS, strict=True)]
    assert got == [v & 0xFFFFFFFF for v in expected]


def test_long_integers() -> None:
    other = LONG[1:] + LONG[:1]
    for opcode, rule in {
        "add.s64 %rd9, %rd0, %rd1": lambda a, b: a + b,
        "mul.lo.s64 %rd9, %rd0, %rd1": lambda a, b: a * b,
        "mad.lo.s64 %rd9, %rd0, %rd1, %rd1": lambda a, b: a * b + b,
        "or.b64 %rd9, %rd0, %rd1": lambda a, b: a | b,
        "and.b64 %rd9, %rd0, %rd1": lambda a, b: a & b,
        "shr.u64 %rd9, %rd0, 3": lambda a, b: a >> 3,
        "shl.b64 %rd9, %rd0, 63": lambda a, b: a << 63,
    }.items():
        got = results(f"{opcode};", ("b64", LONG), ("b64", other), out="b64")
        assert got == [rule(a, b) & (1 << 64) - 1 for a, b in zip(LONG, other, strict=True)], opcode


@pytest.mark.parametrize("opcode", ["shl.b32", "shr.u32", "shr.s32"])
def test_shifts_by_more_than_there_is(opcode: str) -> None:
    got = results(f"{opcode} %r9, %r0, %r1;", ("b32", WORDS), ("b32", AMOUNTS))
    rule = {"shl.b32": lambda a, n: a << n, "shr.u32": lambda a, n: a >> n, "shr.s32": lambda a, n: signed(a) >> n}
    assert got == [rule[opcode](a, n) & 0xFFFFFFFF for a, n in zip(WORDS, AMOUNTS, strict=True)]


def test_short_integers() -> None:
    short = [w & 0xFFFF for w in WORDS]
    for opcode, rule in {"shl.b16": lambda a: a << 2, "shr.u16": lambda a: a >> 2, "and.b16": lambda a: a & 2}.items():
        got = results(f"{opcode} %rs9, %rs0, 2;", ("b16", short), out="b16")
        assert got == [rule(a) & 0xFFFF for a in short]


def test_funnel_shift() -> None:
    """shf.l.wrap: bits 63 to 32 of (b << 32 | a) << (c mod 32)."""
    got = results("shf.l.wrap.b32 %r9, %r0, %r1, %r2;", ("b32", WORDS), ("b32", OTHERS), ("b32", AMOUNTS))
    assert got == [((b << 32 | a) << n % 32 >> 32) & 0xFFFFFFFF for a, b, n in zip(WORDS, OTHERS, AMOUNTS, strict=True)]


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_bit_fields(kind: str) -> None:
    """bfe: the manual's loop over bits."""
    lengths = [RANDOM.choice([0, 1, 3, 8, 31, 32, 40]) for _ in WORDS]
    got = results(f"bfe.{kind} %r9, %r0, %r1, %r2;", ("b32", WORDS), ("b32", AMOUNTS), ("b32", lengths))
    want = []
    for a, position, length in zip(WORDS, AMOUNTS, lengths, strict=True):
        filler = a >> min(position + length - 1, 31) & 1 if kind == "s32" and length else 0
        bits = [a >> position + i & 1 if i < length and position + i <= 31 else filler for i in range(32)]
        want.append(sum(b << i for i, b in enumerate(bits)))
    assert got == want


def test_lop3_by_its_truth_table() -> None:
    """Bit 4 a + 2 b + c of the table is the result for bits a, b, c."""
    a, b, c = 0b11110000, 0b11001100, 0b10101010
    for table in range(256):
        (got,) = results(f"lop3.b32 %r9, %r0, %r1, %r2, {table:#x};", ("b32", [a]), ("b32", [b]), ("b32", [c]))
        assert got & 0xFF == table
        assert got >> 8 == (0xFFFFFF if table & 1 else 0)


def test_prmt_by_bytes() -> None:
    a, b = 0x83127FA5, 0xC4B69900
    values = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    selectors = [
        0x3210,
        0x4140,
        0x4342,
        0x7632,
        0x9991,
        0x0123,
        0xFEDC,
        0x8888,
        *(RANDOM.getrandbits(16) for _ in range(99)),
    ]
    n = len(selectors)
    got = results("prmt.b32 %r9, %r0, %r1, %r2;", ("b32", [a] * n), ("b32", [b] * n), ("b32", selectors))
    for select, word in zip(selectors, got, strict=True):
        for i, byte in enumerate(word.to_bytes(4, "little")):
            nibble = select >> 4 * i & 15
            value = values[nibble & 7]
            assert byte == ((255 if value > 127 else 0) if nibble & 8 else value)


def test_counts_and_choices() -> None:
    assert results("popc.b32 %r9, %r0;", ("b32", WORDS)) == [w.bit_count() for w in WORDS]
    assert results("popc.b64 %r9, %rd0;", ("b64", LONG)) == [w.bit_count() for w in LONG]
    for compare, rule in {"lt": int.__lt__, "le": int.__le__, "gt": int.__gt__, "ge": int.__ge__, "eq": int.__eq__,
                          "ne": int.__ne__}.items():  # fmt: skip
        for kind in ("s32", "u32"):
            text = f"setp.{compare}.{kind} %p1, %r0, %r1; selp.b32 %r9, %r0, 7, %p1;"
            numbers = [[signed(v) if kind == "s32" else v for v in (a, b)] for a, b in zip(WORDS, OTHERS, strict=True)]
            want = [a & 0xFFFFFFFF if rule(a, b) else 7 for a, b in numbers]
            assert results(text, ("b32", WORDS), ("b32", OTHERS)) == want


def test_comparisons_of_floats_are_false_for_nan() -> None:
    pairs = list(itertools.product(FLOATS[:13], FLOATS[:13]))
    a, b = ([bits_of(x) for x in side] for side in zip(*pairs, strict=True))
    for compare, rule in {"lt": float.__lt__, "gt": float.__gt__, "eq": float.__eq__,
                          "ne": lambda x, y: x != y and x == x and y == y}.items():  # fmt: skip
        got = results(f"setp.{compare}.f32 %p1, %r0, %r1; selp.b32 %r9, 1, 0, %p1;", ("b32", a), ("b32", b))
        assert got == [int(rule(float_of(x), float_of(y))) for x, y in zip(a, b, strict=True)]


def test_guards_and_predicates() -> None:
    text = """setp.lt.s32 %p1, %r0, 0; setp.gt.s32 %p2, %r1, 0; and.pred %p3, %p1, %p2; mov.pred %p4, -1;
    mov.b32 %r9, 1; @%p3 mov.b32 %r9, 2; @!%p4 mov.b32 %r9, 3;"""
    want = [1 + (signed(a) < 0 < signed(b)) for a, b in zip(WORDS, OTHERS, strict=True)]
    assert results(text, ("b32", WORDS), ("b32", OTHERS)) == want


@pytest.mark.parametrize("opcode", ["add.f32", "sub.f32", "mul.f32", "div.full.f32", "fma.rn.f32", "add.f32x2"])
def test_floats_round_once_to_nearest(opcode: str) -> None:
    a = [x for x in FLOATS if math.isfinite(x) and abs(x) < 1e15]
    b, c = a[7:] + a[:7], a[3:] + a[:3]
    # Sums that a second rounding would get wrong: beside a tie by less than float64 sees.
    a += [1 + 2.0**-12, 1 + 2.0**-23, 1.0, -1.0]
    b += [1 + 2.0**-12, 1 + 2.0**-23, 2.0**-24, 2.0**-24]
    c += [2.0**-60, -(2.0**-100), 1.0, -1.0]
    numbers = [[Fraction(float(np.float32(x))) for x in v] for v in zip(a, b, c, strict=True)]
    rule = {
        "add": lambda x, y, z: x + y, "sub": lambda x, y, z: x - y, "mul": lambda x, y, z: x * y,
        "div": lambda x, y, z: x / y if y else None, "fma": lambda x, y, z: x * y + z,
    }[opcode[:3]]  # fmt: skip
    given = [("b32", [bits_of(x) for x in v]) for v in (a, b, c)]
    if opcode.endswith("x2"):
        text = f"mov.b64 %rd1, {{%r1, %r0}}; mov.b64 %rd2, {{%r2, %r1}}; {opcode} %rd3, %rd1, %rd2;"
        text += "mov.b64 {_, %r9}, %rd3;"
    else:
        text = f"{opcode} %r9, %r0, %r1{', %r2' if opcode.startswith('fma') else ''};"
    got = results(text, *given)
    for one, bits in zip(numbers, got, strict=True):
        exact = rule(*one)
        if exact is not None and abs(exact) < 2**127:
            assert Fraction(float_of(bits)) == nearest(exact, 24, -149)


def test_least_and_greatest_prefer_numbers_to_nan() -> None:
    pairs = list(itertools.product(FLOATS[:13], FLOATS[:13]))
    a, b = ([bits_of(x) for x in side] for side in zip(*pairs, strict=True))
    low, high = (results(f"{name}.f32 %r9, %r0, %r1;", ("b32", a), ("b32", b)) for name in ("min", "max"))
    for x, y, least, most in zip(a, b, low, high, strict=True):
        numbers = sorted({v for v in (x, y) if not math.isnan(float_of(v))}, key=lambda v: (float_of(v), v >> 31 == 0))
        if numbers:
            assert (least, most) == (numbers[0], numbers[-1])
        else:
            assert math.isnan(float_of(least))
            assert math.isnan(float_of(most))


def test_powers_of_two() -> None:
    x = [float(np.float32(RANDOM.uniform(-120, 120))) for _ in range(60)] + [0.0, 1.0, -3.0]
    for bits, one in zip(results("ex2.approx.f32 %r9, %r0;", ("b32", [bits_of(v) for v in x])), x, strict=True):
        assert abs(float_of(bits) / 2.0**one - 1) < 2.0**-22  # what the manual promises


HALF = {"f16": (11, -24, 65504), "bf16": (8, -133, (2 - 2.0**-7) * 2.0**127)}
"""Bits of the mantissa, exponent of the last bit at most, largest number."""


def decoded(bits: int, kind: str) -> float:
    """A 16-bit float by its fields: sign, exponent, mantissa."""
    mantissa_bits, bias = (10, 15) if kind == "f16" else (7, 127)
    sign, exponent, mantissa = (
        bits >> 15,
        bits >> mantissa_bits & (2 ** (15 - mantissa_bits) - 1),
        bits % 2**mantissa_bits,
    )
    if exponent == 2 ** (15 - mantissa_bits) - 1:
        return math.nan if mantissa else math.inf * (-1) ** sign
    value = (mantissa / 2**mantissa_bits + (exponent > 0)) * 2.0 ** (max(exponent, 1) - bias)
    return -value if sign else value


@pytest.mark.parametrize("kind", HALF)
def test_conversions_to_16_bits(kind: str) -> None:
    mantissa, smallest, largest = HALF[kind]
    x = [float(np.float32(v)) for v in FLOATS]
    ties = [float(np.float32(1 + (2 * i + 1) * 2.0**-mantissa)) for i in range(8)]
    given = [("b32", [bits_of(v) for v in x + ties])]
    single = results(f"cvt.rn.{kind}.f32 %rs9, %r0;", *given, out="b16")
    packed = results(f"cvt.rn.{kind}x2.f32 %r9, %r0, 0f3F800000;", *given)
    one = 0x3C00 if kind == "f16" else 0x3F80
    for bits, both, number in zip(single, packed, x + ties, strict=True):
        assert both == bits << 16 | one  # the first operand is the upper half
        if math.isnan(number):
            assert bits == 0x7FFF
        elif math.isinf(number) or abs(nearest(Fraction(number), mantissa, smallest)) > largest:
            assert decoded(bits, kind) == math.copysign(math.inf, number)
        else:
            assert Fraction(decoded(bits, kind)) == nearest(Fraction(number), mantissa, smallest)
            assert bits >> 15 == (math.copysign(1, number) < 0)


@pytest.mark.parametrize("kind", HALF)
def test_conversions_from_16_bits(kind: str) -> None:
    every = [*range(0, 65536, 37), 0x7C00, 0xFC00, 0x7F80, 0xFF80, 1, 0x8001, 0x03FF]
    for bits, got in zip(every, results(f"cvt.f32.{kind} %r9, %rs0;", ("b16", every)), strict=True):
        want = decoded(bits, kind)
        assert float_of(got) == want or (math.isnan(want) and math.isnan(float_of(got)))


@pytest.mark.parametrize(
    ("form", "given", "out", "rule"),
    [
        ("cvt.u64.u32 %rd9, %r0", "b32", "b64", lambda v: v),
        ("cvt.s64.s32 %rd9, %r0", "b32", "b64", lambda v: signed(v)),
        ("cvt.u32.u64 %r9, %rd0", "b64", "b32", lambda v: v),
        ("cvt.u16.u32 %rs9, %r0", "b32", "b16", lambda v: v),
        ("cvt.u32.u16 %r9, %rs0", "b16", "b32", lambda v: v),
        ("cvt.s8.s32 %rs9, %r0", "b32", "b16", lambda v: signed(v, 8)),
        ("cvt.s16.s8 %rs9, %rs0", "b16", "b16", lambda v: signed(v, 8)),
    ],
)
def test_conversions_of_integers(form: str, given: str, out: str, rule: Callable[[int], int]) -> None:
    values = LONG if given == "b64" else [w & (1 << int(given[1:])) - 1 for w in WORDS]
    assert results(f"{form};", (given, values), out=out) == [rule(v) & (1 << int(out[1:])) - 1 for v in values]


def test_conversions_from_small_integers() -> None:
    values = [v & 0xFFFF for v in range(-2048, 2049, 13)] + [0x8000, 0x7FFF]
    got = results("cvt.rn.f16.s16 %rs9, %rs0;", ("b16", values), out="b16")
    for v, bits in zip(values, got, strict=True):
        assert decoded(bits, "f16") == nearest(Fraction(signed(v, 16)), 11, -24)
    text = "{ .reg .s8 s<4>; .reg .f32 f<4>; mov.b32 {s0, s1, s2, s3}, %r0; cvt.rn.f32.s8 f2, s2; mov.b32 %r9, f2; }"
    got = results(text.replace("; ", ";\n").replace("{ .reg", "{\n.reg"), ("b32", WORDS))
    assert [float_of(v) for v in got] == [signed(w >> 16, 8) for w in WORDS]


def test_pairs_of_bfloat16() -> None:
    got = results("sub.bf16x2 %r9, %r0, %r1;", ("b32", WORDS), ("b32", OTHERS))
    for a, b, word in zip(WORDS, OTHERS, got, strict=True):
        for shift in (0, 16):
            x, y, z = (decoded(v >> shift & 0xFFFF, "bf16") for v in (a, b, word))
            if math.isfinite(x) and math.isfinite(y):
                assert Fraction(z) == nearest(Fraction(x) - Fraction(y), 8, -133)


def test_packing() -> None:
    text = "mov.b64 %rd3, {%r0, %r1}; mov.b64 {%r2, %r3}, %rd3; sub.s32 %r9, %r2, %r3;"
    assert results(text, ("b32", WORDS), ("b32", OTHERS)) == [
        (a - b) & 0xFFFFFFFF for a, b in zip(WORDS, OTHERS, strict=True)
    ]


@pytest.mark.parametrize(
    "text",
    [
        "add.sat.s32 %r9, %r0, %r0;",
        "fma.rz.f32 %r9, %r0, %r0, %r0;",
        "cvt.rz.f16.f32 %rs9, %r0;",
        "sin.approx.f32 %r9, %r0;",
        "setp.ltu.f32 %p1, %r0, %r0;",
        "ld.global.cg.b32 { %r9 }, [ %rd1 + 0 ];",
        "bar.sync 1;",
        "add.s32 %rd9, %r0, %r0;",
    ],
)
def test_what_the_machine_does_not_know_is_an_error(text: str) -> None:
    with pytest.raises(UnknownInstructionError):
        run(text, [])
