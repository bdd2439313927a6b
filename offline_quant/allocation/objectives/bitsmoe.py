"""Blocks of components, by the predicted error of the layer's output (BitsMoE, arXiv 2606.00079)."""

import numpy as np
import torch

from bitsmoe_kernels.format.schema import ProjectionName, num_blocks
from offline_quant.allocation.objectives.base import (
    Losses,
    Objective,
    RankedProjections,
    Ranks,
    ValuedLayer,
    Widths,
    lost_shares,
    output_energy,
)

INPUT_WEIGHT = 1.5
"""What an error of gate or up counts, beyond its energy at the layer's output; measured (docs/log/2026-12-03.md)."""


class BitsMoE(Objective):
    """kappa_b d_k |F_k|^2 f_e, summed over a block, as a share of the projection's output energy.

    Shares of projections count by the energy they have at the layer's output.
    """

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
            total = output_energy(projection, view.routing_frequency)
            losses.append((blocks.view(E, -1, G).sum(-1) / max(total, 1e-300)).flatten().numpy())
        return np.concatenate(losses)[:, None] * lost_shares(width)

    def weights(self, view: ValuedLayer, projections: RankedProjections) -> dict[ProjectionName, float]:
        """See `Objective.weights`."""
        if "output-weights" in view.config.ablations:  # what an error does to the output is not known
            return super().weights(view, projections)
        energies = {}
        for name, projection in projections.items():
            energy = output_energy(projection, view.routing_frequency) * view.unit_energy(name)
            energies[name] = energy * (1.0 if name == "down" else INPUT_WEIGHT)
        if not min(energies.values()) > 0:  # experts of zeros
            return super().weights(view, projections)
        mean = sum(energies.values()) / len(energies)
        return {name: energy / mean for name, energy in energies.items()}
