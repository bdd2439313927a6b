"""The error of a layer's output that plans predict at any bits, from a few plans of the layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from offline_quant.allocation.budget import least_bits
from offline_quant.allocation.objectives import forms_of
from offline_quant.allocation.solver import allocate
from offline_quant.layer.outputs import output_errors
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
    planned = (0.0, *_planned_bits(view), math.inf)
    found: dict[float, list[float]] = {}
    for low, bits, high in zip(planned, planned[1:], planned[2:], strict=False):
        for other, error in _errors_about(view.with_bits(bits), low, high).items():
            found.setdefault(other, []).append(error)
    known = sorted(found)
    return ErrorCurve(known, [math.prod(found[bits]) ** (1 / len(found[bits])) for bits in known])


def _errors_about(view: LayerView, low: float, high: float) -> dict[float, float]:
    """Errors of the output: of a plan at the view's bits, and of its choices at the SOLVED bits between two limits."""
    plan = plan_layer(view)
    errors = output_errors(view, plan)
    assert errors is not None, "the objective predicts no errors"
    table, weights = plan.table, view.shape.num_weights
    found = {view.config.known_bits: errors.of(plan.losses)}
    for bits in (*SOLVED, table.most_bits / weights):
        codes = int(bits * weights) - table.overhead
        if low < bits < high and table.least_bits <= codes + table.overhead <= table.most_bits:
            result = view.ctx.workers.broadcast_from_first(lambda: allocate(table.loss, table.cost, codes))  # noqa: B023
            found[bits] = errors.of(table.losses(result.choice))
    return found


def _planned_bits(view: LayerView) -> tuple[float, ...]:
    """PLANNED bits that some form allows; one above what stores no codes where it allows none."""
    least = least_bits((form.schema(view.shape, view.config.basis_bits) for form in forms_of(view.config)), view.config)
    return tuple(bits for bits in PLANNED if bits >= least) or (least + 1,)
