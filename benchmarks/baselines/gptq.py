"""GPTQ as llm-compressor runs it, on every routed expert."""

from typing import Any

import torch

from benchmarks.baselines.job import EXPERT, Job, Outcome, all_in_bpw, main, on_grid

BITS = (2, 3, 4, 8)
SETTINGS: dict[str, Any] = {
    "group_size": 128,
    "symmetric": False,
    "actorder": "static",
    "observer": "memoryless_minmax",
    "calibrate_all_experts": True,
    "dampening_frac": 0.01,
    "dtype": "float32",
    "batch_size": 1,
}
"""Those of the library, but for `symmetric` (its presets for 2 and 3 bits are symmetric, which measures worse) and
`dtype` (it takes that of the checkpoint; float32 spares it the rounding of bfloat16)."""


def quantize(job: Job) -> Outcome:
    """Run `oneshot` with a GPTQModifier that sees the experts only."""
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    s = job.settings
    with job.stage("load"):
        # Experts are one 3-D tensor in transformers; the library makes them Linear modules, as its examples do.
        model = AutoModelForCausalLM.from_pretrained(str(job.model), dtype=getattr(torch, s["dtype"]))
        linearize_moe(model)
    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in job.windows]
    weights = {
        "num_bits": job.bits,
        "type": "int",
        "strategy": "group",
        "group_size": s["group_size"],
        "symmetric": s["symmetric"],
        "observer": s["observer"],
    }
    recipe = GPTQModifier(
        actorder=s["actorder"],
        dampening_frac=s["dampening_frac"],
        config_groups={"experts": {"targets": [f"re:.*{EXPERT}"], "weights": weights}},
    )
    with job.stage("quantize"):
        oneshot(
            model=model,
            dataset=DataLoader(samples, batch_size=s["batch_size"]),  # type: ignore[arg-type]
            recipe=recipe,
            moe_calibrate_all_experts=s["calibrate_all_experts"],
        )
    experts, codes = {}, range(-(2 ** (job.bits - 1)), 2 ** (job.bits - 1))
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            scale = module.weight_scale.data
            zero = torch.zeros_like(scale) if s["symmetric"] else module.weight_zero_point.data
            experts[f"{name}.weight"] = on_grid(module.weight.data, scale, zero, codes)
    return Outcome(
        experts,
        *all_in_bpw([w.shape for w in experts.values()], job.bits, s["group_size"], 0 if s["symmetric"] else job.bits),
    )


if __name__ == "__main__":
    main(quantize, ["llmcompressor", "compressed-tensors", "transformers", "torch"])
