"""The MLP of one routed expert: `down(act(gate) * up)`. The one owner of the activation and of its derivative.

A second activation needs an entry in `ACTIVATIONS` and a Triton function beside the one that `kernel` names. Callers
pass no name today: the checkpoint format stores none, and every supported family uses `HIDDEN_ACT`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN_ACT = "silu"
"""The value of `hidden_act` in config.json that is supported; all checks of a model compare with it."""


@dataclass(frozen=True)
class Activation:
    """One activation function in the forms that callers need.

    Attributes:
        apply: `act(g)` as a new tensor. Gradients pass through it.
        apply_: `act(g)`, written over `g`. Gives the same bits as `apply`.
        apply_with_slope_: `act(g)`, written over `g`, and the derivative `act'(g)` as a new tensor. The value may
            round differently from `apply`.
        kernel: name of the Triton function in `_triton/gemm.py`. Triton code cannot call the functions above.
    """

    apply: Callable[[Tensor], Tensor]
    apply_: Callable[[Tensor], Tensor]
    apply_with_slope_: Callable[[Tensor], tuple[Tensor, Tensor]]
    kernel: str


def _silu_(g: Tensor) -> Tensor:
    return F.silu(g, inplace=True)


def _silu_with_slope_(g: Tensor) -> tuple[Tensor, Tensor]:
    # g * sigmoid(g) rounds twice and F.silu once. Calibration results depend on these operations in this order.
    sigmoid = g.sigmoid()
    value = g.mul_(sigmoid)
    return value, torch.addcmul(sigmoid, value, sigmoid, value=-1).add_(value)  # s + silu(g) (1 - s)


ACTIVATIONS = {"silu": Activation(F.silu, _silu_, _silu_with_slope_, kernel="silu")}
"""By the name that `hidden_act` has in config.json."""


def gated(gate: Tensor, up: Tensor, hidden_act: str = HIDDEN_ACT) -> Tensor:
    """`act(gate) * up` as a new tensor. Gradients pass.

    Args:
        gate: outputs of the gate projection, [n, I].
        up: outputs of the up projection, [n, I].
        hidden_act: a key of `ACTIVATIONS`.
    """
    return ACTIVATIONS[hidden_act].apply(gate) * up


def gated_(gate: Tensor, up: Tensor, out: Tensor, hidden_act: str = HIDDEN_ACT) -> Tensor:
    """As `gated`, with the same bits, without new memory: overwrites `gate` with `act(gate)`.

    Args:
        gate: outputs of the gate projection, [n, I].
        up: outputs of the up projection, [n, I].
        out: receives the product, [n, I].
        hidden_act: a key of `ACTIVATIONS`.

    Returns:
        `out`.
    """
    return torch.mul(ACTIVATIONS[hidden_act].apply_(gate), up, out=out)


def activation_with_slope_(gate: Tensor, hidden_act: str = HIDDEN_ACT) -> tuple[Tensor, Tensor]:
    """`act(gate)`, written over `gate`, and the derivative `act'(gate)` as a new tensor.

    Args:
        gate: outputs of the gate projection, [n, I].
        hidden_act: a key of `ACTIVATIONS`.
    """
    return ACTIVATIONS[hidden_act].apply_with_slope_(gate)
