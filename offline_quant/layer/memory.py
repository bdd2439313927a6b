"""Memory and disk that planning and quantizing one layer take."""

from offline_quant.calibration.output_sample import SLOT_VALUES
from offline_quant.model.expert_inputs import expert_input_bytes
from offline_quant.model.sizes import DOUBLE, FLOAT, RunSizes
from offline_quant.runtime.chunks import chunk_values
from offline_quant.runtime.offload import MEMORY_BYTES


def kept_bytes(sizes: RunSizes) -> int:
    """Bytes that stay in memory while a layer is worked on: inputs of its experts, and the offload cache."""
    s = sizes.shape
    E, H, I = s.num_experts, s.hidden_size, s.intermediate_size  # noqa: E741
    # Moments and their factors of both sides, activations, and dequantized down matrices.
    offloaded = FLOAT * (E * (4 * H * H + 3 * I * I) + sizes.tokens * sizes.top_k * I + E * H * I)
    return expert_input_bytes(sizes) + min(MEMORY_BYTES, offloaded)


def offload_disk_bytes(sizes: RunSizes, fit: bool = False) -> int:
    """Bytes on disk of what the offload cache must keep, once memory is full: activations and down matrices.

    Args:
        sizes: of the run.
        fit: whether the experts of a layer are fitted together, with their moments.
    """
    E, H, I = sizes.shape.num_experts, sizes.shape.hidden_size, sizes.shape.intermediate_size  # noqa: E741
    needed = sizes.tokens * sizes.top_k * I + E * H * I
    if fit:
        needed += E * I * I + sizes.chunk_experts * H * I
    return max(0, FLOAT * needed - MEMORY_BYTES)


def layer_bytes(sizes: RunSizes, fit: bool = False, tune: bool = False, bases: bool = True) -> int:
    """Bytes of memory that planning and quantizing a layer take.

    Args:
        sizes: of the run.
        fit: whether the experts of a layer are fitted together: all down matrices, a target, what is left over of it.
        tune: whether scales and codes are tuned, which takes a whole layer and its optimizer's state.
        bases: whether a decomposition with shared bases may be chosen.
    """
    H, I, coded = sizes.shape.hidden_size, sizes.shape.intermediate_size, sizes.coded_bytes  # noqa: E741
    worked = FLOAT * sizes.chunk_experts * chunk_values(H, I)
    slots = min(SLOT_VALUES, sizes.tokens * sizes.top_k * H)
    return (
        kept_bytes(sizes)
        + sizes.mapped_bytes
        + max(
            coded + (sizes.chunk_bytes if sizes.device.type == "cuda" else worked),
            8 * DOUBLE * H * H if bases else 0,
            coded + FLOAT * (sizes.layer_weights + sizes.tokens * (3 * H + I)) if fit else 0,
            2 * coded + FLOAT * (5 * sizes.layer_weights + 3 * sizes.tokens * H) if tune else 0,
            # Slots of some tokens; an expert's share of them, their sums, and the output they make.
            coded + FLOAT * (slots + 3 * slots // sizes.top_k),
        )
    )
