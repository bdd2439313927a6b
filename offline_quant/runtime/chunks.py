"""How a layer's experts are cut into chunks: what a pass holds in memory, and what processes share among themselves."""

import math

import torch

CHUNK_EXPERTS = 16
"""Most experts of a chunk: batches of small matrices save time, and a layer has chunks enough for several processes."""
CHUNK_VALUES = 1 << 27
"""Float32 values that quantizing a chunk may take: bounds memory. One expert may take more."""
GPU_CHUNK_EXPERTS = 64
"""Most experts of a chunk on a GPU: rounding a row takes a hundred launches there, for one expert as for many."""
GPU_SHARE = 4
"""A chunk takes at most this part of a GPU's memory. What is kept between passes may take as much."""


def chunk_values(hidden_size: int, intermediate_size: int) -> int:
    """Float32 values that quantizing one expert takes at most.

    Weights and factors come up about twelve times a matrix of [I, H], moments and their factors four times.
    """
    K = max(hidden_size, intermediate_size)
    return 12 * hidden_size * intermediate_size + 4 * K * K


def gpu_share(device: torch.device) -> int:
    """Bytes of a GPU's memory that one purpose may take; 0 for other devices."""
    return torch.cuda.get_device_properties(device).total_memory // GPU_SHARE if device.type == "cuda" else 0


def chunks_of(num_experts: int, hidden_size: int, intermediate_size: int, share: int) -> list[range]:
    """The chunks of a layer's experts, of equal size as far as may be.

    Args:
        num_experts, hidden_size, intermediate_size: of the layer.
        share: `gpu_share` of the device that works on them; where several processes share a layer, the smallest one,
            so that all cut alike.
    """
    most, values = (GPU_CHUNK_EXPERTS, share // 4) if share else (CHUNK_EXPERTS, CHUNK_VALUES)
    step = max(1, min(most, values // chunk_values(hidden_size, intermediate_size)))
    step = math.ceil(num_experts / math.ceil(num_experts / step))
    return [range(i, min(i + step, num_experts)) for i in range(0, num_experts, step)]


def matrix_bytes(hidden_size: int, intermediate_size: int) -> int:
    """Bytes of one matrix of an expert in float32."""
    return 4 * hidden_size * intermediate_size
