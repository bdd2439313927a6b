"""The MoE layers that are timed: sizes of four public models, and two small ones for rehearsals."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Routed experts of one layer.

    Attributes:
        model: as the results name it.
        hidden_size: H.
        intermediate_size: I, of one expert.
        num_experts: E.
        top_k: experts of a token.
        source: where the four figures stand.
    """

    model: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    source: str

    @property
    def expert_weights(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden_size * self.intermediate_size


SHAPES = (
    Shape(
        "Qwen3-30B-A3B", 2048, 768, 128, 8,
        "config.json of Qwen/Qwen3-30B-A3B: hidden_size, moe_intermediate_size, num_experts, num_experts_per_tok",
    ),
    Shape(
        "Qwen3-235B-A22B", 4096, 1536, 128, 8,
        "config.json of Qwen/Qwen3-235B-A22B: hidden_size, moe_intermediate_size, num_experts, num_experts_per_tok",
    ),
    Shape(
        "Mixtral-8x7B", 4096, 14336, 8, 2,
        "config.json of mistralai/Mixtral-8x7B-v0.1: hidden_size, intermediate_size, num_local_experts, "
        "num_experts_per_tok",
    ),
    Shape(
        "DeepSeek-V2-Lite", 2048, 1408, 64, 6,
        "config.json of deepseek-ai/DeepSeek-V2-Lite: hidden_size, moe_intermediate_size, n_routed_experts, "
        "num_experts_per_tok",
    ),
)  # fmt: skip

REHEARSAL = (Shape("rehearsal", 128, 128, 4, 2, "made up"),)

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
REHEARSAL_TOKENS = (1, 3)
