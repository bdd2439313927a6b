"""HQQ (half-quadratic quantization, calibration-free), on every routed expert."""

from typing import Any

import torch

from benchmarks.baselines.job import Job, Outcome, all_in_bpw, expert_matrices, main

BITS = (2, 3, 4, 8)
SETTINGS: dict[str, Any] = {"group_size": 64, "axis": 1}
"""The library's group size, and the axis its fast kernels need; the other axis measures the same."""
ZERO_BITS = 16
"""Zero points are not whole numbers here, and kept in float16."""


def quantize(job: Job) -> Outcome:
    """Put each expert matrix through `HQQLinear` and back."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    s = job.settings
    with job.stage("load"):
        weights = expert_matrices(job.model, job.names)
    config = BaseQuantizeConfig(nbits=job.bits, group_size=s["group_size"], axis=s["axis"])
    layers = {}
    with job.stage("quantize"):
        for name, weight in weights.items():
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
            layers[name] = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
    bpw, formula = all_in_bpw([w.shape for w in weights.values()], job.bits, s["group_size"], ZERO_BITS)
    count = sum(w.numel() for w in weights.values())
    stored = sum(t.nbytes for q in layers.values() for t in (q.W_q, q.meta["scale"], q.meta["zero"]))
    experts = {name: layer.dequantize().float() for name, layer in layers.items()}
    return Outcome(experts, bpw, formula, 8 * stored / count)


if __name__ == "__main__":
    main(quantize, ["hqq", "torch"])
