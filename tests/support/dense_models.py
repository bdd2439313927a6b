"""Small dense models."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def random_llama(layers: int, seed: int = 0) -> Any:
    """A Llama of transformers with random weights, large enough that layers matter.

    Args:
        layers: how many.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=True, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
