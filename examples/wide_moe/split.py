#!/usr/bin/env python3
"""Split every expert of a Qwen3-MoE checkpoint into two narrower ones.

  split.py examples/tiny_moe split            # the same function up to the noise that parts the halves
  split.py examples/tiny_moe split --noise 0  # exactly the same function

An expert is a sum over its intermediate channels, so two experts with half of the channels each add up to it. Both
halves start with the router row of the whole: they are chosen together, and among twice as many experts with twice the
top-k each gets half the routing weight, which doubled `down_proj` weights make good. The channels are drawn at random.
Equal rows would stay equal for ever; `--noise` moves the two apart by the same random vector with opposite signs.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

EXPERT = re.compile(r"(.*\.experts\.)(\d+)\.gate_proj\.weight")


def split(tensors: dict[str, torch.Tensor], noise: float, seed: int) -> dict[str, torch.Tensor]:
    """Replace expert e by experts 2e and 2e + 1, and router row e by two rows that differ from it by `noise` norms."""
    random = torch.Generator().manual_seed(seed)
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for name in sorted(tensors):
        if match := EXPERT.fullmatch(name):
            prefix, expert = match[1], int(match[2])
            gate, up, down = (tensors[f"{prefix}{expert}.{part}_proj.weight"] for part in ("gate", "up", "down"))
            channels = torch.randperm(gate.shape[0], generator=random)
            for half, chosen in enumerate(channels.chunk(2)):
                new = f"{prefix}{2 * expert + half}."
                out[new + "gate_proj.weight"] = gate[chosen]
                out[new + "up_proj.weight"] = up[chosen]
                out[new + "down_proj.weight"] = 2 * down[:, chosen]
        elif name.endswith(".mlp.gate.weight"):
            rows = tensors[name].float()
            apart = torch.randn(rows.shape, generator=random)
            apart *= noise * rows.norm(dim=1, keepdim=True) / apart.norm(dim=1, keepdim=True)
            out[name] = torch.stack([rows + apart, rows - apart], dim=1).flatten(0, 1)
    return out


def main() -> None:
    """Read one checkpoint directory and write another, in the weights' own dtype but for float32 router rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--noise", type=float, default=0.5, help="length of the vector, over the router row's length")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    config = json.loads((args.source / "config.json").read_text())
    if config["moe_intermediate_size"] % 2 or not config["norm_topk_prob"]:
        parser.error(f"{args.source}: needs an even moe_intermediate_size and norm_topk_prob")
    config["moe_intermediate_size"] //= 2
    config["num_experts"] *= 2
    config["num_experts_per_tok"] *= 2

    args.out.mkdir(parents=True, exist_ok=True)
    tensors = split(load_file(args.source / "model.safetensors"), args.noise, args.seed)
    save_file({k: v.contiguous() for k, v in tensors.items()}, args.out / "model.safetensors", {"format": "pt"})
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in (*args.source.glob("*token*.json"), args.source / "generation_config.json"):
        shutil.copy(path, args.out)


if __name__ == "__main__":
    main()
