"""Expert matrices, by activation frequency times what a width loses of a Gaussian."""

import numpy as np

from offline_quant.allocation.objectives.base import (
    Losses,
    Objective,
    RankedProjections,
    Ranks,
    ValuedLayer,
    Widths,
    lost_shares,
    matrix_sizes,
)


class Frequency(Objective):
    """Every weight counts as often as its expert is used."""

    name = "frequency"
    unit = "matrix"
    forms = ("natural",)
    scope = "layer"
    sensitive = True

    def loss(self, view: ValuedLayer, projections: RankedProjections, width: Widths, rank: Ranks) -> Losses:
        """See `Objective.loss`."""
        frequency = view.routing_frequency.double().cpu().numpy()
        return np.outer(matrix_sizes(view, projections), frequency).ravel()[:, None] * lost_shares(width)
