"""Plain Triton kernels for comparison: a grouped GEMM on bfloat16/float16 or 4-bit weights, silu(gate) * up.

Nothing clever: tokens are the left operand, 4-bit codes are shifted, converted and multiplied out one by one. What our
own kernels gain over the usual way is to be read off against these; vLLM's and others' are the real competition.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.kernels.experts import GROUP
from bitsmoe_kernels._triton.codes import product, rounded
from bitsmoe_kernels.backends import triton_launch as moe

INNER = 64
"""Inputs of one turn of the loop."""
PER_WORD = 8
"""Codes of 4 bits in an int32."""


@triton.jit
def _grouped_kernel(x, weight, scale, block_expert, block_slot, num_blocks, slot_weight, out, N, K,
                    ROWS_PER: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                    PER_GROUP: tl.constexpr, WEIGHTED: tl.constexpr, FP16: tl.constexpr,
                    ASM: tl.constexpr):  # fmt: skip
    """out [slot, N] = x [slot / ROWS_PER, K] @ W[expert of the slot].T; weight [E, N, K] or int32 [E, N, K / 8]."""
    block = tl.program_id(1)
    if block >= tl.load(num_blocks):
        return
    expert = tl.load(block_expert + block).to(tl.int64)
    slot = tl.load(block_slot + block * BM + tl.arange(0, BM))
    valid = slot >= 0
    row = tl.where(valid, slot, 0).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < N
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=3):
        k = k0 + tl.arange(0, BK)
        left = tl.load(x + (row // ROWS_PER)[:, None] * K + k[None, :], mask=valid[:, None], other=0.0)
        if BITS == 4:
            at = k0 // 8 + tl.arange(0, BK // 8)
            words = tl.load(weight + (expert * N + n[:, None]) * (K // 8) + at[None, :], mask=inside[:, None], other=0)
            codes = (words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 15
            right = tl.reshape((codes - 8).to(tl.float32), (BN, BK)).to(left.dtype)
            part = product(left, tl.trans(right), tl.zeros((BM, BN), tl.float32), ASM)
            s = tl.load(scale + (expert * N + n) * (K // PER_GROUP) + k0 // PER_GROUP, mask=inside, other=0.0)
            acc += part * s.to(tl.float32)[None, :]
        else:
            right = tl.load(weight + (expert * N + n[None, :]) * K + k[:, None], mask=inside[None, :], other=0.0)
            acc = product(left, right, acc, ASM)
    if WEIGHTED:
        acc *= tl.load(slot_weight + row)[:, None]
    tl.store(out + row[:, None] * N + n[None, :], rounded(acc, FP16, ASM), mask=valid[:, None] & inside[None, :])


@triton.jit
def _silu_kernel(both, out, I, CHUNK: tl.constexpr, FP16: tl.constexpr, ASM: tl.constexpr):  # noqa: E741
    """out [S, I] = silu(both[:, :I]) * both[:, I:]."""
    s, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    gate = tl.load(both + s * 2 * I + i, mask=i < I, other=0.0).to(tl.float32)
    up = tl.load(both + s * 2 * I + I + i, mask=i < I, other=0.0).to(tl.float32)
    tl.store(out + s * I + i, rounded(gate * tl.sigmoid(gate) * up, FP16, ASM), mask=i < I)


def tile_of(mean: float) -> tuple[int, int, int]:
    """Slots of a block, outputs of a program and its warps, for so many slots of an expert on average."""
    block = next((m for m in (16, 32, 64) if mean <= m), 128)
    return (block, 64, 4) if block == 16 else (block, 128, 4 if block < 128 else 8)


def silu_and_mul(both: Tensor, out: Tensor) -> None:
    """out [S, I] = silu(gate) * up of both [S, 2 I]."""
    S, I = out.shape  # noqa: E741
    _silu_kernel[(S, -(-I // 1024))](both, out, I, CHUNK=1024, FP16=out.dtype == torch.float16, ASM=out.is_cuda)


def grouped_forward(
    x: Tensor, weights: Tensor, ids: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, bits: int
) -> Tensor:
    """The layer by two grouped GEMMs.

    Args:
        x: [T, H].
        weights: float32 [T, top_k].
        ids: int32 [T, top_k].
        w13: [E, 2 I, H] in x's dtype, or int32 [E, 2 I, H / 8] of codes.
        s13: [E, 2 I, H / 128]; unread at 16 bits.
        w2: [E, H, I] or int32 [E, H, I / 8].
        s2: [E, H, I / 128].
        bits: 16 or 4.
    """
    T, top_k = ids.shape
    S, E, both, H = T * top_k, len(w13), w13.shape[1], x.shape[1]
    BM, BN, warps = tile_of(S / E)
    BK = INNER
    route = moe._route(ids, None, E, BM, 1, None)
    fp16 = x.dtype == torch.float16
    common = {"BITS": bits, "BM": BM, "BN": BN, "BK": BK, "PER_GROUP": GROUP, "FP16": fp16, "ASM": x.is_cuda,
              "num_warps": warps}  # fmt: skip
    gate_up, hidden = x.new_empty(S, both), x.new_empty(S, both // 2)
    tables = route.block_expert, route.block_slot, route.num_blocks, weights
    _grouped_kernel[(-(-both // BN), route.max_blocks)](
        x, w13, s13, *tables, gate_up, both, H, ROWS_PER=top_k, WEIGHTED=False, **common
    )
    silu_and_mul(gate_up, hidden)
    y = x.new_empty(S, H)
    _grouped_kernel[(-(-H // BN), route.max_blocks)](
        hidden, w2, s2, *tables, y, H, both // 2, ROWS_PER=1, WEIGHTED=True, **common
    )
    return y.view(T, top_k, H).sum(1)
