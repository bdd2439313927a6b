"""Arithmetic, logic and conversions: every thread by itself."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import numpy as np

from ptx_machine.faults import UnknownInstructionError
from ptx_machine.parser import Instruction, Symbol, Vector
from ptx_machine.registers import SIZES, UNSIGNED, Array, Mask, Slots, Step, over, put, type_class

_BANKS = {"u": attrgetter("u"), "b": attrgetter("u"), "s": attrgetter("s"), "f": attrgetter("f")}


def bfloat16_to_float32(bits: Array) -> Array:
    """uint16 -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(x: Array) -> Array:
    """float32 -> bits uint16, to nearest, ties to even; NaN becomes 0x7FFF."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def float32_to_float16(x: Array) -> Array:
    """float32 -> bits uint16, to nearest, ties to even; NaN becomes 0x7FFF."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def fused(a: Array, b: Array, c: Array) -> Array:
    """a b + c in float32, rounded once."""
    product, c = a.astype(np.float64) * b, np.asarray(c).astype(np.float64)
    total = product + c
    # What float64 lost. With it the last bit is made odd, and the second rounding cannot tie by mistake.
    back = total - product
    lost = (product - (total - back)) + (c - back)
    bits = total.view(np.int64)
    away = np.where((lost > 0) == (total > 0), 1, -1)
    odd = np.where((lost != 0) & np.isfinite(lost) & (bits & 1 == 0), bits + away, bits)
    return odd.view(np.float64).astype(np.float32)


def _smaller(a: Array, b: Array) -> Array:
    """PTX's min.f32: a number rather than NaN, -0 below +0."""
    signs = (np.asarray(a).view(np.uint32) | np.asarray(b).view(np.uint32)).view(np.float32)
    return np.where((a == 0) & (b == 0), signs, np.fmin(a, b))


def _larger(a: Array, b: Array) -> Array:
    """PTX's max.f32."""
    signs = (np.asarray(a).view(np.uint32) & np.asarray(b).view(np.uint32)).view(np.float32)
    return np.where((a == 0) & (b == 0), signs, np.fmax(a, b))


def _shift(left: bool, a: Array, n: Array, bits: int) -> Array:
    """Shifts by `bits` and more leave nothing, or copies of the sign."""
    if left or a.dtype.kind == "u":
        kept = np.minimum(n, bits - 1).astype(a.dtype)
        return np.where(n >= bits, a.dtype.type(0), a << kept if left else a >> kept)
    return a >> np.minimum(n, bits - 1).astype(a.dtype)


def lop3(a: Array, b: Array, c: Array, table: int) -> Array:
    """Bit (a << 2 | b << 1 | c) of the table, for every bit of uint32."""
    if table == 0xEA:
        return (a & b) | c
    out = np.zeros_like(a & b & c)
    for one in range(8):
        if table >> one & 1:
            out |= (a if one & 4 else ~a) & (b if one & 2 else ~b) & (c if one & 1 else ~c)
    return out


