"""The sound checkpoints that are damaged: tiny, one of every form, quantized and not, as bytes by file name."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitsmoe_kernels.format.safetensors_io import ShardWriter
from bitsmoe_kernels.models.families import FAMILIES, moe_shape
from builders import FORMS, build_form, write_checkpoint

E, H, I, LAYERS, VOCAB = 3, 40, 56, 2, 8  # noqa: E741 - the format's symbols
SHARD_BYTES = 9_000
"""Three to five shards for each of these checkpoints."""


@dataclass(frozen=True)
class Base:
    """A sound checkpoint."""

    name: str
    quantized: bool
    files: dict[str, bytes]


def all_bases() -> list[Base]:
    """Every form in one file and in shards, every way experts and factors of an unquantized model are stored."""
    bases = []
    for i, form in enumerate(FORMS):
        for sharded in (False, True):
            # Both block sizes with both kinds of files, over the forms.
            bases.append(_quantized(form, (16, 32)[(i + sharded) % 2], sharded))
    bases += [
        _quantized("extras", 16, False, "NemotronHForCausalLM"),
        _source("NemotronHForCausalLM", "apart", torch.bfloat16, False),
        _source("Qwen3MoeForCausalLM", "apart", torch.bfloat16, True),
        _source("Qwen2MoeForCausalLM", "fused", torch.float32, False),
        _source("MixtralForCausalLM", "apart", torch.float16, False),
        _source("DeepseekV3ForCausalLM", "float8", torch.bfloat16, True),
        _source("DeepseekV3ForCausalLM", "float8", torch.bfloat16, False),
    ]
    return bases


def _model_config(architecture: str) -> dict[str, Any]:
    family = FAMILIES[architecture]
    config = {
        "architectures": [architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "hidden_size": H,
        "vocab_size": VOCAB,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        family.num_experts_key: E,
        family.intermediate_size_key: I,
    }
    if family.model_type == "deepseek_v3":
        config["first_k_dense_replace"] = 1
    elif family.model_type.startswith("qwen"):
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    elif family.lists_layers:
        config |= {"hybrid_override_pattern": "E" * LAYERS, "mlp_hidden_act": "relu2"}
    return config


def _others() -> dict[str, Tensor]:
    return {"model.embed_tokens.weight": torch.ones(VOCAB, H).bfloat16(), "model.norm.weight": torch.ones(H).bfloat16()}


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def _quantized(form: str, block_size: int, sharded: bool, architecture: str = "Qwen3MoeForCausalLM") -> Base:
    config = _model_config(architecture)
    shape = moe_shape(config, architecture)
    sizes: dict[str, Any] = {"num_experts": E, "hidden_size": H, "intermediate_size": I, "block_size": block_size}
    layers = {shape.prefix(i): build_form(form, gated=shape.family.gated, seed=i, **sizes) for i in shape.layers}
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(
            Path(name), layers, other_tensors=_others(), model_config=config,
            max_shard_bytes=SHARD_BYTES if sharded else 10**9,
        )  # fmt: skip
        own = "" if shape.family.gated else "-no gate"
        return Base(f"{form}{own}-{block_size}-{'shards' if sharded else 'file'}", True, _files(Path(name)))


def _source(architecture: str, form: str, dtype: torch.dtype, sharded: bool) -> Base:
    config = _model_config(architecture)
    shape = moe_shape(config, architecture)
    tensors = _others()
    gen = torch.Generator().manual_seed(0)
    for layer in shape.layers:
        gate_up, down = torch.randn(E, 2 * I, H, generator=gen) / 8, torch.randn(E, H, I, generator=gen) / 8
        if form == "fused":
            tensors |= {f"{shape.prefix(layer)}.gate_up_proj": gate_up, f"{shape.prefix(layer)}.down_proj": down}
            continue
        for e in range(E):
            inputs = gate_up[e].chunk(2)[-shape.input_matrices :]
            tensors |= dict(zip(shape.expert_names(layer, e), (*inputs, down[e]), strict=True))
    if form == "float8":
        config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
        for name in [n for n in tensors if ".experts." in n]:
            rows, columns = tensors[name].shape
            tensors[f"{name}_scale_inv"] = torch.full((-(-rows // 16), -(-columns // 16)), 0.5)
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    with tempfile.TemporaryDirectory() as name:
        writer = ShardWriter(Path(name), SHARD_BYTES if sharded else 10**9)
        for key, tensor in tensors.items():
            keep = tensor.dtype == torch.float8_e4m3fn or key.endswith("_scale_inv")
            writer.add(key, tensor if keep else tensor.to(dtype))
        writer.finish()
        (Path(name) / "config.json").write_text(json.dumps(config))
        return Base(f"{architecture}-{form}-{'shards' if sharded else 'file'}", False, _files(Path(name)))
