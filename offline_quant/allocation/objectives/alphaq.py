"""Expert matrices, by the heavy-tail exponent of their spectrum, free of calibration (AlphaQ, arXiv 2606.04980)."""

import numpy as np

from bitsmoe_kernels.models.families import MoEShape
from offline_quant.allocation.heavy_tail import alpha_hill, tail_length
from offline_quant.allocation.objectives.base import Losses, Objective, RankedProjections, Ranks, ValuedLayer, Widths


class AlphaQ(Objective):
    """alpha^-gamma Var(W) 2^-2b; the paper's median of alpha is one factor for all and changes nothing."""

    name = "alphaq"
    unit = "matrix"
    forms = ("split",)
    scope = "model"

    def loss(self, view: ValuedLayer, projections: RankedProjections, width: Widths, rank: Ranks) -> Losses:
        """See `Objective.loss`."""
        gamma = view.config.gamma

        def value(chunk: range) -> Losses:
            experts = view.load(chunk)
            matrices = (experts.projection(name) for name in projections)
            return np.stack(
                [(alpha_hill(W) ** -gamma * W.double().var((1, 2), correction=0)).cpu().numpy() for W in matrices]
            )

        return np.concatenate(list(view.each(value)), 1).ravel()[:, None] * np.exp2(-2.0 * width)

    def check(self, shape: MoEShape) -> None:
        """See `Objective.check`: the exponent needs enough singular values."""
        tail_length(min(shape.hidden_size, shape.intermediate_size))
