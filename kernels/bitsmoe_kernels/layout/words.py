"""Codes of one width to the words of `fields.py`, and back."""

import torch
from torch import Tensor

from bitsmoe_kernels.layout.fields import GROUP, LANES, PAIRS, TILE, field_place


def positions(kwidth: int) -> Tensor:
    """The component of a tile whose code is (a, c) of each lane, int64 [4, 8, 2]."""
    j, a, c = torch.meshgrid(torch.arange(LANES), torch.arange(PAIRS), torch.arange(2), indexing="ij")
    if kwidth == 2:
        return a * 8 + j * 2 + c
    return (a // 2) * 16 + j * 4 + (a % 2) * 2 + c


def component_places(bits: int, dtype: torch.dtype, kwidth: int) -> Tensor:
    """Where the code of each of a tile's components begins in the mantissa (p of `fields.py`), int64 [64]."""
    out = torch.empty(TILE, dtype=torch.int64)
    place = torch.tensor([field_place(bits, a, dtype == torch.float16) for a in range(PAIRS)])
    out[positions(kwidth).flatten()] = place[None, :, None].expand(LANES, PAIRS, 2).flatten()
    return out


def pack_words(codes: Tensor, bits: int, kwidth: int) -> tuple[Tensor | None, Tensor | None]:
    """Pack the codes of one class into words.

    Args:
        codes: uint8 [64 n, N], below 2^bits; N a multiple of 16.
        bits: 1 to 4.
        kwidth: 2 or 4.

    Returns:
        int32 [n, N, 4, words] or None, int32 [n, N / 16, 8, 4] or None.
    """
    N = codes.shape[1]
    at = positions(kwidth).flatten().to(codes.device)
    n = len(codes) // TILE  # `view` cannot infer it where N is 0
    q = codes.view(n, TILE, N)[:, at].view(n, LANES, PAIRS, 2, N).permute(0, 4, 1, 2, 3).int()
    if bits == 1:
        return None, _in_twos(_joined(q, [(a, c, a + 8 * c) for a in range(PAIRS) for c in (0, 1)]))
    if bits == 2:
        return _joined(q, [(a, c, 2 * a + 16 * c) for a in range(PAIRS) for c in (0, 1)])[..., None], None
    if bits == 4:
        halves = [[(a, c, 4 * (a % 4) + 16 * c) for a in range(4 * h, 4 * h + 4) for c in (0, 1)] for h in (0, 1)]
        return torch.stack([_joined(q, one) for one in halves], -1), None
    wide = _joined(q, [(a, c, 3 * a + 16 * c) for a in range(5) for c in (0, 1)])
    top, low = q[..., 7, :] >> 2, q[..., 7, :] & 3
    wide = wide | top[..., 0] << 15 | top[..., 1] << 31
    narrow = _joined(q, [(a, c, 3 * (a - 5) + 8 * c) for a in (5, 6) for c in (0, 1)])
    return wide[..., None], _in_twos(narrow | low[..., 0] << 6 | low[..., 1] << 14)


def _in_twos(narrow: Tensor) -> Tensor:
    """16-bit words [n, N, 4] of outputs n and n + 8 in one word each."""
    low, high = narrow.view(len(narrow), -1, 2, GROUP // 2, LANES).unbind(2)
    return low | high << 16


def _one_by_one(narrow: Tensor) -> Tensor:
    """Inverse of `_in_twos`."""
    return torch.stack([narrow & 0xFFFF, narrow >> 16 & 0xFFFF], 2).view(len(narrow), -1, LANES)


def _joined(q: Tensor, places: list[tuple[int, int, int]]) -> Tensor:
    word = torch.zeros(q.shape[:-2], dtype=torch.int32, device=q.device)
    for a, c, at in places:
        word |= q[..., a, c] << at
    return word


def unpack_words(wide: Tensor | None, narrow: Tensor | None, bits: int, kwidth: int) -> Tensor:
    """Inverse of `pack_words`: uint8 [64 n, N]."""
    some = wide if wide is not None else narrow
    assert some is not None
    if narrow is not None:
        narrow = _one_by_one(narrow)
    n, N = (wide if wide is not None else narrow).shape[:2]  # type: ignore[union-attr]
    q = torch.zeros(n, N, LANES, PAIRS, 2, dtype=torch.int32, device=some.device)
    mask = (1 << bits) - 1
    for a in range(PAIRS):
        for c in (0, 1):
            if bits == 1:
                assert narrow is not None
                q[..., a, c] = narrow >> (a + 8 * c) & 1
            elif bits == 2:
                assert wide is not None
                q[..., a, c] = wide[..., 0] >> (2 * a + 16 * c) & mask
            elif bits == 4:
                assert wide is not None
                q[..., a, c] = wide[..., a // 4] >> (4 * (a % 4) + 16 * c) & mask
            else:
                assert wide is not None
                assert narrow is not None
                if a < 5:
                    q[..., a, c] = wide[..., 0] >> (3 * a + 16 * c) & mask
                elif a < 7:
                    q[..., a, c] = narrow >> (3 * (a - 5) + 8 * c) & mask
                else:
                    top = wide[..., 0] >> (15 + 16 * c) & 1
                    q[..., a, c] = (narrow >> (6 + 8 * c) & 3) | top << 2
    out = torch.empty(n, TILE, N, dtype=torch.uint8, device=some.device)
    out[:, positions(kwidth).flatten().to(some.device)] = q.permute(0, 2, 3, 4, 1).reshape(n, TILE, N).to(torch.uint8)
    return out.view(n * TILE, N)