def prmt(a: Array, b: Array, select: Array) -> Array:
    """Bytes of (b, a) by four selectors of four bits, the top one of which copies the byte's sign. uint32."""
    both = np.asarray(b).astype(np.uint64) << np.uint64(32) | np.asarray(a).astype(np.uint64)
    select = np.asarray(select).astype(np.uint64)
    out = np.zeros_like(both | select)
    for i in range(4):
        one = select >> np.uint64(4 * i)
        byte = both >> ((one & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
        out |= np.where(one & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return out.astype(np.uint32)


def bfe(a: Array, position: Array, length: Array, signed: bool) -> Array:
    """Bits of uint32 from `position` on; beyond the top, or the field, copies of the field's last bit or 0."""
    position, length = (np.asarray(v).astype(np.int64) & 255 for v in (position, length))
    wide = np.asarray(a).astype(np.int64)
    width = np.clip(np.minimum(length, 32 - position), 0, 32)
    field = (np.int64(1) << width) - 1
    value = wide >> np.minimum(position, 32) & field
    if signed:
        last = wide >> np.minimum(position + length - 1, 31).clip(0) & (length > 0)
        value = np.where(last == 1, value | ~field, value)
    return value.astype(np.uint32)


def _wide_shift(a: Array, b: Array, n: Array) -> Array:
    """shf.l.wrap: the upper half of (b, a) << n modulo 32."""
    both = np.asarray(b).astype(np.uint64) << np.uint64(32) | np.asarray(a).astype(np.uint64)
    n = np.asarray(n).astype(np.uint64) & np.uint64(31)
    return (both << n >> np.uint64(32)).astype(np.uint32)


def _high(a: Array, b: Array) -> Array:
    """mul.hi: the upper half of the product."""
    wide, narrow = (np.int64, np.int32) if a.dtype.kind == "i" else (np.uint64, np.uint32)
    return (np.multiply(a, b, dtype=wide) >> wide(32)).astype(narrow)


def _quotient(a: Array, b: Array) -> Array:
    """div.s32, toward zero; by zero anything."""
    a, b = a.astype(np.int64), b.astype(np.int64)
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.maximum(np.abs(b), 1))).astype(np.int32)


def _remainder(a: Array, b: Array) -> Array:
    """rem.s32, with the sign of the dividend."""
    return (a - _quotient(a, b) * b).astype(np.int32)


def _mul_add(a: Array, b: Array, c: Array) -> Array:
    return a * b + c


_UFUNCS: dict[tuple[str, str], Any] = {
    **{("add", t): np.add for t in ("s32", "u32", "s64", "u64", "s16", "u16", "f32")},
    **{("sub", t): np.subtract for t in ("s32", "u32", "s64", "u64", "s16", "u16", "f32")},
    **{("mul", t): np.multiply for t in ("lo.s32", "lo.u32", "lo.s64", "lo.u64", "lo.s16", "lo.u16", "f32")},
    **{("min", t): np.minimum for t in ("s32", "u32", "s64", "u64")},
    **{("max", t): np.maximum for t in ("s32", "u32")},
    **{("and", t): np.bitwise_and for t in ("b16", "b32", "b64", "pred")},
    **{("or", t): np.bitwise_or for t in ("b16", "b32", "b64", "pred")},
    **{("xor", t): np.bitwise_xor for t in ("b16", "b32", "b64", "pred")},
    **{("not", t): np.bitwise_not for t in ("b16", "b32", "b64", "pred")},
    **{("neg", t): np.negative for t in ("s32", "s64", "f32")},
    ("div", "full.f32"): np.divide,  # the GPU's may be off by 2 units in the last place
    ("ex2", "approx.f32"): np.exp2,
}

_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("div", "s32"): _quotient,
    ("rem", "s32"): _remainder,
    ("mul", "hi.u32"): _high,
    ("mul", "hi.s32"): _high,
    ("mad", "lo.s32"): _mul_add,
    ("mad", "lo.s64"): _mul_add,
    ("fma", "rn.f32"): fused,
    ("min", "f32"): _smaller,
    ("max", "f32"): _larger,
    ("prmt", "b32"): prmt,
    ("bfe", "u32"): lambda a, position, length: bfe(a, position, length, False),
    ("bfe", "s32"): lambda a, position, length: bfe(a.view(np.uint32), position, length, True).view(np.int32),
    ("shf", "l.wrap.b32"): _wide_shift,
}

_PAIRS: dict[tuple[str, str], Callable[..., Any]] = {
    ("add", "f32x2"): np.add,
    ("sub", "f32x2"): np.subtract,
    ("mul", "f32x2"): np.multiply,
    ("add", "rn.f32x2"): np.add,
    ("mul", "rn.f32x2"): np.multiply,
    ("fma", "rn.f32x2"): fused,
}

_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _elementwise(i: Instruction, slots: Slots) -> Step | None:
    key = (i.opcode[0], ".".join(i.opcode[1:]))
    ufunc = _UFUNCS.get(key)
    function: Any = ufunc or _FUNCTIONS.get(key)
    if function is None:
        return None
    kind = i.opcode[-1]
    cls = "pred" if kind == "pred" else type_class(kind)
    bank = _BANKS["b" if kind == "pred" else kind[0]]
    d = slots.written(i.operands[0], cls, i)
    sources = [slots.read(one, cls, i) for one in i.operands[1:]]
    if len(sources) != (
        ufunc.nargs - 1 if ufunc is not None else 2 + (key[0] not in ("min", "max", "mul", "div", "rem"))
    ):
        raise UnknownInstructionError(i.text)
    if ufunc is not None and ufunc.nargs == 3:
        a, b = sources

        def two(p: Any, w: Mask) -> None:
            of = bank(p)
            ufunc(of[a], of[b], out=of[d], where=w)

        return two

    def any_number(p: Any, w: Mask) -> None:
        of = bank(p)
        put(of[d], function(*(of[one] for one in sources)), w)

    return any_number


def _pairs(i: Instruction, slots: Slots) -> Step | None:
    """Two float32 side by side in 64 bits."""
    function = _PAIRS.get((i.opcode[0], ".".join(i.opcode[1:])))
    if function is None:
        return None
    d, *sources = slots.written(i.operands[0], "b64", i), *(slots.read(one, "b64", i) for one in i.operands[1:])

    def step(p: Any, w: Mask) -> None:
        value = function(*(over(p.u[one], p.threads).view(np.float32) for one in sources))
        put(p.u[d], value.view(np.uint64), w)

    return step


