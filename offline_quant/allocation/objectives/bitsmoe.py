"""Blocks of components, by the predicted error of the layer's output (BitsMoE, arXiv 2606.00079)."""

import numpy as np
import torch

from bitsmoe_kernels.format.schema import num_blocks
from offline_quant.allocation.objectives.base import (
    Losses,
    Objective,
    RankedProjections,
    Ranks,
    ValuedLayer,
    Widths,
    lost_shares,
)


class BitsMoE(Objective):
    """kappa_b d_k |F_k|^2 f_e, summed over a block, as a share of the projection's output energy."""

    name = "bitsmoe"
    unit = "block"
    forms = ("natural", "whitened")
    scope = "layer"
    sensitive = True
    pilots = True

    def loss(self, view: ValuedLayer, projections: RankedProjections, width: Widths, rank: Ranks) -> Losses:
        """See `Objective.loss`."""
        G, frequency, losses = view.config.block_size, view.routing_frequency.double().cpu(), []
        for projection in projections.values():
            components = projection.components
            energy = components.energy.double().cpu() * frequency[:, None]
            E, C = energy.shape
            blocks = torch.zeros(E, num_blocks(C, G) * G, dtype=torch.float64)
            blocks[:, :C] = energy
            total = (components.total.double().cpu() * frequency).sum().clamp(min=1e-300)
            losses.append((blocks.view(E, -1, G).sum(-1) / total).flatten().numpy())
        return np.concatenate(losses)[:, None] * lost_shares(width)
