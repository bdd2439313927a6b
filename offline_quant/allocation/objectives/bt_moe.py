"""Experts, bits and compensator rank jointly, by activation frequency times output error (BT-MoE)."""

import numpy as np
import torch

from offline_quant.allocation.objectives.base import Losses, Objective, RankedProjections, Ranks, ValuedLayer, Widths
from offline_quant.rounding.compensator import tail_energies
from offline_quant.rounding.error_feedback import RoundingMode, quantize


class BTMoE(Objective):
    """F_i L_ij: activation frequency times L2 of the layer's output change at width and rank j.

    Measured: the expert is quantized at every width, and the singular values of the residual, in the metric of its
    activations, tell what each rank leaves over.
    """

    name = "bt-moe"
    unit = "expert"
    forms = ("natural",)
    scope = "model"
    ranks = True

    def loss(self, view: ValuedLayer, projections: RankedProjections, width: Widths, rank: Ranks) -> Losses:
        """See `Objective.loss`."""
        mode = RoundingMode(refine=0, feedback=view.config.feedback)

        def energies(chunk: range) -> Losses:
            experts, energy = view.load(chunk), np.zeros((len(chunk), len(width)))
            for name, projection in projections.items():
                W, M = view.scaled_weights(name, chunk, experts), view.moments(projection, chunk)
                order, factor = projection.order(chunk), view.factor(projection, chunk, M)
                F, metric = W.mT.gather(1, order[:, :, None].expand(-1, -1, W.shape[1])), factor.damped(M)
                for bits in np.unique(width):
                    widths = torch.full(order.shape, int(bits), dtype=torch.uint8, device=F.device)
                    rounded = quantize(F, M, widths, "K", mode, factor)
                    tail = tail_energies(F - rounded.dequantize(widths[:, :, None]), metric).double().cpu().numpy()
                    here = width == bits
                    energy[:, here] += tail[:, rank[here]] * view.unit_energy(name)
            return energy

        energy = np.concatenate(list(view.each(energies)))
        return view.routing_frequency.double().cpu().numpy()[:, None] * np.sqrt(energy)