def _sub_bf16x2(i: Instruction, slots: Slots) -> Step:
    d, a, b = slots.written(i.operands[0], "b32", i), *(slots.read(one, "b32", i) for one in i.operands[1:])

    def step(p: Any, w: Mask) -> None:
        left, right = (bfloat16_to_float32(over(p.u[one], p.threads).view(np.uint16)) for one in (a, b))
        put(p.u[d], float32_to_bfloat16(left - right).view(np.uint32), w)

    return step


_TWICE = {"s16": ("b16", "b32", np.int32), "u16": ("b16", "b32", np.uint32),
          "s32": ("b32", "b64", np.int64), "u32": ("b32", "b64", np.uint64)}  # fmt: skip
"""Classes of factors and of results of products of twice their size."""


def _wide(i: Instruction, slots: Slots) -> Step:
    """mul.wide, mad.wide."""
    kind = i.opcode[2]
    if kind not in _TWICE:
        raise UnknownInstructionError(i.text)
    one, two, wide = _TWICE[kind]
    d = slots.written(i.operands[0], two, i)
    a, b = (slots.read(o, one, i) for o in i.operands[1:3])
    c = slots.read(i.operands[3], two, i) if i.opcode[0] == "mad" else slots.constant(0, two)
    bank = _BANKS[kind[0]]

    def step(p: Any, w: Mask) -> None:
        of = bank(p)
        put(of[d], np.multiply(of[a], of[b], dtype=wide) + of[c], w)

    return step


def _shifts(i: Instruction, slots: Slots) -> Step:
    kind = i.opcode[1]
    cls = type_class(kind)
    d, a = slots.written(i.operands[0], cls, i), slots.read(i.operands[1], cls, i)
    n, bank, left, bits = slots.read(i.operands[2], "b32", i), _BANKS[kind[0]], i.opcode[0] == "shl", 8 * SIZES[cls]

    def step(p: Any, w: Mask) -> None:
        of = bank(p)
        put(of[d], _shift(left, of[a], p.u[n], bits), w)

    return step


def _lop3(i: Instruction, slots: Slots) -> Step:
    d, (a, b, c) = slots.written(i.operands[0], "b32", i), (slots.read(one, "b32", i) for one in i.operands[1:4])
    table = slots.values[slots.read(i.operands[4], "b32", i)]

    def step(p: Any, w: Mask) -> None:
        put(p.u[d], lop3(p.u[a], p.u[b], p.u[c], table), w)

    return step


def _popc(i: Instruction, slots: Slots) -> Step:
    d, a = slots.written(i.operands[0], "b32", i), slots.read(i.operands[1], i.opcode[1], i)

    def step(p: Any, w: Mask) -> None:
        put(p.u[d], np.bitwise_count(p.u[a]), w)

    return step


def _selp(i: Instruction, slots: Slots) -> Step:
    cls = type_class(i.opcode[1])
    d, a, b = slots.written(i.operands[0], cls, i), *(slots.read(one, cls, i) for one in i.operands[1:3])
    chosen = slots.read(i.operands[3], "pred", i)

    def step(p: Any, w: Mask) -> None:
        put(p.u[d], np.where(p.u[chosen], p.u[a], p.u[b]), w)

    return step


def _setp(i: Instruction, slots: Slots) -> Step:
    compare, kind = i.opcode[1:]
    if compare not in _COMPARE:
        raise UnknownInstructionError(i.text)
    cls, ufunc, bank = type_class(kind), _COMPARE[compare], _BANKS[kind[0]]
    d, a, b = slots.written(i.operands[0], "pred", i), *(slots.read(one, cls, i) for one in i.operands[1:])
    # Comparisons of floats are false for NaN, this one too.
    ordered = compare == "ne" and kind[0] == "f"

    def step(p: Any, w: Mask) -> None:
        of = bank(p)
        ufunc(of[a], of[b], out=p.u[d], where=w)
        if ordered:
            put(p.u[d], p.u[d] & (of[a] == of[a]) & (of[b] == of[b]), w)

    return step


