"""The second cut: more and smaller experts with real routing.

The MLP of every layer becomes 24 experts of 64 channels, in the form of Mixtral; 18 are active for a token. An expert
is a cluster of channels that are active for the same tokens of C4. A router is first fitted layer by layer: to the
logarithms of the energies of experts' outputs on the dense model's hidden states. Then routers, norms and scales of the
experts' channels are trained together on the dense model's logits. All other weights are those of the dense model.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.real_model import all_active
from benchmarks.real_model.routing import RoutedMLP, distill, route
from offline_quant.calibration.sources.registry import open_text
from offline_quant.calibration.windows import load_tokenizer, text_windows

MODEL = "smol_routed"
EXPERTS, ACTIVE = 24, 18
SEED = 0
LENGTH = 512
"""Tokens in a window."""
FIT_WINDOWS, STEPS = 16, 64
"""Windows that routers are fitted on, and that are trained on."""
RATE = 1e-2


def make(folder: Path) -> None:
    """Write the second cut beside the first, which must be there, unless it is there.

    Args:
        folder: of `all_active.make`.
    """
    directory, first = folder / MODEL, folder / all_active.MODEL
    if (directory / "config.json").is_file():
        return
    teacher, student = dense_model(first), dense_model(first)
    text, tokenizer = str(folder / all_active.CALIBRATION), load_tokenizer(first)
    fitted, trained = (text_windows(tokenizer, open_text(text), LENGTH, count, SEED) for count in (FIT_WINDOWS, STEPS))
    print(f"{MODEL}: fitting routers, then {STEPS} steps of training", file=sys.stderr, flush=True)
    put_experts(student, fitted, EXPERTS, ACTIVE, SEED)
    distill(student, teacher, trained, RATE)
    write(student, first, directory)


def dense_model(first: Path) -> Any:
    """The dense model that the first cut computes, a Llama of transformers in float32.

    Args:
        first: directory of the first cut.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = json.loads((first / "config.json").read_text(encoding="utf-8"))
    stored, experts = load_file(first / "model.safetensors"), config["num_local_experts"]
    same = {k: v for k, v in config.items() if k not in ("architectures", "model_type", "torch_dtype")}
    size = {"intermediate_size": experts * config["intermediate_size"]}
    model = LlamaForCausalLM(LlamaConfig(**same | size)).float().eval()
    tensors = {k: v for k, v in stored.items() if ".block_sparse_moe." not in k}
    for layer in range(config["num_hidden_layers"]):
        gate, up, down = ([stored[all_active.expert_name(layer, e, part)] for e in range(experts)] for part in range(3))
        mlp = f"model.layers.{layer}.mlp"
        tensors |= {f"{mlp}.gate_proj.weight": torch.cat(gate), f"{mlp}.up_proj.weight": torch.cat(up)}
        tensors[f"{mlp}.down_proj.weight"] = torch.cat(down, 1) / experts
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model


@torch.no_grad()
def put_experts(model: Any, windows: Tensor, experts: int, active: int, seed: int) -> None:
    """Replace every MLP of a dense model by routed experts, see `routing.route`.

    Args:
        model: a Llama of transformers.
        windows: int64 [n, L], what routers are fitted on.
        experts: how many in a layer.
        active: how many of them for a token.
        seed: of the clusters.
    """
    inputs: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].flatten(0, -2)))
        for layer, kept in zip(model.model.layers, inputs, strict=True)
    ]
    for ids in windows:
        model.model(ids[None])
    for hook in hooks:
        hook.remove()
    for layer, kept in zip(model.model.layers, inputs, strict=True):
        gate, up, down = (getattr(layer.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
        layer.mlp = route(gate, up, down, torch.cat(kept), experts, active, seed)
        kept.clear()


def write(model: Any, first: Path, directory: Path) -> None:
    """Write a model with `RoutedMLP`s as a Mixtral in bfloat16.

    Args:
        model: a Llama of transformers.
        first: directory of the first cut: the rest of config.json, and the tokenizer.
        directory: to be written.
    """
    tensors = {k: v for k, v in model.state_dict().items() if ".mlp." not in k and k != "lm_head.weight"}
    for index, layer in enumerate(model.model.layers):
        mlp: RoutedMLP = layer.mlp
        tensors[all_active.router_name(index)] = mlp.router.detach()
        for expert, parts in enumerate(mlp.experts()):
            tensors |= {all_active.expert_name(index, expert, part): w for part, w in enumerate(parts)}
    directory.mkdir(parents=True, exist_ok=True)
    save_file({k: v.bfloat16().contiguous() for k, v in tensors.items()}, directory / "model.safetensors")
    for file in first.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, directory)
    config = json.loads((first / "config.json").read_text(encoding="utf-8"))
    size, experts = len(mlp.gate) // len(mlp.router), len(mlp.router)
    config |= {"intermediate_size": size, "num_local_experts": experts, "num_experts_per_tok": mlp.active}
    # Written last: it says that the model is complete.
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
