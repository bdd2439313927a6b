"""Second moments of what the experts of one layer see on calibration text."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RARE_SHARE = 0.25
"""Least weight of an expert in the allocation, relative to the mean expert's."""


@dataclass(frozen=True)
class LayerInputs:
    """What entered the routed experts of one layer, and where it went.

    Attributes:
        x: float32 [T, H].
        topk_ids: int64 [T, top_k].
        topk_weights: float32 [T, top_k].
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor


class LayerStatistics:
    """Moments for each expert, shrunk towards those of all tokens, so that a rare expert has usable ones too.

    Moments are taken about zero: the mean activation stays one strong direction.

    Args:
        inputs: calibration activations of the layer.
        num_experts: E.
    """

    def __init__(self, inputs: LayerInputs, num_experts: int):
        self.inputs = inputs
        self.num_experts = num_experts
        tokens, slots = inputs.topk_ids.shape
        flat = inputs.topk_ids.flatten()
        self.counts = torch.bincount(flat, minlength=num_experts)
        """Tokens routed to each expert, int64 [E]."""
        order = flat.argsort(dim=0, stable=True)
        self._token = (order // slots).split(self.counts.tolist())
        self._weight = inputs.topk_weights.flatten()[order].split(self.counts.tolist())
        hidden = inputs.x.shape[1]
        self.pooled = inputs.x.T @ inputs.x / tokens
        """C [H, H] over all tokens."""
        self.pseudo_count = max(1, hidden // 8)
        step = max(1, tokens // (2 * self.pseudo_count))
        self._sample = inputs.x[::step]

    @property
    def share(self) -> Tensor:
        """Share of expert slots that went to each expert, as the allocation weighs it, float32 [E].

        A quarter of the mean at least: an expert that calibration rarely or never reached may matter elsewhere, and
        the floor costs it about one bit against the average one instead of all of them.
        """
        counts = self.counts.float()
        return (
            counts.clamp(min=RARE_SHARE * float(counts.mean()))
            / len(self.inputs.topk_ids)
            / self.inputs.topk_ids.shape[1]
        )

    def input_moments(self, experts: range) -> Tensor:
        """E[x x^T] for each of these experts, [n, H, H]."""
        out = torch.empty(len(experts), *self.pooled.shape, device=self.pooled.device)
        for i, e in enumerate(experts):
            x = self.inputs.x[self._token[e]]
            out[i] = (x.T @ x + self.pseudo_count * self.pooled) / (len(x) + self.pseudo_count)
        return out

    def hidden_moments(self, experts: range, gate_up: Tensor) -> Tensor:
        """E[w^2 h h^T] of the intermediate activations h = silu(gate x) * up x, w the routing weight.

        Args:
            experts: which.
            gate_up: [n, 2 I, H], weights of exactly these experts.

        Returns:
            [n, I, I].
        """
        intermediate = gate_up.shape[1] // 2
        out = torch.empty(len(experts), intermediate, intermediate, device=gate_up.device)
        typical = self.inputs.topk_weights.square().mean()
        for i, e in enumerate(experts):
            h = _hidden(self.inputs.x[self._token[e]], gate_up[i]) * self._weight[e][:, None]
            pool = _hidden(self._sample, gate_up[i])
            prior = self.pseudo_count * typical / len(pool) * (pool.T @ pool)
            out[i] = (h.T @ h + prior) / (len(h) + self.pseudo_count)
        return out


def _hidden(x: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return F.silu(gate) * up
