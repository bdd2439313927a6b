"""Print the table of docs/serving.md: into which parallel sizes the published models divide.

python -m tools.parallel_sizes
"""

from typing import Any

from bitsmoe_kernels.models.families import FAMILIES
from bitsmoe_kernels.sharding import parallel_sizes
from offline_quant.config import QuantizeConfig

_QWEN_VOCAB, _GLM_VOCAB = {"vocab_size": 151_936}, {"vocab_size": 151_552}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-30B-A3B": (
        "Qwen3MoeForCausalLM",
        _QWEN_VOCAB
        | {"num_hidden_layers": 48, "num_experts": 128, "moe_intermediate_size": 768}
        | {"num_attention_heads": 32, "num_key_value_heads": 4},
    ),
    "Qwen3-235B-A22B": (
        "Qwen3MoeForCausalLM",
        _QWEN_VOCAB
        | {"num_hidden_layers": 94, "num_experts": 128, "moe_intermediate_size": 1536}
        | {"num_attention_heads": 64, "num_key_value_heads": 4},
    ),
    "Qwen1.5-MoE-A2.7B": (
        "Qwen2MoeForCausalLM",
        _QWEN_VOCAB
        | {"num_hidden_layers": 24, "num_experts": 60, "moe_intermediate_size": 1408}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "shared_expert_intermediate_size": 5632},
    ),
    "Qwen2-57B-A14B": (
        "Qwen2MoeForCausalLM",
        _QWEN_VOCAB
        | {"num_hidden_layers": 28, "num_experts": 64, "moe_intermediate_size": 2560}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "shared_expert_intermediate_size": 20_480},
    ),
    "Qwen3-Next-80B-A3B": (
        "Qwen3NextForCausalLM",
        _QWEN_VOCAB
        | {"num_hidden_layers": 48, "num_experts": 512, "moe_intermediate_size": 512}
        | {"num_attention_heads": 16, "num_key_value_heads": 2, "shared_expert_intermediate_size": 512}
        | {"linear_num_key_heads": 16, "linear_num_value_heads": 32},
    ),
    "Mixtral-8x7B": (
        "MixtralForCausalLM",
        {"num_hidden_layers": 32, "num_local_experts": 8, "intermediate_size": 14_336, "vocab_size": 32_000}
        | {"num_attention_heads": 32, "num_key_value_heads": 8},
    ),
    "Mixtral-8x22B": (
        "MixtralForCausalLM",
        {"num_hidden_layers": 56, "num_local_experts": 8, "intermediate_size": 16_384, "vocab_size": 32_000}
        | {"num_attention_heads": 48, "num_key_value_heads": 8},
    ),
    "OLMoE-1B-7B": (
        "OlmoeForCausalLM",
        {"num_hidden_layers": 16, "num_experts": 64, "intermediate_size": 1024, "vocab_size": 50_304}
        | {"num_attention_heads": 16, "num_key_value_heads": 16},
    ),
    "DeepSeek-V2-Lite": (
        "DeepseekV2ForCausalLM",
        {"num_hidden_layers": 27, "n_routed_experts": 64, "moe_intermediate_size": 1408, "vocab_size": 102_400}
        | {"num_attention_heads": 16, "kv_lora_rank": 512, "n_shared_experts": 2}
        | {"intermediate_size": 10_944, "first_k_dense_replace": 1},
    ),
    "DeepSeek-V2": (
        "DeepseekV2ForCausalLM",
        {"num_hidden_layers": 60, "n_routed_experts": 160, "moe_intermediate_size": 1536, "vocab_size": 102_400}
        | {"num_attention_heads": 128, "kv_lora_rank": 512, "n_shared_experts": 2}
        | {"intermediate_size": 12_288, "first_k_dense_replace": 1},
    ),
    "DeepSeek-V3, R1": (
        "DeepseekV3ForCausalLM",
        {"num_hidden_layers": 61, "n_routed_experts": 256, "moe_intermediate_size": 2048, "vocab_size": 129_280}
        | {"num_attention_heads": 128, "kv_lora_rank": 512, "n_shared_experts": 1}
        | {"intermediate_size": 18_432, "first_k_dense_replace": 3},
    ),
    "GLM-4.5-Air": (
        "Glm4MoeForCausalLM",
        _GLM_VOCAB
        | {"num_hidden_layers": 46, "n_routed_experts": 128, "moe_intermediate_size": 1408}
        | {"num_attention_heads": 96, "num_key_value_heads": 8, "n_shared_experts": 1}
        | {"intermediate_size": 10_944, "first_k_dense_replace": 1},
    ),
    "GLM-4.5, GLM-4.6": (
        "Glm4MoeForCausalLM",
        _GLM_VOCAB
        | {"num_hidden_layers": 92, "n_routed_experts": 160, "moe_intermediate_size": 1536}
        | {"num_attention_heads": 96, "num_key_value_heads": 8, "n_shared_experts": 1}
        | {"intermediate_size": 12_288, "first_k_dense_replace": 3},
    ),
}
"""Model -> architecture and the keys of its config.json that matter here."""


def published_table() -> str:
    """The table as the docs show it."""
    lines = [
        "| model | tensor parallel | with expert parallelism | most expert ranks | most stages |",
        "|---|---|---|---|---|",
    ]
    for name, (architecture, config) in PUBLISHED.items():
        family = FAMILIES[architecture]
        sizes = parallel_sizes(
            config[family.num_experts_key],
            config[family.intermediate_size_key],
            len(family.moe_layers(config)),
            QuantizeConfig.model_fields["block_size"].default,
            config,
        )
        tensor, experts = (", ".join(map(str, n)) for n in (sizes.tensor, sizes.tensor_with_experts))
        lines.append(f"| {name} | {tensor} | {experts} | {sizes.expert_ranks} | {sizes.stages} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(published_table())
