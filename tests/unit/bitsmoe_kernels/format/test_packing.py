"""Codes <-> words. Every width, both block sizes, ragged tails, against a reader that looks at single bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitsmoe_kernels.format.packing import pack_codes, unpack_codes
from bruteforce import codes_and_bits

DTYPES = {16: torch.int16, 32: torch.int32}


def read_back(words: Tensor, bits: list[int], components: int, block_size: int) -> Tensor:
    q, _ = codes_and_bits(words.tolist(), [bits], components, block_size)
    return torch.from_numpy(q[0]).to(torch.uint8)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("bits", range(9))
@pytest.mark.parametrize("tail", [0, 1, -1, 7])
def test_every_code_at_every_place(block_size: int, bits: int, tail: int) -> None:
    C = 2 * block_size + tail
    # Column f of row c holds c + f, modulo the number of codes: each component takes every code, the top one included.
    codes = ((torch.arange(C)[:, None] + torch.arange(2**bits)) % 2**bits).to(torch.uint8)
    widths = torch.full((-(-C // block_size),), bits, dtype=torch.uint8)
    words = pack_codes(codes, widths, block_size)
    assert words.dtype == DTYPES[block_size]
    assert words.shape == (bits * len(widths), 2**bits)
    assert torch.equal(unpack_codes(words, widths, C, block_size), codes)
    if bits:
        assert torch.equal(read_back(words, widths.tolist(), C, block_size), codes)


@given(
    block_size=st.sampled_from([16, 32]),
    widths=st.lists(st.integers(0, 8), min_size=1, max_size=5),
    tail=st.integers(1, 32),
    features=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_mixed_widths(block_size: int, widths: list[int], tail: int, features: int, seed: int) -> None:
    C = (len(widths) - 1) * block_size + min(tail, block_size)
    bits = torch.tensor(widths, dtype=torch.uint8)
    top = 2 ** bits.long().repeat_interleave(block_size)[:C, None]
    codes = torch.randint(0, 256, (C, features), generator=torch.Generator().manual_seed(seed)) % top
    words = pack_codes(codes.to(torch.uint8), bits, block_size)
    assert words.shape == (sum(widths), features)
    assert torch.equal(unpack_codes(words, bits, C, block_size), codes.to(torch.uint8))
    if sum(widths):
        assert torch.equal(read_back(words, widths, C, block_size), codes.to(torch.uint8))


@given(
    block_size=st.sampled_from([16, 32]),
    widths=st.lists(st.integers(0, 8), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_every_word_is_a_code(block_size: int, widths: list[int], seed: int) -> None:
    """In full blocks there are no unused bits: any words come back from their codes."""
    bits = torch.tensor(widths, dtype=torch.uint8)
    half = 2 ** (block_size - 1)
    words = torch.randint(-half, half, (sum(widths), 3), generator=torch.Generator().manual_seed(seed))
    words = words.to(DTYPES[block_size])
    codes = unpack_codes(words, bits, len(widths) * block_size, block_size)
    assert torch.equal(pack_codes(codes, bits, block_size), words)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("components", [1, 5, 15])
def test_absent_components_are_zero_bits(block_size: int, components: int) -> None:
    codes = torch.full((components, 2), 255, dtype=torch.uint8)
    words = pack_codes(codes, torch.tensor([8], dtype=torch.uint8), block_size)
    assert words.tolist() == [[2**components - 1] * 2] * 8


def test_codes_of_zero_bit_blocks_are_ignored() -> None:
    codes = torch.full((32, 3), 200, dtype=torch.uint8)
    assert pack_codes(codes, torch.tensor([0, 0], dtype=torch.uint8), 16).shape == (0, 3)
    bits = torch.tensor([0, 8], dtype=torch.uint8)
    back = unpack_codes(pack_codes(codes, bits, 16), bits, 32, 16)
    assert back[:16].eq(0).all()
    assert back[16:].eq(200).all()


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_too_large_is_refused(block_size: int, bits: int) -> None:
    codes = torch.zeros(2 * block_size, 3, dtype=torch.uint8)
    codes[block_size + 3, 1] = 2**bits
    with pytest.raises(ValueError, match=f"block 1: code {2**bits} does not fit {bits} bits"):
        pack_codes(codes, torch.tensor([8, bits], dtype=torch.uint8), block_size)


@pytest.mark.parametrize("widths", [[2], [2, 2, 2], [2, 9]])
def test_wrong_block_bits_are_refused(widths: list[int]) -> None:
    with pytest.raises(ValueError, match="20 components in blocks of 16"):
        pack_codes(torch.zeros(20, 3, dtype=torch.uint8), torch.tensor(widths, dtype=torch.uint8), 16)
