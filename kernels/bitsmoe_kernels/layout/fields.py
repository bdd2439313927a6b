"""Where a code stands in its word, and in the mantissa of the number it becomes.

Kernels turn a b-bit code q into a floating-point number without arithmetic: `(word >> shift) & mask | one`, where `one`
is the bit pattern of 1.0, gives 1 + q 2^(p - m), with p the code's place in the mantissa and m the mantissa's bits
(10 for float16, 7 for bfloat16). Two codes, neighbours along the contraction, share a 32-bit word in its two halves, so
one instruction makes both. The power of two and the 1 are put right outside the main loop (`matrices.py`).

A tile is 64 components. Each output's codes of a tile are dealt to four lanes, 16 codes each: `a` (0 to 7) counts pairs
and `c` (0, 1) tells the half. Words of one lane:

    bits  words               code (a, c) stands at
    1     one of 16 bits      a + 8 c
    2     one of 32 bits      2 a + 16 c
    3     one of 32 bits (W)  3 a + 16 c for a < 5; bit 15 + 16 c is the top bit of code 7
          one of 16 bits (X)  8 c for a = 5, 3 + 8 c for a = 6, 6 + 8 c for the low two bits of a = 7
    4     two of 32 bits      4 (a mod 4) + 16 c of word a div 4

Outputs come in groups of 16, as a thread of the matrix unit holds outputs n and n + 8: the 16-bit words of the two
share one of 32 bits. It is spread first, so that each half holds the 8 bits of its own code.
"""

TILE = 64
"""Components of a tile."""
LANES, PAIRS = 4, 8
GROUP = 16
"""Outputs whose words are stored together; their number is padded to a multiple."""
CLASSES = (1, 2, 3, 4)
"""Widths that have a code path; wider codes are stored as two components, see `matrices.py`."""
DENSE = 16
"""The class of weights kept at 16 bits."""


def mantissa_bits(fp16: bool) -> int:
    """m of float16 or bfloat16."""
    return 10 if fp16 else 7


def field_shift(bits: int, a: int, fp16: bool) -> int:
    """How far the (spread) word of pair `a` is shifted right, or left if negative, before its field is cut out.

    A float16 has room to move fields upwards, to p >= 4. The smaller a code's step beside the constant 1, the more of
    it sums lose that round toward zero, as those of matrix units do.
    """
    if bits == 1:
        return (-6 if a < 4 else -2) if fp16 else a // 7
    if bits == 2:
        return (-6, -6, -2, 0, 0, 4, 4, 6)[a] if fp16 else 6 * (a // 3)
    if bits == 3:
        if a >= 5:  # X
            return (-4 if fp16 else 0) if a < 7 else (0 if fp16 else 2)
        return (-7, -4, 0, 5, 5)[a] if fp16 else 6 * (a // 2)
    return 4 * (a % 4) - 4 if fp16 else 4 * (a % 4)


def field_place(bits: int, a: int, fp16: bool) -> int:
    """p: the mantissa bit at which the code of pair `a` begins."""
    if bits == 3 and a >= 5:
        start = 3 * (a - 5)
    elif bits == 4:
        start = 4 * (a % 4)
    else:
        start = bits * a
    return start - field_shift(bits, a, fp16)
