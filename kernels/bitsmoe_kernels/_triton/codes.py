"""Words of codes to numbers 1 + q 2^(p - m), one instruction for two of them.

`gemm.py` loads the words. `layout/fields.py` has the places of codes in them.

ASM picks the machine instruction; without it the same is said in Triton's own operations, for the interpreter.
"""

import triton
import triton.language as tl

from bitsmoe_kernels.layout.fields import CLASSES, PAIRS, field_place, field_shift

# Triton functions see constants only: tables of [float16?][bits - 1][a], flattened.
_ALL = [(bits, a, fp16) for fp16 in (False, True) for bits in CLASSES for a in range(PAIRS)]
_SHIFTS = tl.constexpr(tuple(field_shift(*one) for one in _ALL))
_PLACES = tl.constexpr(tuple(field_place(*one) for one in _ALL))


@triton.constexpr_function
def _entry(bits, a, fp16):
    return (4 if fp16 else 0) * 8 + (bits - 1) * 8 + a


@triton.constexpr_function
def _mask(bits, place):
    return ((1 << bits) - 1 << place) * 0x00010001


@triton.constexpr_function
def _one(fp16):
    return 0x3C003C00 if fp16 else 0x3F803F80


@triton.jit
def _cut(word, MASK: tl.constexpr, REST, ASM: tl.constexpr):
    """word & MASK | REST."""
    if ASM:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xea;", "=r,r,r,r", [word, MASK, REST], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return (word & MASK) | REST


@triton.jit
def _pair(word, BITS: tl.constexpr, A: tl.constexpr, FP16: tl.constexpr, ASM: tl.constexpr):
    """Both codes of pair A, as int32 that holds two numbers."""
    SHIFT: tl.constexpr = _SHIFTS[_entry(BITS, A, FP16)]
    MASK: tl.constexpr = _mask(BITS, _PLACES[_entry(BITS, A, FP16)])
    if SHIFT > 0:
        word = word >> SHIFT
    elif SHIFT < 0:
        word = word << -SHIFT
    return _cut(word, MASK, _one(FP16), ASM)


@triton.jit
def _spread(word, HIGH: tl.constexpr, ASM: tl.constexpr):
    """The two bytes of one half of a word as the low bytes of the two halves of another."""
    if ASM:
        SELECT: tl.constexpr = 0x4342 if HIGH else 0x4140
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, $2;", "=r,r,n", [word, SELECT], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        half = (word >> 16) if HIGH else word
        return (half & 0xFF) | ((half & 0xFF00) << 8)


@triton.jit
def narrow_words(words, N: tl.constexpr, ASM: tl.constexpr):
    """16-bit words of N outputs, spread: int32 [N / 2, 4], n and n + 8 of a group of 16 together -> int32 [N, 4]."""
    words = tl.reshape(words, (N // 16, 8, 4))
    both = tl.join(_spread(words, False, ASM), _spread(words, True, ASM))
    return tl.reshape(tl.permute(both, (0, 3, 1, 2)), (N, 4))


@triton.jit
def _pair7_of_3(wide, narrow, FP16: tl.constexpr, ASM: tl.constexpr):
    """Code 7 of 3 bits: two bits of the narrow word, the top one of the wide word."""
    PLACE: tl.constexpr = _PLACES[_entry(3, 7, FP16)]
    low = narrow
    if not FP16:
        low = narrow >> _SHIFTS[_entry(3, 7, FP16)]
    low = _cut(low, _mask(2, PLACE), _one(FP16), ASM)
    return _cut(wide >> (13 - PLACE), _mask(1, PLACE + 2), low, ASM)


@triton.jit
def numbers(first, second, BITS: tl.constexpr, N: tl.constexpr, KWIDTH: tl.constexpr, FP16: tl.constexpr,
            ASM: tl.constexpr):  # fmt: skip
    """One tile of codes.

    Args:
        first: int32 [N, 4]: words with the first pairs of codes, and
        second: with the last ones: the same for 1 and 2 bits; the spread narrow ones for 3; the second of two for 4.

    Returns:
        float16 or bfloat16 [N, 64], components in the order of `layout.positions(KWIDTH)`.
    """
    v0 = _pair(first, BITS, 0, FP16, ASM)
    v1 = _pair(first, BITS, 1, FP16, ASM)
    v2 = _pair(first, BITS, 2, FP16, ASM)
    v3 = _pair(first, BITS, 3, FP16, ASM)
    v4 = _pair(first if BITS == 3 else second, BITS, 4, FP16, ASM)
    v5 = _pair(second, BITS, 5, FP16, ASM)
    v6 = _pair(second, BITS, 6, FP16, ASM)
    if BITS == 3:
        v7 = _pair7_of_3(first, second, FP16, ASM)
    else:
        v7 = _pair(second, BITS, 7, FP16, ASM)
    # [N, 4 lanes, a / 4, a / 2 mod 2, a mod 2]; joins, splits and reshapes move nothing between threads.
    v = tl.join(tl.join(tl.join(v0, v4), tl.join(v2, v6)), tl.join(tl.join(v1, v5), tl.join(v3, v7)))
    q = tl.join(as_float(v, FP16), as_float(v >> 16, FP16))
    if KWIDTH == 2:
        q = tl.permute(q, (0, 2, 3, 4, 1, 5))
    else:
        q = tl.permute(q, (0, 2, 3, 1, 4, 5))
    return tl.reshape(q, (N, 64))


@triton.jit
def place_in_lanes(k, LANES: tl.constexpr):
    """Where component k stands if those of a lane of its tile stand side by side: at 16 lane + 2 a + c.

    LANES: `kwidth` of the codes, see `layout.words.positions`; 0: components stand in their own order.
    """
    if LANES == 2:
        k = (k & ~0x3E) | ((k & 0x38) >> 2) | ((k & 6) << 3)
    elif LANES == 4:
        k = (k & ~0x3C) | ((k & 0x30) >> 2) | ((k & 0xC) << 2)
    return k


@triton.jit
def places_in_lanes(k, LANES: tl.constexpr):
    """`place_in_lanes` of neighbouring components k [n], which begin at a multiple of 2: pairs stay together."""
    k = place_in_lanes(k, LANES)
    return tl.max_contiguous(tl.multiple_of(k, 2), 2) if LANES > 0 else k


@triton.jit
def as_float(word, FP16: tl.constexpr):
    """The lower 16 bits of a word as a float16 or bfloat16."""
    return (word & 0xFFFF).to(tl.uint16).to(tl.float16 if FP16 else tl.bfloat16, bitcast=True)


@triton.jit
def product(left, right, acc, ASM: tl.constexpr):
    """acc + left @ right. The interpreter knows no bfloat16 products; in float32 they are exact too."""
    if ASM:
        # Triton waits for a product before its sums are used: here, in each turn of a loop. Without this use the next
        # turn overwrites registers that wgmma still reads (triton-lang/triton#9433).
        return tl.inline_asm_elementwise("", "=f,0", [tl.dot(left, right, acc)], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def rounded(v, FP16: tl.constexpr, ASM: tl.constexpr):
    """float32 to float16 (kept finite) or bfloat16, to nearest, ties to even."""
    if FP16:
        return tl.minimum(tl.maximum(v, -65504.0), 65504.0).to(tl.float16)
    elif ASM:
        return v.to(tl.bfloat16)
    else:
        # The interpreter would cut the lower bits off.
        bits = v.to(tl.int32, bitcast=True)
        return as_float((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, FP16)
