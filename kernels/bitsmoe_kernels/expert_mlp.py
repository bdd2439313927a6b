"""The MLP of one routed expert: `down(act(gate, up))`, or `down(act(up))` where it has no gate.

The one owner of the activation and of its derivatives. *Pre-activations* are what enters it: outputs of gate and up, or
of up alone.

Another activation needs an entry in `ACTIVATIONS`, and a case in the Triton kernels (`_triton/gemm.py`) and in the CPU
kernels (`_cpu/engine.h`), which know it by its place in `ACTIVATIONS`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

HiddenAct = Literal["silu", "gelu_pytorch_tanh", "swigluoai", "silu_clamp10", "relu2"]
"""Activations that are supported: values of `hidden_act` in config.json, that of gpt-oss, and that of GLM-5.3-Flash.
"relu2" is of Nemotron-3, whose experts have no gate."""
HIDDEN_ACT: HiddenAct = "silu"
"""The activation of a layer whose schema names none."""
OWN_NAMES: tuple[HiddenAct, ...] = ("swigluoai", "silu_clamp10")
"""Those that transformers does not know by name: a family's table entry says that its experts have one."""
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
"""Constants of "swigluoai": its sigmoid's gain, and where gate and up are clamped."""
SILU_LIMIT = 10.0
"""Where "silu_clamp10" clamps gate and up."""


@dataclass(frozen=True)
class Activation:
    """One activation of its pre-activations, in the forms that callers need.

    Attributes:
        apply: h of the pre-activations, as a new tensor. Gradients pass through it.
        apply_: h, written to the tensor after them; may overwrite them. Gives the same bits as `apply`.
        slopes_: h, written to the tensor after them, and its derivatives by each of them. May overwrite them. h may
            round differently from `apply`.
        degree: h of c up is c^degree h of up, for c > 0; None: of no degree.
        matrices: how many pre-activations it takes: 2, of gate and of up, or 1, of up alone.
    """

    apply: Callable[..., Tensor]
    apply_: Callable[..., Tensor]
    slopes_: Callable[..., tuple[Tensor, ...]]
    degree: int | None = None
    matrices: Literal[1, 2] = 2


def _times_up(
    act: Callable[[Tensor], Tensor],
    act_: Callable[[Tensor], Tensor],
    act_with_slope_: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Activation:
    """`act(gate) * up`, from a function, the same in place, and the same in place with its derivative."""

    def slopes_(gate: Tensor, up: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = act_with_slope_(gate)
        torch.mul(value, up, out=out)
        return slope.mul_(up), value

    return Activation(
        lambda gate, up: act(gate) * up, lambda gate, up, out: torch.mul(act_(gate), up, out=out), slopes_, degree=1
    )


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


def _swigluoai(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * (SWIGLU_ALPHA * gate).sigmoid() * (up + 1)


def _swigluoai_(gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    gate.clamp_(max=SWIGLU_LIMIT)
    gate.mul_((SWIGLU_ALPHA * gate).sigmoid_())
    return torch.mul(gate, up.clamp_(-SWIGLU_LIMIT, SWIGLU_LIMIT).add_(1), out=out)


def _swigluoai_slopes_(gate: Tensor, up: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    # Where a clamp bites, h does not move.
    free_gate, free_up = gate < SWIGLU_LIMIT, up.abs() < SWIGLU_LIMIT
    gate.clamp_(max=SWIGLU_LIMIT)
    up.clamp_(-SWIGLU_LIMIT, SWIGLU_LIMIT).add_(1)
    sigmoid = (SWIGLU_ALPHA * gate).sigmoid_()
    value = gate.mul_(sigmoid)
    torch.mul(value, up, out=out)
    slope = sigmoid.add(value * (1 - sigmoid), alpha=SWIGLU_ALPHA)
    return slope.mul_(up).mul_(free_gate), value.mul_(free_up)


def _clamped_silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.clamp(max=SILU_LIMIT)) * up.clamp(-SILU_LIMIT, SILU_LIMIT)


def _clamped_silu_(gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    return torch.mul(_silu_(gate.clamp_(max=SILU_LIMIT)), up.clamp_(-SILU_LIMIT, SILU_LIMIT), out=out)


def _clamped_silu_slopes_(gate: Tensor, up: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    free_gate, free_up = gate < SILU_LIMIT, up.abs() < SILU_LIMIT
    value, slope = _silu_with_slope_(gate.clamp_(max=SILU_LIMIT))
    torch.mul(value, up.clamp_(-SILU_LIMIT, SILU_LIMIT), out=out)
    return slope.mul_(up).mul_(free_gate), value.mul_(free_up)


def _relu2_(up: Tensor, out: Tensor) -> Tensor:
    return torch.square(F.relu(up, inplace=True), out=out)


def _relu2_slopes_(up: Tensor, out: Tensor) -> tuple[Tensor]:
    _relu2_(up, out)
    return (up.mul_(2),)


ACTIVATIONS: dict[HiddenAct, Activation] = {
    "silu": _times_up(F.silu, _silu_, _silu_with_slope_),
    "gelu_pytorch_tanh": _times_up(_gelu, _gelu_, _gelu_with_slope_),
    "swigluoai": Activation(_swigluoai, _swigluoai_, _swigluoai_slopes_),
    "silu_clamp10": Activation(_clamped_silu, _clamped_silu_, _clamped_silu_slopes_),
    "relu2": Activation(lambda up: F.relu(up).square(), _relu2_, _relu2_slopes_, degree=2, matrices=1),
}
"""By the name that `hidden_act` has in a layer's schema. Kernels know them by their places here."""
ACTIVATION_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


def activated(pre: Sequence[Tensor], hidden_act: HiddenAct = HIDDEN_ACT) -> Tensor:
    """The activation as a new tensor, [n, I]. Gradients pass.

    Args:
        pre: pre-activations, [n, I] each.
        hidden_act: a key of `ACTIVATIONS`.
    """
    return ACTIVATIONS[hidden_act].apply(*pre)


def activated_(pre: Sequence[Tensor], out: Tensor, hidden_act: HiddenAct = HIDDEN_ACT) -> Tensor:
    """As `activated`, with the same bits, without new memory for the result: may overwrite `pre`.

    Args:
        pre: pre-activations, [n, I] each.
        out: receives the result, [n, I].
        hidden_act: a key of `ACTIVATIONS`.

    Returns:
        `out`.
    """
    return ACTIVATIONS[hidden_act].apply_(*pre, out)


def activated_with_slopes_(
    pre: Sequence[Tensor], out: Tensor, hidden_act: HiddenAct = HIDDEN_ACT
) -> tuple[Tensor, ...]:
    """As `activated_`, with the derivatives by each of the pre-activations, [n, I] each.

    Args:
        pre: pre-activations, [n, I] each.
        out: receives the result, [n, I].
        hidden_act: a key of `ACTIVATIONS`.
    """
    return ACTIVATIONS[hidden_act].slopes_(*pre, out)


def input_matrices(hidden_act: HiddenAct) -> int:
    """How many matrices of an expert read its input: 2, gate and up, or 1, up alone."""
    return ACTIVATIONS[hidden_act].matrices
