"""The MLP of one routed expert: `down(act(gate) * up)`. The one owner of the activation and of its derivative.

Another activation needs an entry in `ACTIVATIONS`, and a case in the Triton kernels (`_triton/gemm.py`) and in the CPU
kernels (`_cpu/engine.h`), which know it by its place in `ACTIVATIONS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

HiddenAct = Literal["silu", "gelu_pytorch_tanh"]
"""Values of `hidden_act` in config.json that are supported."""
HIDDEN_ACT: HiddenAct = "silu"
"""The activation of a layer whose schema names none."""


@dataclass(frozen=True)
class Activation:
    """One activation function in the forms that callers need.

    Attributes:
        apply: `act(g)` as a new tensor. Gradients pass through it.
        apply_: `act(g)`, written over `g`. Gives the same bits as `apply`.
        apply_with_slope_: `act(g)`, written over `g`, and the derivative `act'(g)` as a new tensor. The value may
            round differently from `apply`.
    """

    apply: Callable[[Tensor], Tensor]
    apply_: Callable[[Tensor], Tensor]
    apply_with_slope_: Callable[[Tensor], tuple[Tensor, Tensor]]


def _silu_(g: Tensor) -> Tensor:
    return F.silu(g, inplace=True)


def _silu_with_slope_(g: Tensor) -> tuple[Tensor, Tensor]:
    # g * sigmoid(g) rounds twice and F.silu once. Calibration results depend on these operations in this order.
    sigmoid = g.sigmoid()
    value = g.mul_(sigmoid)
    return value, torch.addcmul(sigmoid, value, sigmoid, value=-1).add_(value)  # s + silu(g) (1 - s)


_ROOT, _CUBE = math.sqrt(2 / math.pi), 0.044715


def _gelu(g: Tensor) -> Tensor:
    return F.gelu(g, approximate="tanh")


def _gelu_(g: Tensor) -> Tensor:
    return g.copy_(_gelu(g))


def _gelu_with_slope_(g: Tensor) -> tuple[Tensor, Tensor]:
    # g s with s = (1 + tanh u) / 2, u = ROOT (g + CUBE g^3); the slope is s + 2 g s (1 - s) u'.
    square = g.square()
    s = g.mul(_ROOT).mul_(square.mul(_CUBE).add_(1)).mul_(2).sigmoid_()
    inner = square.mul_(3 * _CUBE).add_(1).mul_(2 * _ROOT)
    value = g.mul_(s)
    return value, s.add(inner.mul_(value).mul_(1 - s))


ACTIVATIONS: dict[HiddenAct, Activation] = {
    "silu": Activation(F.silu, _silu_, _silu_with_slope_),
    "gelu_pytorch_tanh": Activation(_gelu, _gelu_, _gelu_with_slope_),
}
"""By the name that `hidden_act` has in config.json. Kernels know them by their places here."""
ACTIVATION_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


def gated(gate: Tensor, up: Tensor, hidden_act: HiddenAct = HIDDEN_ACT) -> Tensor:
    """`act(gate) * up` as a new tensor. Gradients pass.

    Args:
        gate: outputs of the gate projection, [n, I].
        up: outputs of the up projection, [n, I].
        hidden_act: a key of `ACTIVATIONS`.
    """
    return ACTIVATIONS[hidden_act].apply(gate) * up


def gated_(gate: Tensor, up: Tensor, out: Tensor, hidden_act: HiddenAct = HIDDEN_ACT) -> Tensor:
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


def activation_with_slope_(gate: Tensor, hidden_act: HiddenAct = HIDDEN_ACT) -> tuple[Tensor, Tensor]:
    """`act(gate)`, written over `gate`, and the derivative `act'(gate)` as a new tensor.

    Args:
        gate: outputs of the gate projection, [n, I].
        hidden_act: a key of `ACTIVATIONS`.
    """
    return ACTIVATIONS[hidden_act].apply_with_slope_(gate)
