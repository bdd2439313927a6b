"""AutoRound (signed gradient descent on rounding and clipping, block by block), on every routed expert."""

import os
from typing import Any

import torch

from benchmarks.baselines.job import Job, Outcome, all_in_bpw, is_expert, main, on_grid, tensors

BITS = (2, 3, 4, 8)
SETTINGS: dict[str, Any] = {
    "group_size": 128, "symmetric": False, "alg_ext": False, "amp": True, "iters": 200, "batch_size": 8,
    "seqlen": None,
}  # fmt: skip
"""Those of the library, but for `symmetric`, which measures worse at 2 bits, and for `seqlen`: the tokens of a window,
None for those that all methods calibrate on, else a divisor of their number. `alg_ext` is its better start of scales,
which needs `symmetric`; it advises it at 2 bits, with 1,000 iterations. Without `amp` it computes in float32 instead of
bfloat16."""


def quantize(job: Job) -> Outcome:
    """Run `AutoRound.quantize` with everything but the experts left at 16 bits."""
    # Left to itself, the library looks for the modules' names in the files, which Mixtral's do not have.
    os.environ["AR_DISABLE_META_LOAD"] = "1"
    from auto_round import AutoRound
    from auto_round.schemes import QuantizationScheme
    from transformers import AutoTokenizer

    s = job.settings
    matrices = [name.removesuffix(".weight") for name, tensor in tensors(job.model, job.names) if tensor.ndim == 2]
    # A mask of ones: left to itself, the library would take the document-opening token for padding.
    windows = job.windows.reshape(-1, s["seqlen"] or job.windows.shape[1])
    batches = [{"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)} for ids in windows.split(s["batch_size"])]
    with job.stage("load"):
        tuner = AutoRound(
            str(job.model),
            AutoTokenizer.from_pretrained(str(job.model)),
            scheme=QuantizationScheme(
                bits=job.bits, group_size=s["group_size"], sym=s["symmetric"], data_type="int", act_bits=16
            ),
            layer_config={n: {"bits": 16} for n in matrices if ".layers." in n and not is_expert(n)},
            dataset=batches,
            iters=s["iters"],
            enable_alg_ext=s["alg_ext"],
            amp=s["amp"],
            seqlen=windows.shape[1],
            nsamples=len(windows),
            batch_size=s["batch_size"],
            enable_torch_compile=False,
            device_map="cuda" if torch.cuda.is_available() else "cpu",
        )
    with job.stage("quantize"):
        model, _ = tuner.quantize()
    experts, codes = {}, range(2**job.bits)
    for name, module in model.named_modules():
        if is_expert(name):
            scale = module.scale.data.reshape(module.weight.shape[0], -1)
            zero = torch.as_tensor(module.zp)  # a number where symmetric
            zero = zero.expand_as(scale) if zero.numel() == 1 else zero.reshape(scale.shape)
            experts[f"{name}.weight"] = on_grid(module.weight.data, scale, zero, codes)
    return Outcome(
        experts,
        *all_in_bpw([w.shape for w in experts.values()], job.bits, s["group_size"], 0 if s["symmetric"] else job.bits),
    )


if __name__ == "__main__":
    main(quantize, ["auto-round", "transformers", "torch"])