def _mov(i: Instruction, slots: Slots) -> Step:
    cls = "pred" if i.opcode[1] == "pred" else type_class(i.opcode[1])
    target, source = i.operands
    if isinstance(target, Vector) or isinstance(source, Vector):
        size = SIZES[cls] // max(len(slots.parts(one)) for one in (target, source))
        part = next(name for name, n in SIZES.items() if n == size)
        # `_` stands for a part that nobody wants.
        named = target.parts if isinstance(target, Vector) else ()
        ds = [None if one == Symbol("_") else slots.written(one, part, i) for one in named]
        parts = [slots.read(one, part, i) for one in source.parts] if isinstance(source, Vector) else []
        if isinstance(target, Vector):
            whole = slots.read(source, cls, i)

            def unpack(p: Any, w: Mask) -> None:
                values = over(p.u[whole], p.threads).copy().view(UNSIGNED[part]).reshape(p.threads, -1)
                for d, value in zip(ds, values.T, strict=True):
                    if d is not None:
                        put(p.u[d], value, w)

            return unpack
        into = slots.written(target, cls, i)

        def pack(p: Any, w: Mask) -> None:
            values = np.stack([over(p.u[one], p.threads) for one in parts], 1)
            put(p.u[into], values.view(UNSIGNED[cls])[:, 0], w)

        return pack
    d, a = slots.written(target, cls, i), slots.read(source, cls, i)

    def step(p: Any, w: Mask) -> None:
        put(p.u[d], p.u[a], w)

    return step


_TO_FLOAT: dict[str, Callable[[Array], Array]] = {
    "f32.f16": lambda v: v.view(np.float16).astype(np.float32).view(np.uint32),
    "f32.bf16": lambda v: bfloat16_to_float32(v).view(np.uint32),
    "rn.f16.f32": lambda v: float32_to_float16(v.view(np.float32)),
    "rn.bf16.f32": lambda v: float32_to_bfloat16(v.view(np.float32)),
    "rn.f16.s16": lambda v: v.view(np.int16).astype(np.float16).view(np.uint16),
    "rn.f32.s32": lambda v: v.view(np.int32).astype(np.float32).view(np.uint32),
    "rn.f32.u32": lambda v: v.astype(np.float32).view(np.uint32),
    "rn.f32.s8": lambda v: v.view(np.int8).astype(np.float32).view(np.uint32),
}
_PACKED: dict[str, Callable[[Array], Array]] = {
    "rn.f16x2.f32": float32_to_float16, "rn.bf16x2.f32": float32_to_bfloat16,
}  # fmt: skip


def _cvt(i: Instruction, slots: Slots) -> Step:
    form = ".".join(i.opcode[1:])
    if form in _PACKED:
        d, high, low = slots.written(i.operands[0], "b32", i), *(slots.read(v, "b32", i) for v in i.operands[1:])
        narrow = _PACKED[form]

        def packed(p: Any, w: Mask) -> None:
            halves = [narrow(over(p.f[one], p.threads)).astype(np.uint32) for one in (low, high)]
            put(p.u[d], halves[0] | halves[1] << np.uint32(16), w)

        return packed
    to, of = i.opcode[-2:]
    a, a_class = slots.read_any(i.operands[1], i)
    d, d_class = slots.read_any(i.operands[0], i)
    if form in _TO_FLOAT:
        function = _TO_FLOAT[form]
        if (a_class, d_class) != (type_class("b" + of.lstrip("bfsu")), type_class("b" + to.lstrip("bfsu"))):
            raise UnknownInstructionError(i.text)

        def to_float(p: Any, w: Mask) -> None:
            put(p.u[d], function(over(p.u[a], p.threads)), w)

        return to_float
    if len(i.opcode) != 3 or to[0] not in "su" or of[0] not in "su" or "pred" in (a_class, d_class):
        raise UnknownInstructionError(i.text)
    narrowed, source = np.dtype(_int_of(to)), np.dtype(_int_of(of))
    if source.itemsize > SIZES[a_class] or narrowed.itemsize > SIZES[d_class]:
        raise UnknownInstructionError(i.text)
    target = UNSIGNED[d_class]

    def to_int(p: Any, w: Mask) -> None:
        # Cut to the source's type, then to the result's, whose sign fills the register.
        put(p.u[d], over(p.u[a], p.threads).astype(source).astype(narrowed).astype(target), w)

    return to_int


def _int_of(kind: str) -> str:
    return f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}"


_OTHERS: dict[str, Callable[[Instruction, Slots], Step]] = {
    "mov": _mov, "cvt": _cvt, "selp": _selp, "setp": _setp, "shl": _shifts, "shr": _shifts, "popc": _popc,
}  # fmt: skip


def decode(i: Instruction, slots: Slots) -> Step | None:
    """What an instruction does, or None if it is none of these."""
    step = _elementwise(i, slots) or _pairs(i, slots)
    if step is not None:
        return step
    if i.opcode[:2] in (("mul", "wide"), ("mad", "wide")):
        return _wide(i, slots)
    if i.opcode == ("lop3", "b32"):
        return _lop3(i, slots)
    if i.opcode == ("sub", "bf16x2"):
        return _sub_bf16x2(i, slots)
    if i.opcode[0] in _OTHERS and (i.opcode[0] in ("cvt", "setp") or len(i.opcode) == 2):
        return _OTHERS[i.opcode[0]](i, slots)
    return None
