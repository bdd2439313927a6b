"""Small random models of architectures outside the table, and of classes that transformers does not have."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from families import ALL, CONFIGS, IDS, MLA, QWEN, ROPE, VISION, add_tokenizer, random_model

_EXPERTS = {"intermediate_size": 96, "num_local_experts": 8, "num_experts": 8, "moe_intermediate_size": 96}
_MISTRAL = (
    ALL
    | MLA
    | {
        "n_routed_experts": 8, "moe_intermediate_size": 96, "intermediate_size": 128, "q_lora_rank": 48,
        "kv_lora_rank": 64, "qk_rope_head_dim": 32, "n_shared_experts": 1, "first_k_dense_replace": 0, "n_group": 1,
        "topk_group": 1,
    }
)  # fmt: skip
_SMALL_VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_ARIA = {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size": 96}
_DBRX = {
    "d_model": 64, "n_heads": 2, "n_layers": 2, "max_seq_len": 128, "vocab_size": 4096,
    "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    "attn_config": {"kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 10000.0},
}  # fmt: skip
_LONGCAT = {
    "n_routed_experts": 8, "zero_expert_num": 4, "moe_topk": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 96,
    "num_layers": 2, "q_lora_rank": 48,
}  # fmt: skip
OUTSIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "Mistral4ForCausalLM": ("mistral4", _MISTRAL),
    "Mistral3ForConditionalGeneration": (
        "mistral3",
        {
            "text_config": _MISTRAL | {"model_type": "mistral4"},
            "vision_config": _SMALL_VISION | {"model_type": "pixtral", "head_dim": 16},
        },
    ),
    "MiniMaxM3VLForCausalLM": (
        "minimax_m3_vl_text",
        ALL | CONFIGS["MiniMaxM3SparseForConditionalGeneration"],
    ),
    "LlavaForConditionalGeneration": (
        "llava",
        {
            "text_config": ALL | {"model_type": "mixtral", "intermediate_size": 96, "num_local_experts": 8},
            "vision_config": _SMALL_VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
        },
    ),
    "InternVLForConditionalGeneration": (
        "internvl",
        {
            "text_config": ALL | QWEN | {"model_type": "qwen3_moe", "head_dim": 32},
            "vision_config": _SMALL_VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
        },
    ),
    "Lfm2VlForConditionalGeneration": (
        "lfm2_vl",
        {
            "text_config": ALL | CONFIGS["Lfm2MoeForCausalLM"] | {"model_type": "lfm2_moe"},
            "vision_config": _SMALL_VISION | {"model_type": "siglip2_vision_model"},
        },
    ),
    "InklingForCausalLM": ("inkling_text", ALL | _EXPERTS),
    "ZayaForCausalLM": (
        "zaya",
        ALL
        | _EXPERTS
        | {"num_experts_per_tok": 1, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "AriaTextForCausalLM": ("aria_text", ALL | _ARIA),
    "DogeForCausalLM": ("doge", ALL | {"is_moe": True, "num_experts": 16, "intermediate_size": 128}),
    "JetMoeForCausalLM": (
        "jetmoe",
        ALL | {"num_local_experts": 8, "intermediate_size": 96, "kv_channels": 32, "num_key_value_heads": 2},
    ),
    "DbrxForCausalLM": ("dbrx", _DBRX),
    "HYV4ForCausalLM": ("hy_v4", ALL | _EXPERTS | {"head_dim": 32}),
    "LongcatFlashForCausalLM": ("longcat_flash", ALL | MLA | _LONGCAT),
    "Qwen3OmniMoeThinkerForConditionalGeneration": (
        "qwen3_omni_moe_thinker",
        {
            "text_config": ALL | QWEN | {"head_dim": 32, "rope_parameters": ROPE | {"mrope_section": [6, 5, 5]}},
            "vision_config": VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            "audio_config": {
                "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
                "output_dim": 64, "num_mel_bins": 16, "downsample_hidden_size": 16,
            },
        },
    ),
}  # fmt: skip
"""Architectures of transformers that no row describes: their model_type and a small configuration."""
ODD = "OddForCausalLM"
"""An architecture that only these tests have: Mixtral, but for what a test changes."""


CHANGES: list[Callable[[Any], None]] = []
"""What is done to every odd model that is made."""


class OddConfig(transformers.MixtralConfig):
    model_type = "odd_moe"


class OddForCausalLM(transformers.MixtralForCausalLM):
    config_class = OddConfig

    def __init__(self, config: OddConfig):
        super().__init__(config)
        for change in CHANGES:
            change(self)


transformers.AutoConfig.register(OddConfig.model_type, OddConfig)
transformers.AutoModelForCausalLM.register(OddConfig, OddForCausalLM)


def convert_as(change: Callable[[list[Any]], None] = lambda entries: None) -> None:
    """Let transformers convert names of the odd model as Mixtral's, with a change."""
    entries = deepcopy(get_checkpoint_conversion_mapping("mixtral"))
    change(entries)
    register_checkpoint_conversion_mapping(OddConfig.model_type, entries, overwrite=True)


convert_as()


class ScaledExperts(MixtralExperts):
    """Their output is half of what it says."""

    def forward(self, *args: Any) -> torch.Tensor:
        return 0.5 * MixtralExperts.forward(self, *args)


def auto_class(config: Any) -> Any:
    """The class of transformers that builds a config's model."""
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto
    raise LookupError(type(config).__name__)


def make_outside(architecture: str, directory: Path) -> Path:
    """Write a random model of an architecture outside the table; returns its directory."""
    model_type, sizes = OUTSIDE.get(architecture) or (
        OddConfig.model_type,
        ALL | {"intermediate_size": 96, "num_local_experts": 8},
    )
    config = transformers.AutoConfig.for_model(model_type, **deepcopy(sizes))
    model = random_model(auto_class(config), config, clamped=architecture == "MiniMaxM3VLForCausalLM")
    model.to(torch.bfloat16).save_pretrained(directory)
    written = json.loads((directory / "config.json").read_text())
    written["architectures"] = [architecture]
    (directory / "config.json").write_text(json.dumps(written))
    add_tokenizer(directory)
    return directory


@torch.no_grad()
def own_logits(directory: Path) -> torch.Tensor:
    """transformers' own, float32."""
    config = transformers.AutoConfig.from_pretrained(directory)
    model = auto_class(config).from_pretrained(directory, dtype=torch.float32).eval()
    return model(input_ids=IDS).logits
