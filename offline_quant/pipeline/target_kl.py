"""`--target-kl`: the fewest bits whose forecast is at most a divergence."""

import math
from collections.abc import Callable, Mapping

from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.evaluation.forecast import Forecast, forecast
from offline_quant.layer.error_curve import PLANNED, ErrorCurve, error_curve
from offline_quant.pipeline.context import RunContext
from offline_quant.pipeline.moe_layer import examine_layers
from offline_quant.pipeline.records import PickedBits
from offline_quant.runtime.progress import bar, console

STEPS = 50
"""Steps of the search in a bit."""
START_BITS = 2.5
"""Bits that are tried first."""
STEP_RATIO = -math.log(4) / STEPS
"""Change of the logarithm of a divergence in a step, until two are known: an error falls to a quarter in a bit."""
PAST = 2
"""Steps beyond the expected ones, so that the next steps lie on either side of what is searched."""


def pick_bits(run: RunContext, target: float) -> PickedBits:
    """Pick the bits of a run; those of an earlier run are taken where there are any.

    Args:
        run: the run, its bits not known yet.
        target: divergence from the original, nats per token.

    Raises:
        BitsmoeError: no bits meet the target, or the fewest do; activations or weights beyond float32.
    """
    if (earlier := run.state.picked_bits) is not None:
        return earlier
    curves = examine_layers(run, lambda _, view: error_curve(view), "Planning for all bits", len(PLANNED))
    picked = run.workers.broadcast_from_first(lambda: Forecasts(run, curves).pick(target))
    if run.workers.rank == 0:
        run.state.keep_picked_bits(picked)
        console.print(f"--target-kl {target:g}: picked --bits {picked.bits}. {picked.forecast}")
    return picked


class Forecasts:
    """Forecasts at any step of the bits, from the planned errors of all layers. Each is made once.

    Args:
        run: the run.
        curves: of every MoE layer, by layer index.
    """

    def __init__(self, run: RunContext, curves: Mapping[int, ErrorCurve]):
        self._run, self._curves = run, curves
        self._made: dict[int, Forecast] = {}
        self._least = math.ceil(STEPS * max(curve.bits[0] for curve in curves.values()))
        self._most = math.ceil(STEPS * max(curve.bits[-1] for curve in curves.values()))

    def at(self, step: int) -> Forecast:
        """The forecast at a step."""
        if step not in self._made:
            run, bits = self._run, step / STEPS
            errors = {index: curve.at(bits) for index, curve in self._curves.items()}
            states = run.calibration.read_all(run.num_layers - 1)
            with bar(f"Forecasting {bits} bits", run.num_layers) as on_layer:
                found = forecast(run.streamed, run.judged, states, errors, bits, run.config.seed, on_layer)
            run.clock.lap("forecast")
            self._made[step] = found
        return self._made[step]

    def pick(self, target: float) -> PickedBits:
        """The fewest bits whose forecast is at most a target.

        Raises:
            BitsmoeError: no bits meet it, or the fewest do.
        """
        start = round(STEPS * START_BITS)
        step = least_step(lambda step: self.at(step).kl / target, self._least, self._most, start)
        at_end = min(step, self._most)
        bits, kl = at_end / STEPS, self.at(at_end).kl
        if step > self._most:
            raise BitsmoeError(
                f"--target-kl {target:g}: out of reach; the most bits that can be spent, {bits}, are forecast to give "
                f"{kl:.2g}; give at least --target-kl {_rounded(kl, math.ceil):g}"
            )
        if step == self._least:
            raise BitsmoeError(
                f"--target-kl {target:g}: too large to pick bits by; the fewest considered, {bits}, are forecast to "
                f"give {kl:.2g}; give at most --target-kl {_rounded(kl, math.floor):g}, or --bits"
            )
        return PickedBits(bits, self.at(step))


def least_step(excess: Callable[[int], float], least: int, most: int, start: int) -> int:
    """The least step whose excess is at most 1, by a search that expects its logarithm to fall evenly.

    Args:
        excess: positive, and falls.
        least, most: steps to search.
        start: where to begin.

    Returns:
        A step; `most` + 1 where there is none.
    """
    below, above = least - 1, most + 1
    logs: dict[int, float] = {}
    step = min(max(start, least), most)
    while above - below > 1:
        logs[step] = math.log(max(excess(step), 1e-30))
        if logs[step] > 0:
            below = step
        else:
            above = step
        if below in logs and above in logs:
            share = logs[below] / (logs[below] - logs[above])
            expected = below + (above - below) * (0.5 if len(logs) % 4 == 0 else share)  # half: it ends in any case
        else:
            expected = step - logs[step] / STEP_RATIO + math.copysign(PAST, logs[step])
        step = min(max(math.ceil(expected), below + 1), above - 1)
    return above


def _rounded(value: float, rounding: Callable[[float], int]) -> float:
    """A value with two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return rounding(value / unit) * unit
