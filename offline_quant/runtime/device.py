"""The device that layers are worked on."""

import time
from contextlib import AbstractContextManager
from functools import cache

import torch

from bitsmoe_kernels.errors import BitsmoeError

PROBE_SIZE, PROBES = 512, 5
"""Rows and columns of the matrices that are multiplied to learn the faster dtype, and how often."""
FASTER = 1.25
"""How much faster bfloat16 must be to be taken."""


def check_device(device: str) -> None:
    """Refuse a device torch does not have.

    Raises:
        BitsmoeError: names it.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise BitsmoeError(f"--device {device}: must be cpu, cuda or cuda:N")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise BitsmoeError(
            f"--device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA device(s); use one of "
            "those, or --device cpu"
        )


def bfloat16_products(device: torch.device) -> AbstractContextManager[object]:
    """Within this, matrix products and attention take bfloat16 where the device is faster with it."""
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else bfloat16_is_faster()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast, cache_enabled=False)


@cache
def bfloat16_is_faster() -> bool:
    """Whether this processor multiplies bfloat16 clearly faster than float32; measured once, in less than a second.

    Instructions for it do not tell. With the same ones an AMD EPYC was four times as fast, and an Intel Xeon without
    matrix units took twice as long.
    """
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    taken = {dtype: _product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return FASTER * taken[torch.bfloat16] < taken[torch.float32]


def _product_seconds(dtype: torch.dtype) -> float:
    """Processor time of a matrix product, the least of several."""
    x = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype)
    taken = []
    for _ in range(PROBES):
        began = time.process_time()
        x @ x
        taken.append(time.process_time() - began)
    return min(taken)
