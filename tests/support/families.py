"""Small random models of every architecture in the table, with the demo model's tokenizer."""

import json
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bitsmoe_kernels.format.linear_layers import DenseBits, pack
from bitsmoe_kernels.models.families import FAMILIES, Family, moe_shape
from builders import TINY_MOE, build_form, with_act, write_checkpoint
from offline_quant.calibration.sources.registry import open_text
from offline_quant.calibration.windows import load_tokenizer, text_windows
from offline_quant.evaluation import sanity
from offline_quant.model.quantized import open_model
from offline_quant.model.streaming import StreamedModel
from offline_quant.model.tensors import WeightSource

ALL = {
    "vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "num_experts_per_tok": 2, "bos_token_id": None,
    "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
MLA = {  # the sizes vLLM's attention for them insists on
    "num_key_value_heads": 2, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32,
    "n_group": 4, "topk_group": 2,
}  # fmt: skip
_DENSE_FIRST = {
    "intermediate_size": 128, "moe_intermediate_size": 96, "n_routed_experts": 8, "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}  # fmt: skip
VISION = {
    "depth": 1, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
    "num_attention_heads": 2, "out_hidden_size": 64, "projection_hidden_size": 64,
}  # fmt: skip
_ONE_GROUP = {"n_group": 1, "topk_group": 1}
_LISTED = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_FULL = {"layer_types": ["full_attention"] * 3}
_INDEXER = {"index_n_heads": 2, "index_head_dim": 96, "index_topk": 8}
_MIMO = {
    "head_dim": 32, "v_head_dim": 32, "swa_head_dim": 32, "swa_v_head_dim": 32, "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 1, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "hybrid_layer_pattern": [0, 1, 0], "moe_layer_freq": [0, 1, 1], "add_swa_attention_sink_bias": True,
    "sliding_window_size": 16, "layernorm_epsilon": 1e-6,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
QWEN = {"intermediate_size": 128, "moe_intermediate_size": 96, "num_experts": 8}
_DELTA_NET = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
_GEMMA = QWEN | {
    "enable_moe_block": True, "pad_token_id": 0, "top_k_experts": 2, "head_dim": 32, "global_head_dim": 32,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0, "final_logit_softcapping": 5.0,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 16,
}  # fmt: skip
_GRANITE = {
    "intermediate_size": 96, "num_local_experts": 8, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
    "residual_multiplier": 0.4, "attention_multiplier": 0.2,
}  # fmt: skip
_LLAMA4 = {
    "intermediate_size": 96, "intermediate_size_mlp": 128, "num_local_experts": 8, "num_experts_per_tok": 1,
    "head_dim": 32, "num_hidden_layers": 4, "interleave_moe_layer_step": 2, "attention_chunk_size": 16,
    "layer_types": ["chunked_attention", "chunked_attention", "chunked_attention", "full_attention"],
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": QWEN | {"head_dim": 32, "norm_topk_prob": True},
    "Qwen2MoeForCausalLM": QWEN | {"shared_expert_intermediate_size": 64, "mlp_only_layers": [0]},
    "Qwen3NextForCausalLM": QWEN
    | _DELTA_NET
    | {"head_dim": 32, "shared_expert_intermediate_size": 64, "num_hidden_layers": 4},
    "Qwen3_5MoeForCausalLM": QWEN
    | _DELTA_NET
    | {"head_dim": 32, "shared_expert_intermediate_size": 64, "num_hidden_layers": 4},
    "Qwen3_5MoeForConditionalGeneration": QWEN
    | _DELTA_NET
    | {"head_dim": 32, "shared_expert_intermediate_size": 64, "num_hidden_layers": 4},
    "MixtralForCausalLM": {"intermediate_size": 96, "num_local_experts": 8},
    "OlmoeForCausalLM": {"intermediate_size": 96, "num_experts": 8},
    "DeepseekV2ForCausalLM": _DENSE_FIRST
    | MLA
    | {"q_lora_rank": None, "n_shared_experts": 2, "topk_method": "group_limited_greedy"},
    "DeepseekV3ForCausalLM": _DENSE_FIRST
    | MLA
    | {"q_lora_rank": 48, "n_shared_experts": 1, "topk_method": "noaux_tc", "norm_topk_prob": True},
    "DeepseekV32ForCausalLM": _DENSE_FIRST | MLA | {"q_lora_rank": 48, "n_shared_experts": 1} | _INDEXER,
    "Glm4MoeForCausalLM": _DENSE_FIRST | _ONE_GROUP | {"head_dim": 32, "n_shared_experts": 1},
    "Glm4MoeLiteForCausalLM": _DENSE_FIRST | MLA | _ONE_GROUP | _LISTED | {"q_lora_rank": 48, "n_shared_experts": 1},
    "GlmMoeDsaForCausalLM": _DENSE_FIRST
    | MLA
    | _ONE_GROUP
    | {"q_lora_rank": 48, "n_shared_experts": 1, "first_k_dense_replace": 2}
    | _INDEXER,
    "SolarOpenForCausalLM": _DENSE_FIRST
    | _ONE_GROUP
    | {"head_dim": 32, "n_shared_experts": 1, "first_k_dense_replace": 0},
    "MiniMaxM2ForCausalLM": {
        "intermediate_size": 96,
        "num_local_experts": 8,
        "head_dim": 32,
        "rotary_dim": 32,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
    },
    "HYV3ForCausalLM": QWEN
    | _LISTED
    | {
        "head_dim": 32,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "route_norm": True,
        "expert_hidden_dim": 96,
        "qk_norm": True,
    },
    "MiMoV2FlashForCausalLM": _DENSE_FIRST | _LISTED | _MIMO,
    "LagunaForCausalLM": QWEN | _LISTED | _FULL | {"head_dim": 32, "shared_expert_intermediate_size": 64},
    "ExaoneMoeForCausalLM": QWEN
    | _LISTED
    | _FULL
    | {"head_dim": 32, "num_shared_experts": 1, "sliding_window": 64, "routed_scaling_factor": 1.5},
    "Lfm2MoeForCausalLM": QWEN
    | {"num_dense_layers": 1, "layer_types": ["full_attention", "conv", "full_attention"], "use_expert_bias": True},
    "JambaForCausalLM": {
        "intermediate_size": 96,
        "num_experts": 8,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_dt_rank": 8,
    },
    "MellumForCausalLM": QWEN | _FULL | {"head_dim": 32},
    "HunYuanMoEV1ForCausalLM": {
        "intermediate_size": 96,
        "num_experts": 8,
        "moe_topk": 2,
        "head_dim": 32,
        "rope_parameters": ROPE,
    },
    "Ernie4_5_MoeForCausalLM": {
        "intermediate_size": 128,
        "moe_intermediate_size": 96,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
    },
    "GraniteMoeForCausalLM": _GRANITE,
    "GraniteMoeSharedForCausalLM": _GRANITE | {"shared_intermediate_size": 64},
    "GraniteMoeSWAForCausalLM": _GRANITE
    | {"shared_intermediate_size": 64, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "GraniteMoeHybridForCausalLM": _GRANITE
    | {
        "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 8,
        "mamba_d_state": 32,
    },
    "AfmoeForCausalLM": QWEN
    | _ONE_GROUP
    | {
        "head_dim": 32,
        "num_shared_experts": 1,
        "mup_enabled": True,
        "route_scale": 1.5,
        "score_func": "sigmoid",
        "route_norm": True,
    },
    "Cohere2MoeForCausalLM": _LISTED
    | {
        "intermediate_size": 96,
        "num_experts": 8,
        "head_dim": 32,
        "num_shared_experts": 1,
        "prefix_dense_intermediate_size": 128,
        "logit_scale": 0.25,
    },
    "AXK1ForCausalLM": _DENSE_FIRST | MLA | {"q_lora_rank": 48, "n_shared_experts": 1, "first_k_dense_replace": 0},
    "FlexOlmoForCausalLM": {"intermediate_size": 96, "num_experts": 8},
    "PhiMoEForCausalLM": {
        "intermediate_size": 96,
        "num_local_experts": 8,
        "lm_head_bias": True,
        "attention_bias": True,
    },
    "Gemma4ForCausalLM": _GEMMA,
    "Gemma4ForConditionalGeneration": _GEMMA,
    "KimiLinearForCausalLM": MLA
    | _ONE_GROUP
    | _LISTED
    | {
        "intermediate_size": 128,
        "moe_intermediate_size": 96,
        "num_local_experts": 8,
        "n_shared_experts": 1,
        "linear_head_dim": 32,
        "linear_num_heads": 2,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "AXK2ForCausalLM": _DENSE_FIRST
    | MLA
    | _LISTED
    | _INDEXER
    | {"q_lora_rank": 48, "n_shared_experts": 1, "gated_norm_rank": 4},
    "KimiK25ForConditionalGeneration": _DENSE_FIRST
    | MLA
    | {"q_lora_rank": 48, "n_shared_experts": 1, "topk_method": "noaux_tc", "norm_topk_prob": True},
    "MiniMaxForCausalLM": {
        "intermediate_size": 96,
        "num_local_experts": 8,
        "head_dim": 32,
        "block_size": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "full_attn_alpha_factor": 1.5,
        "mlp_alpha_factor": 2.0,
        "mlp_beta_factor": 0.5,
    },
    "Qwen3VLMoeForConditionalGeneration": QWEN
    | {"head_dim": 32, "norm_topk_prob": True, "rope_parameters": ROPE | {"mrope_section": [6, 5, 5]}},
    "Glm4vMoeForConditionalGeneration": _DENSE_FIRST
    | _ONE_GROUP
    | {
        "head_dim": 32,
        "n_shared_experts": 1,
        "use_qk_norm": False,
        "rope_parameters": ROPE | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5},
    },
    "NemotronHForCausalLM": _ONE_GROUP
    | {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
        "head_dim": 32,
        "intermediate_size": 128,
        "moe_intermediate_size": 80,
        "moe_shared_expert_intermediate_size": 72,
        "n_routed_experts": 8,
        "routed_scaling_factor": 1.5,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "mlp_hidden_act": "relu2",
    },
    "Llama4ForCausalLM": _LLAMA4,
    "Llama4ForConditionalGeneration": _LLAMA4,
    "Dots1ForCausalLM": _DENSE_FIRST | _ONE_GROUP | {"head_dim": 32, "n_shared_experts": 1},
    "MiniMaxM3SparseForConditionalGeneration": _LISTED
    | {
        "intermediate_size": 96,
        "dense_intermediate_size": 128,
        "shared_intermediate_size": 64,
        "num_local_experts": 8,
        "head_dim": 32,
        "rotary_dim": 16,
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
        "index_n_heads": 1,
        "index_head_dim": 32,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "Glm5NextForConditionalGeneration": _DENSE_FIRST
    | _ONE_GROUP
    | _LISTED
    | {
        "num_key_value_heads": 2,
        "kv_lora_rank": 32,
        "q_lora_rank": 48,
        "qk_rope_head_dim": 0,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "n_shared_experts": 1,
        "linear_head_dim": 32,
        "linear_num_heads": 2,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 8,
        "index_kpool": 4,
        "hc_mult": 3,
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "swiglu_limit": 10.0,
    },
    "DeepseekV4ForCausalLM": {
        "moe_intermediate_size": 96,
        "n_routed_experts": 8,
        "num_hidden_layers": 4,
        "head_dim": 64,
        "q_lora_rank": 48,
        "o_lora_rank": 16,
        "o_groups": 2,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 3,
        "partial_rotary_factor": 0.5,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 8},
        "layer_types": [
            "sliding_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
        "sliding_window": 16,
        "swiglu_limit": 10.0,
    },
    "GptOssForCausalLM": {
        "intermediate_size": 96,
        "num_local_experts": 8,
        "head_dim": 32,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


NIGHTLY = {
    "Qwen3_5MoeForCausalLM", "Glm4MoeLiteForCausalLM", "SolarOpenForCausalLM", "HYV3ForCausalLM",
    "MiMoV2FlashForCausalLM",
    "ExaoneMoeForCausalLM", "MellumForCausalLM", "Ernie4_5_MoeForCausalLM", "GraniteMoeSharedForCausalLM",
    "GraniteMoeSWAForCausalLM", "GraniteMoeHybridForCausalLM", "Cohere2MoeForCausalLM", "AXK1ForCausalLM",
    "AXK2ForCausalLM", "FlexOlmoForCausalLM", "Dots1ForCausalLM", "MiniMaxForCausalLM",
    "Glm4vMoeForConditionalGeneration", "Llama4ForCausalLM", "Qwen3VLMoeForConditionalGeneration",
    "Gemma4ForConditionalGeneration", "KimiK25ForConditionalGeneration", "Glm4MoeForCausalLM", "GraniteMoeForCausalLM",
    "HunYuanMoEV1ForCausalLM", "OlmoeForCausalLM", "MiniMaxM2ForCausalLM", "MixtralForCausalLM", "PhiMoEForCausalLM",
    "Lfm2MoeForCausalLM", "LagunaForCausalLM", "DeepseekV2ForCausalLM", "Qwen3NextForCausalLM", "Qwen2MoeForCausalLM",
}  # fmt: skip
"""Architectures whose way through transformers and vLLM others have too. `make test` reads them; `make nightly` does
the rest."""


def family_cases(names: Iterable[str], *more: str) -> list[Any]:
    """Parameters of a test of architectures, and what follows each; those of `NIGHTLY` are marked so."""
    return [pytest.param(name, *more, marks=[pytest.mark.nightly] if name in NIGHTLY else []) for name in names]


_PUBLISHED = {
    "KimiK25ForConditionalGeneration": [
        (r"^language_model\.model\.blocks\.", "language_model.model.layers."),
        (r"^model\.mm_projector\.", "mm_projector."),
    ],
    "MiniMaxM3SparseForConditionalGeneration": [
        (r"layers\.(\d+)\.block_sparse_moe\.(gate|up|down)_proj\.", r"layers.\1.mlp.\2_proj.")
    ],
    "DeepseekV4ForCausalLM": [
        (r"^model\.", ""),
        (r"^embed_tokens\.", "embed."),
        (r"^hc_head\.hc_", "hc_head_"),
        (r"\.attn\.norm\.", ".attn.kv_norm."),
    ],
    "KimiLinearForCausalLM": [(r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj.")],
}
"""Where transformers 5.19 saves other names than those of published files: (what it saves, what they have)."""


_PREPROCESSORS = {
    "KimiK25ForConditionalGeneration": {
        "media_proc_cfg": {
            "patch_size": 14, "merge_kernel_size": 2, "temporal_merge_kernel_size": 4, "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3, "in_patch_limit": 64, "in_patch_limit_each_frame": 64, "patch_limit_on_one_side": 8,
            "fixed_output_tokens": None,
        }
    }
}  # fmt: skip
"""Preprocessors of images that vLLM makes even for text alone."""


def class_of(family: Family) -> Any:
    """transformers' class for models of a family."""
    return transformers.AutoModelForImageTextToText if family.text else transformers.AutoModelForCausalLM


def make_model(architecture: str, directory: Path, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Path:
    """Write a random model, `more` in its config; returns its directory."""
    family, sizes = FAMILIES[architecture], ALL | CONFIGS[architecture] | more
    parts = {"text_config": sizes, "vision_config": VISION, "tie_word_embeddings": False} if family.text else sizes
    known = transformers.AutoConfig.for_model(family.model_type, **parts)
    random_model(class_of(family), known, family.hidden_act != "silu").to(dtype).save_pretrained(directory)
    if architecture in _PUBLISHED:
        file, tensors = directory / "model.safetensors", load_file(directory / "model.safetensors")
        for saved, published in _PUBLISHED[architecture]:
            tensors = {re.sub(saved, published, name): tensor for name, tensor in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})
    written = json.loads((directory / "config.json").read_text())
    written["architectures"] = [
        architecture
    ]  # as published; transformers' classes of Phi and Kimi are called otherwise
    (directory / "config.json").write_text(json.dumps(written))
    if architecture in _PREPROCESSORS:
        (directory / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSORS[architecture]))
    add_tokenizer(directory)
    return directory


def random_model(auto: Any, config: Any, clamped: bool) -> Any:
    """A model of transformers with random weights, float32; clamped experts have weights that reach the clamps."""
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(std=1.0 if "embed" in name else 0.12)
                if clamped and name.endswith("experts.gate_up_proj"):
                    p *= 4
        for name, b in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                b.normal_(std=0.05)
            elif name.endswith("tid2eid"):  # experts of every token id
                b.copy_(torch.rand(len(b), 8).argsort(1)[:, : b.shape[1]])
    return model


def add_tokenizer(directory: Path) -> None:
    """Write the demo model's tokenizer into a model's directory."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(TINY_MOE / name, directory / name)


def make_quantized(architecture: str, directory: Path, form: str = "natural", max_shard_bytes: int = 10**9) -> Path:
    """Write a bitsmoe checkpoint of a random model with random experts of a form (`form_plans`); no quantizer runs."""
    make_model(architecture, directory)
    config, tensors = json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")
    shape = moe_shape(config, architecture)
    others = {name: tensor for name, tensor in tensors.items() if not shape.is_expert_tensor(name)}
    sizes = {
        "num_experts": shape.num_experts,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
    }
    bias = shape.family.bias
    experts = {
        shape.prefix(i): with_act(
            build_form(form, bias=bias, gated=shape.family.gated, **sizes, seed=i), shape.hidden_act
        )
        for i in shape.layers
    }
    (directory / "model.safetensors").unlink()
    write_checkpoint(directory, experts, other_tensors=others, model_config=config, max_shard_bytes=max_shard_bytes)
    return directory


def to_float8(directory: Path, block: int = 32, scales: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Store every matrix of the experts and of attention as block-wise float8; returns what they stand for."""
    file = directory / "model.safetensors"
    tensors, meaning = load_file(file), {}
    for name in [n for n in tensors if re.search(r"(_proj|\.w[123])\.weight$", n)]:
        w = tensors[name].float()
        rows, columns = (-(-size // block) for size in w.shape)
        padded = torch.nn.functional.pad(w, (0, columns * block - w.shape[1], 0, rows * block - w.shape[0]))
        tiles = padded.view(rows, block, columns, block)
        scale = (tiles.abs().amax((1, 3)).clamp(min=1e-12) / 440).to(scales).float()
        codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        back = (codes.float() * scale[:, None, :, None]).view(padded.shape)
        meaning[name] = back[: w.shape[0], : w.shape[1]].bfloat16()
        tensors[name] = codes.view(padded.shape)[: w.shape[0], : w.shape[1]].contiguous()
        tensors[f"{name}_scale_inv"] = scale.to(scales)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}
    (directory / "config.json").write_text(json.dumps(config))
    return meaning


def to_mixed_codes(directory: Path, block: int = 32) -> dict[str, torch.Tensor]:
    """Store experts in MXFP4 and attention in float8, as DeepSeek-V4 is published; returns what they stand for."""
    file = directory / "model.safetensors"
    tensors, meaning = load_file(file), {}
    for name in [n for n in tensors if re.search(r"\.(w[123]|wq_[ab]|wkv)\.weight$", n)]:
        w, scale = tensors[name].float(), name.removesuffix("weight") + "scale"
        if ".ffn.experts." in name:
            codes, exponent, meaning[name] = mxfp4_codes(w)
            tensors[name], tensors[scale] = codes.view(torch.int8), exponent.view(torch.float8_e8m0fnu)
            continue
        rows, columns = (-(-size // block) for size in w.shape)
        padded = torch.nn.functional.pad(w, (0, columns * block - w.shape[1], 0, rows * block - w.shape[0]))
        tiles = padded.view(rows, block, columns, block)
        power = (tiles.abs().amax((1, 3)).clamp(min=1e-12) / 440).log2().ceil()
        fitting = (tiles / torch.exp2(power)[:, None, :, None]).to(torch.float8_e4m3fn)
        back = (fitting.float() * torch.exp2(power)[:, None, :, None]).view(padded.shape)
        tensors[name] = fitting.view(padded.shape)[: w.shape[0], : w.shape[1]].contiguous()
        tensors[scale] = (power + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
        meaning[name] = back[: w.shape[0], : w.shape[1]].bfloat16()
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text()) | {"expert_dtype": "fp4"}
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [block, block],
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return meaning


def mxfp4_codes(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 [..., K / 2], exponents uint8 [..., K / 32] and bfloat16 values of a matrix float32 [..., K]."""
    numbers = torch.tensor([s * m for s in (1, -1) for m in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])
    groups = w.reshape(*w.shape[:-1], -1, 32)
    exponent = (groups.abs().amax(-1).clamp(min=1e-30) / 6).log2().ceil().clamp(-127, 127)
    codes = ((groups / torch.exp2(exponent)[..., None])[..., None] - numbers).abs().argmin(-1)
    values = (numbers[codes] * torch.exp2(exponent)[..., None]).view_as(w).bfloat16()
    pairs = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8).flatten(-2)
    return pairs, (exponent + 127).to(torch.uint8), values


def to_packed(directory: Path, bits: DenseBits = 4, group: int = 32) -> dict[str, torch.Tensor]:
    """Store every matrix of the experts as packed integers, as Kimi-K2.5 does; returns what they stand for."""
    file = directory / "model.safetensors"
    tensors, meaning = load_file(file), {}
    for name in [n for n in tensors if re.search(r"\.experts\.\d+\.\w+\.weight$", n)]:
        w = tensors.pop(name).float()
        grouped = w.view(len(w), -1, group)
        scale = (grouped.abs().amax(-1) / (2 ** (bits - 1) - 1)).bfloat16()
        codes = (grouped / scale[..., None].float()).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        meaning[name] = (codes * scale[..., None].float()).view_as(w).bfloat16()
        tensors |= {
            f"{name}_packed": pack(codes.view_as(w).to(torch.int8), bits),
            f"{name}_scale": scale,
            f"{name}_shape": torch.tensor(w.shape),
        }
    save_file(tensors, file, metadata={"format": "pt"})
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }
    config = json.loads((directory / "config.json").read_text())
    config.get("text_config", config)["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))
    return meaning


def to_mxfp4(directory: Path) -> dict[str, torch.Tensor]:
    """Store the experts' stacked matrices in MXFP4, as gpt-oss is published; returns what they stand for."""
    file = directory / "model.safetensors"
    tensors, meaning = load_file(file), {}
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        pairs, exponents, values = mxfp4_codes(tensors.pop(name).float().mT)  # of [E, N, K]
        meaning[name] = values.mT.contiguous()
        tensors[f"{name}_blocks"] = pairs.unflatten(-1, (-1, 16))
        tensors[f"{name}_scales"] = exponents
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (directory / "config.json").write_text(json.dumps(config))
    return meaning


IDS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(0))


def whole_model(directory: Path) -> Any:
    """transformers' own, float32."""
    config = json.loads((directory / "config.json").read_text())
    return class_of(moe_shape(config, str(directory)).family).from_pretrained(directory, dtype=torch.float32).eval()


def whole_logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return whole_model(directory)(input_ids=IDS).logits


def streamed_logits(source: WeightSource) -> torch.Tensor:
    model = StreamedModel(source)
    batches = model.embed_windows(IDS, 24)
    for index in range(model.num_layers):
        with model.layer(index) as module:
            batches = [(h, batch[1]) for h, batch in zip(model.through(module, batches), batches, strict=True)]
    return model.logits(torch.cat([h for h, _ in batches]), model.head)


def calibration_perplexity(directory: Path, calib: str | Path, samples: int = 4) -> float:
    """On some windows of 64 tokens of a text."""
    streamed = StreamedModel(open_model(directory))
    windows = text_windows(load_tokenizer(directory), open_text(str(calib)), 64, samples)
    batches = streamed.embed_windows(windows, 256)
    for index in range(streamed.num_layers):
        with streamed.layer(index) as module:
            batches = [(h, batch[1]) for h, batch in zip(streamed.through(module, batches), batches, strict=True)]
    found = sanity.tally(streamed, windows, [hidden for hidden, _ in batches])
    return math.exp(found.nll / found.tokens)
