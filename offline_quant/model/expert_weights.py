"""The weights of some routed experts, and the changes that leave what they compute the same."""

from typing import NamedTuple

import torch
from torch import Tensor

from bitsmoe_kernels.format.schema import ProjectionName

UNBALANCED = 2.0**8
"""Ratio of the largest values of up and down, either way, from which `ExpertWeights.balanced` changes an expert."""


class ExpertWeights(NamedTuple):
    """Weights of n routed experts.

    Attributes:
        gate_up: float32 [n, 2 I, H].
        down: float32 [n, H, I].
    """

    gate_up: Tensor
    down: Tensor

    def to(self, device: torch.device) -> "ExpertWeights":
        """The same on a device."""
        return ExpertWeights(self.gate_up.to(device), self.down.to(device))

    def projection(self, name: ProjectionName) -> Tensor:
        """W [n, N, K] of a projection."""
        gate, up = self.gate_up.chunk(2, 1)
        return {"gate_up": self.gate_up, "gate": gate, "up": up, "down": self.down}[name]

    def balanced(self) -> "ExpertWeights":
        """Experts of the same function, whose up and down do not differ much in size.

        A power of two goes from one to the other: errors of both are weighed together, and their scales are float16.
        Ordinary experts are not changed.
        """
        gate, up = self.gate_up.chunk(2, 1)
        sizes = [torch.maximum(w.amax((1, 2)), -w.amin((1, 2))) for w in (up, self.down)]
        ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), sizes[0] / sizes[1], 1.0)
        unbalanced = (ratio > UNBALANCED) | (ratio < 1 / UNBALANCED)
        if not bool(unbalanced.any()):
            return self
        shift = torch.exp2((0.5 * ratio.log2()).round().clamp(-48, 48)).where(unbalanced, 1.0)[:, None, None]
        return ExpertWeights(torch.cat([gate, up / shift], 1), self.down * shift)

    def permuted(self, order: Tensor) -> "ExpertWeights":
        """Experts of the same function, intermediate channels in another order.

        Args:
            order: int64 [n, I], the channel of these weights at each place.
        """
        rows = torch.cat([order, order + order.shape[1]], 1)
        gate_up = self.gate_up.gather(1, rows[:, :, None].expand_as(self.gate_up))
        return ExpertWeights(gate_up, self.down.gather(2, order[:, None].expand_as(self.down)))
