"""Round-to-nearest in groups of 128, asymmetric, on the routed experts: the floor every quantizer must clear.

    python -m benchmarks.rtn MODEL OUT --bits 3

writes an ordinary checkpoint with the rounded weights, to be measured with `bitsmoe eval`. Its bits per weight are
bits + (16 + bits) / 128: one float16 scale and one zero point for each group of 128 weights along the input.
"""

import argparse
import json
from pathlib import Path

from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.shards import ShardWriter
from offline_quant.model_adapter import SourceModel
from offline_quant.output import copy_side_files, new_directory

GROUP = 128


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """Round [N, K] in groups of GROUP along K, with float16 scales and integer zero points. Returns float32 [N, K]."""
    groups = weight.float().reshape(weight.shape[0], -1, GROUP)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    top = 2**bits - 1
    scale = ((high - low) / top).half().float().clamp(min=1e-8)
    zero = (-low / scale).round().clamp(0, top)
    codes = (groups / scale + zero).round().clamp(0, top)
    return ((codes - zero) * scale).reshape(weight.shape)


def write_rounded(model: Path, out: Path, bits: int) -> float:
    """Write `model` with rounded experts to `out`; returns the bits per weight that takes."""
    source = SourceModel(model)
    sizes = source.shape.hidden_size, source.shape.intermediate_size
    if any(size % GROUP for size in sizes):
        raise BitsmoeError(f"{model}: hidden_size and intermediate_size {sizes} must be multiples of {GROUP}")
    with new_directory(out) as scratch:
        writer = ShardWriter(scratch)
        for name in source.tensors:
            tensor = source.tensors.get(name)
            if source.shape.is_expert_tensor(name):
                rows = tensor.flatten(0, -2)
                tensor = round_to_nearest(rows, bits).view(tensor.shape)
            writer.add(name, tensor)
        writer.finish()
        config = {k: v for k, v in source.config.items() if k not in ("dtype", "torch_dtype")}
        config["torch_dtype"] = "float32"
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_side_files(model, scratch)
    return bits + (16 + bits) / GROUP


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=3, choices=range(1, 9))
    args = parser.parse_args()
    print(f"{args.out}: {write_rounded(args.model, args.out, args.bits):.3f} bits per weight")


if __name__ == "__main__":
    main()
