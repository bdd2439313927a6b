"""How a layer's experts are cut into chunks: what a pass holds in memory, and what processes share among themselves."""

CHUNK_EXPERTS = 16
"""Most experts of a chunk: batches of small matrices save time, and a layer has chunks enough for several processes."""
CHUNK_VALUES = 1 << 27
"""Float32 values that quantizing a chunk may take: bounds memory. One expert may take more."""


def chunk_values(hidden_size: int, intermediate_size: int) -> int:
    """Float32 values that quantizing one expert takes at most.

    Weights and factors come up about twelve times a matrix of [I, H], moments and their factors four times.
    """
    K = max(hidden_size, intermediate_size)
    return 12 * hidden_size * intermediate_size + 4 * K * K


def chunks_of(num_experts: int, hidden_size: int, intermediate_size: int) -> list[range]:
    """The chunks of a layer's experts. They depend on sizes alone, so that any number of processes cuts alike."""
    step = max(1, min(CHUNK_EXPERTS, CHUNK_VALUES // chunk_values(hidden_size, intermediate_size)))
    return [range(i, min(i + step, num_experts)) for i in range(0, num_experts, step)]


def matrix_bytes(hidden_size: int, intermediate_size: int) -> int:
    """Bytes of one of an expert's matrices as it is worked on, float32."""
    return 4 * hidden_size * intermediate_size
