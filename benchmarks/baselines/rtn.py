"""Round-to-nearest in groups, asymmetric, on every routed expert: the floor every quantizer must clear."""

from typing import Any

from torch import Tensor

from benchmarks.baselines.job import Job, Outcome, all_in_bpw, expert_matrices, main

BITS = (1, 2, 3, 4, 5, 6, 7, 8)
SETTINGS: dict[str, Any] = {"group_size": 128}


def round_to_nearest(weight: Tensor, bits: int, group_size: int = SETTINGS["group_size"]) -> Tensor:
    """Round [N, K] in groups along K, with float16 scales and integer zero points. Returns float32 [N, K]."""
    groups = weight.float().reshape(weight.shape[0], -1, group_size)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    top = 2**bits - 1
    scale = ((high - low) / top).half().float().clamp(min=1e-8)
    zero = (-low / scale).round().clamp(0, top)
    codes = (groups / scale + zero).round().clamp(0, top)
    return ((codes - zero) * scale).reshape(weight.shape)


def quantize(job: Job) -> Outcome:
    """Round each expert matrix by itself."""
    size = job.settings["group_size"]
    with job.stage("load"):
        weights = expert_matrices(job.model, job.names)
    with job.stage("quantize"):
        experts = {name: round_to_nearest(weight, job.bits, size) for name, weight in weights.items()}
    return Outcome(experts, *all_in_bpw([w.shape for w in weights.values()], job.bits, size, job.bits))


if __name__ == "__main__":
    main(quantize, ["torch"])
