"""Codes <-> words: a block of G components with b bits is b rows of G-bit words, one row for each bit-plane.

Word [j, f] of a block holds bit j of the codes of the block's G components in column f; component i sits at bit i.
So every width from 0 to 8 takes exactly b rows, odd widths included, and a code can take every value of its width.
Plain torch, runs on any device. Layout and worked bytes: SPEC.md.
"""

import torch
from torch import Tensor

from bitsmoe_kernels.format.schema import MAX_BITS, code_dtype, num_blocks


def pack_codes(codes: Tensor, bits: Tensor, block_size: int) -> Tensor:
    """Pack one matrix.

    Args:
        codes: uint8 [C, F], each below 2^bits of its block; ignored where the block has 0 bits.
        bits: uint8 [B], bit-width of each block of components.
        block_size: G, 16 or 32.

    Returns:
        int16 or int32 [sum(bits), F].

    Raises:
        ValueError: a code that does not fit its width.
    """
    C, F = codes.shape
    widths = bits.tolist()
    if len(widths) != num_blocks(C, block_size) or any(not 0 <= b <= MAX_BITS for b in widths):
        raise ValueError(f"{C} components in blocks of {block_size} with block bits {widths}")
    blocks = torch.zeros(len(widths) * block_size, F, dtype=torch.uint8, device=codes.device)
    blocks[:C] = codes
    blocks = blocks.view(len(widths), block_size, F)
    ends = bits.long().cumsum(0)
    words = torch.empty(int(ends[-1]), F, dtype=code_dtype(block_size), device=codes.device)
    for b in bits.unique().tolist():
        if b == 0:
            continue
        chosen = (bits == b).nonzero()[:, 0]
        block = blocks[chosen]
        if int(block.max()) >> b:
            at = int((block.amax((1, 2)) >> b).nonzero()[0])
            raise ValueError(f"block {int(chosen[at])}: code {int(block[at].max())} does not fit {b} bits")
        for j in range(b):
            words[ends[chosen] - b + j] = _join_bits(block >> j & 1).to(words.dtype)
    return words


def _join_bits(plane: Tensor) -> Tensor:
    """Words of one bit-plane [blocks, G, F] of zeros and ones, as signed integers [blocks, F]."""
    n, G, F = plane.shape
    # 16 bits at a time as a matrix product: float32 holds sums below 2^24 exactly, and nothing else is as fast.
    weight = torch.exp2(torch.arange(16, device=plane.device, dtype=torch.float32))
    halves = (weight @ plane.view(n * G // 16, 16, F).float()).view(n, G // 16, F).long()
    words = halves[:, 0] if G == 16 else halves[:, 0] | halves[:, 1] << 16
    # Two's complement: the top bit is the sign of the stored word.
    return words - ((words >> (G - 1)) << G)


def unpack_codes(words: Tensor, bits: Tensor, components: int, block_size: int) -> Tensor:
    """Inverse of `pack_codes`; rows of blocks with 0 bits come back as zeros.

    Args:
        words: int16 or int32 [sum(bits), F].
        bits: uint8 [B].
        components: C.
        block_size: G.

    Returns:
        uint8 [C, F].
    """
    F = words.shape[1]
    B = bits.shape[0]
    out = torch.zeros(B, block_size, F, dtype=torch.uint8, device=words.device)
    ends = bits.long().cumsum(0)
    starts = ends - bits
    lane = torch.arange(block_size, device=words.device, dtype=words.dtype)[:, None]
    for b in bits.unique().tolist():
        if b == 0:
            continue
        blocks = (bits == b).nonzero()[:, 0]
        planes = words[starts[blocks, None] + torch.arange(b, device=words.device)]  # [blocks, b, F]
        value = out.new_zeros(len(blocks), block_size, F)
        for j in range(b):
            value |= ((planes[:, j, None] >> lane) & 1).to(torch.uint8) << j
        out[blocks] = value
    return out.view(B * block_size, F)[:components]
