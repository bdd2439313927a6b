"""Words hold their codes, and become the numbers they should."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bitsmoe_kernels.layout.fields import CLASSES, LANES, PAIRS, TILE, field_place, field_shift, mantissa_bits
from bitsmoe_kernels.layout.words import pack_words, positions, unpack_words

both_dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
both_kwidths = pytest.mark.parametrize("kwidth", [2, 4])


def random_codes(bits: int, tiles: int, N: int) -> Tensor:
    gen = torch.Generator().manual_seed(bits)
    codes = torch.randint(1 << bits, (tiles * TILE, N), generator=gen, dtype=torch.uint8)
    codes[:, 0], codes[:, 1] = (1 << bits) - 1, 0
    return codes


@both_kwidths
@pytest.mark.parametrize("bits", CLASSES)
@pytest.mark.parametrize("N", [0, 16, 48])
def test_words_give_back_their_codes_and_take_no_bit_more(bits: int, kwidth: int, N: int) -> None:
    for tiles in (1, 3):
        codes = random_codes(bits, tiles, N) if N else torch.zeros(tiles * TILE, 0, dtype=torch.uint8)
        wide, narrow = pack_words(codes, bits, kwidth)
        assert torch.equal(unpack_words(wide, narrow, bits, kwidth), codes)
        assert sum(w.nbytes for w in (wide, narrow) if w is not None) * 8 == bits * codes.numel()


@both_kwidths
def test_every_component_of_a_tile_has_one_place(kwidth: int) -> None:
    at = positions(kwidth)
    assert sorted(at.flatten().tolist()) == list(range(TILE))
    # The two halves of a word are neighbours along the contraction, and lanes hold kwidth of them in a row.
    assert torch.equal(at[..., 1], at[..., 0] + 1)
    assert torch.equal(at[1:, 0, 0] - at[:-1, 0, 0], torch.full((LANES - 1,), kwidth))


@both_dtypes
@pytest.mark.parametrize("bits", CLASSES)
def test_fields_stay_in_the_mantissa(bits: int, dtype: torch.dtype) -> None:
    fp16 = dtype == torch.float16
    for a in range(PAIRS):
        place = field_place(bits, a, fp16)
        assert 0 <= place <= mantissa_bits(fp16) - bits
        assert abs(field_shift(bits, a, fp16)) < 16
        if fp16:  # what sums that round toward zero lose grows with the constant 1 over the code's step
            assert place >= 4


def as_numbers(words: np.ndarray, fp16: bool) -> np.ndarray:
    """The low and the high half of 32-bit words as floats, float64 [..., 2]."""
    halves = np.stack([words & 0xFFFF, words >> 16 & 0xFFFF], -1)
    if fp16:
        return halves.astype(np.uint16).view(np.float16).astype(np.float64)
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def emulated(wide: Tensor | None, narrow: Tensor | None, bits: int, fp16: bool) -> np.ndarray:
    """What `fields.py` says of words, with integers alone: float64 [tile, N, lane, a, c]."""
    one = 0x3C003C00 if fp16 else 0x3F803F80

    def mask(width: int, place: int) -> int:
        return (((1 << width) - 1) << place) * 0x10001

    words: dict[str, np.ndarray] = {}
    if wide is not None:
        words["wide"] = wide.numpy()  # int32: shifts drag the sign along, as on the device
    if narrow is not None:
        # Outputs n and n + 8 of 16 share a word; each half's two bytes go to the two halves of another.
        pair = narrow.numpy().view(np.uint32).astype(np.int64)
        halves = np.stack([pair & 0xFFFF, pair >> 16], 2)  # [tile, group, which, 8, lane]
        halves = halves.reshape(len(pair), -1, LANES)
        words["narrow"] = (halves & 0xFF | (halves & 0xFF00) << 8).astype(np.int64)
    out = []
    for a in range(PAIRS):
        shift, place = field_shift(bits, a, fp16), field_place(bits, a, fp16)
        if bits == 1:
            word, width = words["narrow"], 1
        elif bits == 2:
            word, width = words["wide"][..., 0], 2
        elif bits == 4:
            word, width = words["wide"][..., a // 4], 4
        elif a < 5:
            word, width = words["wide"][..., 0], 3
        else:
            word, width = words["narrow"], 3 if a < 7 else 2
        made = (word >> shift if shift >= 0 else word << -shift) & mask(width, place) | one
        if bits == 3 and a == 7:
            made = made | words["wide"][..., 0] >> (13 - place) & mask(1, place + 2)
        out.append(as_numbers(made.astype(np.int64), fp16))
    return np.stack(out, 3)


@both_dtypes
@both_kwidths
@pytest.mark.parametrize("bits", CLASSES)
def test_words_become_one_plus_the_code_at_its_place(bits: int, kwidth: int, dtype: torch.dtype) -> None:
    """1 + q 2^(p - m) exactly: every code at every place, beside neighbours of all kinds."""
    fp16 = dtype == torch.float16
    codes = random_codes(bits, 2, 64)
    # Every code at every place: column n has code n in all its components, from the second tile on.
    codes[TILE:] = torch.arange(64, dtype=torch.uint8) % (1 << bits)
    got = emulated(*pack_words(codes, bits, kwidth), bits, fp16)
    q = codes.view(2, TILE, 64)[:, positions(kwidth)].permute(0, 4, 1, 2, 3).double().numpy()
    place = np.array([field_place(bits, a, fp16) for a in range(PAIRS)])
    want = 1 + q * 2.0 ** (place - mantissa_bits(fp16))[:, None]
    assert np.array_equal(got, want)
