"""The error of a layer's output that plans predict at any bits, from a few plans of the layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from offline_quant.allocation.budget import least_bits
from offline_quant.allocation.choices import ChoiceTable
from offline_quant.allocation.objectives import forms_of
from offline_quant.allocation.solver import allocate
from offline_quant.layer.outputs import OutputErrors, output_errors
from offline_quant.layer.planner import plan_layer
from offline_quant.layer.view import LayerView

PLANNED = (1.5, 2.0, 2.25, 2.5, 2.75, 3.0, 4.0)
"""Bits that a layer is planned at, each with a pilot. They are closest where layers change from shared bases to natural
channels. Beyond them the form and the pilot of the nearest plan hold."""
SOLVED = (1.0, 1.25, 1.75, 2.125, 2.375, 2.625, 2.875, 3.5, 5.0, 6.0, 7.0, 8.0)
"""Bits that the choices of the plans on either side are solved at."""
LEAST_ERROR = 1e-30


@dataclass(frozen=True)
class ErrorCurve:
    """Planned errors of a layer's output.

    Attributes:
        bits: ascending bits per weight, up to the most that can be spent.
        errors: relative squared errors at these.
    """

    bits: Sequence[float]
    errors: Sequence[float]

    def at(self, bits: float) -> float:
        """The error at any bits; between the known ones it changes evenly on a logarithmic scale."""
        return math.exp(np.interp(bits, self.bits, np.log(np.maximum(self.errors, LEAST_ERROR))))


def error_curve(view: LayerView) -> ErrorCurve:
    """Plan a layer at PLANNED bits, for an objective that predicts errors.

    Raises:
        BitsmoeError: a loss is not finite.
    """
    planned = _planned_bits(view)
    found: dict[float, list[float]] = {}
    for i, bits in enumerate(planned):
        plan = plan_layer(view.with_bits(bits))
        errors = output_errors(view, plan)
        assert errors is not None, "the objective predicts no errors"
        found[bits] = [errors.of(plan.losses)]
        least, most = (table_bits / _weights(view) for table_bits in (plan.table.least_bits, plan.table.most_bits))
        low, high = planned[i - 1] if i else 0.0, planned[i + 1] if i + 1 < len(planned) else math.inf
        for other in (*SOLVED, most):
            if low < other < high and other not in planned and least <= other <= most:
                found.setdefault(other, []).append(_error(view, plan.table, errors, other))
    bits_known = sorted(found)
    return ErrorCurve(bits_known, [math.prod(found[b]) ** (1 / len(found[b])) for b in bits_known])


def _planned_bits(view: LayerView) -> tuple[float, ...]:
    """PLANNED bits that some form allows; one above what stores no codes where it allows none."""
    least = least_bits((form.schema(view.shape, view.config.basis_bits) for form in forms_of(view.config)), view.config)
    return tuple(bits for bits in PLANNED if bits >= least) or (least + 1,)


def _weights(view: LayerView) -> int:
    return view.shape.num_weights // len(view.shape.layers)


def _error(view: LayerView, table: ChoiceTable, errors: OutputErrors, bits: float) -> float:
    """Error of the output where a budget is spent on the choices of a table."""
    budget = max(table.least_bits, int(bits * _weights(view))) - table.overhead
    result = view.ctx.workers.broadcast_from_first(lambda: allocate(table.loss, table.cost, budget))
    return errors.of(table.losses(result.choice))
