"""Expert matrices, all alike."""

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


class Uniform(Objective):
    """Every weight counts the same."""

    name = "uniform"
    unit = "matrix"
    forms = ("natural",)
    scope = "layer"
    sensitive = True

    def loss(self, view: ValuedLayer, projections: RankedProjections, width: Widths, rank: Ranks) -> Losses:
        """See `Objective.loss`."""
        sizes = matrix_sizes(view, projections).repeat(view.shape.num_experts)
        return sizes[:, None] * lost_shares(width)
