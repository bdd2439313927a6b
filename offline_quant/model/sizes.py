"""Sizes that decide how much memory a run takes. Every stage states its own memory from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from bitsmoe_kernels.format.safetensors_io import MAPPED_BYTES
from bitsmoe_kernels.format.schema import TensorSpec
from bitsmoe_kernels.models.families import MoEShape
from offline_quant.runtime.chunks import chunks_of, gpu_share

FLOAT, INT, DOUBLE = 4, 8, 8
"""Bytes of a float32, an int64 and a float64."""
MAX_CODE_BITS = 8.5
"""Bits per weight of codes and scales at most, whatever the budget: 8-bit codes and their scales."""


@dataclass(frozen=True)
class RunSizes:
    """Sizes of a model and of its calibration text.

    Attributes:
        shape: of the routed experts.
        specs: of all tensors in the checkpoint.
        model_config: config.json.
        bits: bits per weight of the result.
        tokens: tokens of calibration text.
        batch_tokens: tokens that pass through a layer together.
        length: tokens of a window.
        device: where layers are worked on. Of a GPU's chunks only the source weights pass through memory; the rest is
            counted as on a CPU, which is too much.
        streams: hidden states of a token between layers, several with hyper-connections.
    """

    shape: MoEShape
    specs: Mapping[str, TensorSpec]
    model_config: Mapping[str, Any]
    bits: float
    tokens: int
    batch_tokens: int
    length: int
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - devices never change
    streams: int = 1

    @property
    def state_values(self) -> int:
        """Values of a token's hidden state between layers."""
        return self.streams * self.hidden_size

    @property
    def hidden_size(self) -> int:
        """The model's, which its experts need not see."""
        return int(self.model_config["hidden_size"])

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return int(self.shape.family.top_k(self.model_config))

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.model_config["num_hidden_layers"])

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self.model_config["vocab_size"])

    @property
    def heads(self) -> int:
        """Attention heads."""
        return int(self.model_config.get("num_attention_heads", 1))

    @property
    def head_size(self) -> int:
        """Values of an attention head."""
        return int(self.model_config.get("head_dim") or self.hidden_size // self.heads)

    @property
    def query_size(self) -> int:
        """Values of a query where it differs from those of `head_size` (DeepSeek); else 0."""
        return sum(int(self.model_config.get(key) or 0) for key in ("qk_nope_head_dim", "qk_rope_head_dim"))

    @property
    def value_size(self) -> int:
        """Values of an attention value where it differs from those of `head_size` (DeepSeek); else 0."""
        return int(self.model_config.get("v_head_dim") or 0)

    @property
    def attention_values(self) -> int:
        """Float32 values that attention takes for each token, besides its scores."""
        return 6 * self.hidden_size + 4 * max(self.hidden_size, self.heads * self.head_size)

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's routed experts."""
        return self.shape.num_experts * self.shape.weights_per_expert

    @property
    def coded_bytes(self) -> int:
        """Bytes of one layer's routed experts in the result, about."""
        return int(min(self.bits, MAX_CODE_BITS) * self.layer_weights / 8)

    @property
    def all_coded_bytes(self) -> int:
        """Bytes of all layers' routed experts in the result, about."""
        return self.coded_bytes * len(self.shape.layers)

    @cached_property
    def chunk_experts(self) -> int:
        """Experts of the largest chunk of a layer."""
        s = self.shape
        return len(chunks_of(s.num_experts, s.hidden_size, s.intermediate_size, gpu_share(self.device))[0])

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk of experts, float32, and of the chunk before it: both are in memory while one is read."""
        return FLOAT * 2 * self.chunk_experts * self.shape.weights_per_expert

    @cached_property
    def mapped_bytes(self) -> int:
        """Bytes of weight files that are mapped at a time."""
        return min(MAPPED_BYTES, self._source_bytes)

    @cached_property
    def whole_tensor_bytes(self) -> int:
        """Bytes of the largest tensor and of the weight files mapped while it is read."""
        largest = max((spec.nbytes for spec in self.specs.values()), default=0)
        return min(MAPPED_BYTES + largest, self._source_bytes)

    @cached_property
    def _source_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @cached_property
    def decoder_bytes(self) -> int:
        """Bytes of the largest MoE decoder layer without its experts, float32."""
        return FLOAT * max(self._decoder_values(layer) for layer in self.shape.layers)

    def _decoder_values(self, layer: int) -> int:
        prefix = f"{self.shape.family.decoder(layer)}."
        return sum(
            math.prod(spec.shape)
            for name, spec in self.specs.items()
            if name.startswith(prefix) and not name.startswith(f"{self.shape.prefix(layer)}.")
        )

    @cached_property
    def num_values(self) -> int:
        """Values of all tensors in the checkpoint."""
        return sum(math.prod(spec.shape) for spec in self.specs.values())
