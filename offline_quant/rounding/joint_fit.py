"""The down matrices of all experts of a layer, fitted together to one target for the layer's output.

`correct_down` lets each expert make up for its own errors alone. But a token's experts read the same input, so their
errors are related, and each can make up for part of the others'. The target may also hold more than the experts' own
output, such as the errors of the layers before: the layer then pulls the hidden state back to that of the original
model.
"""

from collections.abc import Callable

from torch import Tensor

from offline_quant.calibration.moments import RoutedTokens
from offline_quant.linalg import solve_damped

SWEEPS = 2
"""Rounds over all experts; each goes once through the tokens."""


def fit_jointly(
    experts: int,
    routed: Callable[[int], RoutedTokens],
    moments: Callable[[int], Tensor],
    get: Callable[[int], Tensor],
    put: Callable[[int, Tensor], None],
    target: Tensor,
    sweeps: int = SWEEPS,
) -> None:
    """Least squares for one expert after another, on what all others leave over of the target.

    An expert with few tokens of its own moves little: its moments hold a sample of all tokens too, and the error it
    sees does not. One that no token reached does not change.

    Args:
        experts: E.
        routed: tokens of an expert, in the order of I in its down matrix.
        moments: float32 [I, I], E[w^2 h' h'^T] of an expert, undamped.
        get: the current down matrix [H, I] of an expert, at first corrected for its own errors.
        put: replaces it.
        target: float32 [T, H], what the experts should add to the layer's output; becomes what is left over of it.
        sweeps: rounds.
    """
    residual = target
    for e in range(experts):
        r = routed(e)
        residual.index_add_(0, r.token, (r.hidden @ get(e).T).mul_(-r.weight[:, None]))
    for _ in range(sweeps):
        for e in range(experts):
            r = routed(e)
            if len(r.token) == 0:
                continue
            M, weight = moments(e), r.weight[:, None]
            error = (residual[r.token] * weight).T @ r.hidden / r.mass
            step = solve_damped(M, error.T).T
            put(e, get(e) + step)
            residual.index_add_(0, r.token, (r.hidden @ step.T).mul_(-weight))
