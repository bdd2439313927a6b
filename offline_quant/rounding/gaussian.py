"""The best uniform quantizer of a unit Gaussian: its step and its error kappa_b at b bits."""

from functools import lru_cache

import numpy as np


@lru_cache
def gaussian_quantizer(bits: int) -> tuple[float, float]:
    """The mid-rise uniform quantizer of 2^bits levels that is best for a unit Gaussian.

    Returns:
        (step, mean squared error kappa_b); (0, 1) for 0 bits.
    """
    if bits == 0:
        return 0.0, 1.0
    x = np.linspace(0, 8, 80_001)
    weight = np.exp(-x * x / 2) * np.sqrt(2 / np.pi) * (x[1] - x[0])
    half = 2.0 ** (bits - 1)

    def error(step: float) -> float:
        level = (np.clip(np.floor(x / step), 0, half - 1) + 0.5) * step
        return float(((x - level) ** 2 * weight).sum())

    low, high = 1.0 / 2.0**bits, 10.0 / 2.0**bits
    for _ in range(60):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if error(a) < error(b) else (a, high)
    return (low + high) / 2, error((low + high) / 2)


def kappa(bits: int) -> float:
    """Share of a Gaussian component's energy that is lost at `bits`."""
    return gaussian_quantizer(bits)[1]
