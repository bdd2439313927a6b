"""The table of choices of one layer: every unit's loss and cost at every bit-width and rank."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bitsmoe_kernels.format.schema import Layer, ProjectionName, num_blocks
from offline_quant.allocation.objectives.base import Objective, RankedProjections, ValuedLayer

COMPENSATOR_BITS = 16
"""Of a compensator's values in the file."""


@dataclass(frozen=True)
class ChoiceTable:
    """Choices of one layer under one form of decomposition.

    Attributes:
        form: name of the form.
        schema: the layer's, with no codes yet.
        projections: components of every projection.
        loss: [units, choices], weighed, infinite where there is no such choice.
        cost: [units, choices], bits of codes and compensators.
        unit_of: for each projection the unit of every block, int64 [E, B].
        width: [choices].
        rank: [choices], of the compensators of the unit's projections.
        weight: what a unit of each projection's loss counts, see `Objective.weights`.
        overhead: bits of scales, metadata and basis, as stored.
        unused: components, int64 and ascending, that are held at 0 bits in every expert: their rows of the basis are
            not stored.
    """

    form: str
    schema: Layer
    projections: RankedProjections
    loss: NDArray[np.float64]
    cost: NDArray[np.int64]
    unit_of: dict[ProjectionName, NDArray[np.int64]]
    width: NDArray[np.int64]
    rank: NDArray[np.int64]
    weight: dict[ProjectionName, float]
    overhead: int
    unused: Mapping[ProjectionName, Tensor] = field(default_factory=dict)

    @property
    def least_bits(self) -> int:
        """All-in bits of the cheapest choices."""
        return self.overhead + int(self.cost.min(1).sum())

    @property
    def most_bits(self) -> int:
        """All-in bits of the dearest choices: more cannot be spent."""
        return self.overhead + int(np.where(np.isfinite(self.loss), self.cost, 0).max(1).sum())

    def losses(self, choice: NDArray[np.int64]) -> dict[ProjectionName, float]:
        """Loss of some choices by projection, not weighed, for objectives whose units lie within one.

        Args:
            choice: [units].
        """
        taken = self.loss[np.arange(len(choice)), choice]
        return {name: float(taken[unit].sum()) / self.weight[name] for name, unit in self.unit_of.items()}


def choice_table(
    objective: Objective, view: ValuedLayer, form: str, schema: Layer, projections: RankedProjections, overhead: int
) -> ChoiceTable:
    """All choices of a layer under one form.

    Args:
        objective: values them.
        view: the layer.
        form: name of the form.
        schema: the layer's under that form.
        projections: components of every projection.
        overhead: bits of scales, metadata and basis.
    """
    config, E = view.config, schema.num_experts
    widths = np.array(config.widths, dtype=np.int64)
    side = min(schema.hidden_size, schema.intermediate_size)
    ranks = np.array([r for r in config.ranks if r < side] if objective.ranks else [0])
    width, rank = np.repeat(widths, len(ranks)), np.tile(ranks, len(widths))
    unit_of: dict[ProjectionName, NDArray[np.int64]] = {}
    units = 0
    for name in projections:
        B = num_blocks(schema.components(name), config.block_size)
        if objective.unit == "block":
            unit_of[name] = units + np.arange(E * B, dtype=np.int64).reshape(E, B)
            units += E * B
        else:
            unit_of[name] = (units + np.arange(E, dtype=np.int64))[:, None].repeat(B, 1)
            units += E if objective.unit == "matrix" else 0
    units = units or E
    cost = np.zeros((units, len(width)), dtype=np.int64)
    for name, unit in unit_of.items():
        rows = np.bincount(unit.ravel(), minlength=units) * config.block_size
        cost += rows[:, None] * schema.features(name) * width
        if objective.ranks:
            cost += COMPENSATOR_BITS * rank * (schema.side(name, "input") + schema.side(name, "output"))
    loss, weight = objective.loss(view, projections, width, rank), objective.weights(view, projections)
    for name, unit in unit_of.items():
        loss[np.unique(unit)] *= weight[name]
    return ChoiceTable(form, schema, projections, loss, cost, unit_of, width, rank, weight, overhead)
