"""The down matrix that makes up for errors of quantized gate and up matrices."""

from torch import Tensor

from offline_quant.linalg import solve_damped


def correct_down(down: Tensor, moments: Tensor, missing: Tensor) -> Tensor:
    """The down matrix that makes up for errors of gate and up, as far as the activations h' tell them.

    Least squares: D' = D E[h h'^T] E[h' h'^T]^-1. Rounding shrinks gate and up coherently, and D' undoes most of that
    for nothing (compare GPTAQ, arXiv 2504.02692, which corrects the inputs of a layer in this way).

    Args:
        down: D [H, I].
        moments: E[h' h'^T] [I, I].
        missing: E[(h - h') h'^T] [I, I].
    """
    return down + down @ solve_damped(moments, missing.T).T
