"""Spearman's rank correlation."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def spearman(x: ArrayLike, y: ArrayLike) -> float | None:
    """Rank correlation, ties sharing their mean rank; None where it is undefined: fewer than two ranks on a side."""
    a, b = (_ranks(np.asarray(v, dtype=np.float64)) for v in (x, y))
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum()
    return (last - (count - 1) / 2)[group]
