"""Who goes to which expert: uniform, and as uneven as trained routers are."""

import torch
from torch import Tensor

UNIFORM, REALISTIC = "uniform", "realistic"
ROUTINGS = (REALISTIC, UNIFORM)
ZIPF_EXPONENT = 0.5
"""Popularity falls with the root of an expert's rank: the busiest of 128 is drawn six times as often as the mean."""


def route(kind: str, tokens: int, num_experts: int, top_k: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Routing weights, float32 [T, top_k] that sum to 1, and ids, int32 [T, top_k], of a token's different experts.

    Experts of a token are drawn without replacement by popularity (Gumbel noise on its logarithm); uniform: all equally
    popular. Which experts are popular depends on the seed as well.
    """
    gen = torch.Generator().manual_seed(seed)
    popularity = torch.zeros(num_experts)
    if kind == REALISTIC:
        rank = torch.randperm(num_experts, generator=gen) + 1
        popularity = -ZIPF_EXPONENT * rank.log()
    noise = -torch.empty(tokens, num_experts).exponential_(generator=gen).log()
    ids = (popularity + noise).topk(top_k).indices.int()
    weights = torch.rand(tokens, top_k, generator=gen) + 0.1
    return (weights / weights.sum(1, keepdim=True)).to(device), ids.to(device)
