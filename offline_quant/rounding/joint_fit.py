"""The down matrices of all experts of a layer, fitted together to one target for the layer's output.

`correct_down` lets each expert make up for its own errors alone. But a token's experts read the same input, so their
errors are related, and each can make up for part of the others'. The target may also hold more than the experts' own
output, such as the errors of the layers before: the layer then pulls the hidden state back to that of the original
model.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from offline_quant.calibration.moments import RoutedTokens
from offline_quant.linalg import unit_directions

SWEEPS = 2
"""Rounds over all experts; each goes once through the tokens."""
CHANCE = 1.0
"""How much is taken off for chance, in units of what it is expected to give."""


def fit_jointly(
    turns: Callable[[], Iterable[int]],
    routed: Callable[[int], RoutedTokens],
    moments: Callable[[int], Tensor],
    get: Callable[[int], Tensor],
    put: Callable[[int, Tensor], None],
    target: Tensor,
    sweeps: int = SWEEPS,
    chance: float = CHANCE,
) -> None:
    """Least squares for one expert after another, on what all others leave over of the target.

    Activations can tell little of what is left over, and seem to tell more of it by chance. Fitted in every layer, that
    would bring the calibration text close to the original, and no other. So each direction of the activations counts as
    far as it explains more than chance does (James and Stein, 1961; chance as White estimates it, 1980).

    An expert with few tokens of its own moves little: its moments hold a sample of all tokens too, and the error it
    sees does not. One that no token reached does not change.

    Args:
        turns: one round over the experts. Where several processes share them, it gives each its own in turn.
        routed: tokens of an expert, in the order of I in its down matrix.
        moments: float32 [I, I], E[w^2 h' h'^T] of an expert, undamped, tokens counting as in `routed`.
        get: the current down matrix [H, I] of an expert, at first corrected for its own errors.
        put: replaces it.
        target: float32 [T, H], what the experts should add to the layer's output; becomes what is left over of it.
        sweeps: rounds.
        chance: see CHANCE; 0 is plain least squares.
    """
    residual = target
    for e in turns():
        r = routed(e)
        residual.index_add_(0, r.token, (r.hidden @ get(e).T).mul_(-r.weight[:, None]))
    for _ in range(sweeps):
        for e in turns():
            r = routed(e)
            if len(r.token) == 0:
                continue
            x, left = r.hidden * r.weight[:, None], residual[r.token]
            counted = x * r.share[:, None]
            directions = unit_directions(moments(e))
            found = (left.T @ counted / r.mass) @ directions
            if chance:
                spread = counted.T @ (counted * left.square().sum(1, keepdim=True)) / r.mass**2
                expected = (directions * (spread @ directions)).sum(0)
                energy = found.square().sum(0).clamp(min=torch.finfo(found.dtype).tiny)
                found *= (1 - chance * expected / energy).clamp(min=0)
            step = found @ directions.T
            put(e, get(e) + step)
            residual.index_add_(0, r.token, x @ -step.T)
