"""The device that layers are worked on."""

from contextlib import AbstractContextManager

import torch

from bitsmoe_kernels.errors import BitsmoeError


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
    """Within this, matrix products and attention take bfloat16 where the device has instructions for it."""
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast, cache_enabled=False)
