"""The down matrix that makes up for errors of quantized gate and up matrices."""

import torch
from torch import Tensor

from offline_quant.linalg import DAMPING


def correct_down(down: Tensor, moments: Tensor, missing: Tensor) -> Tensor:
    """The down matrix that makes up for errors of gate and up, as far as the activations h' tell them.

    Least squares: D' = D E[h h'^T] E[h' h'^T]^-1. Rounding shrinks gate and up coherently, and D' undoes most of that
    for nothing (compare GPTAQ, arXiv 2504.02692, which corrects the inputs of a layer in this way).

    Args:
        down: D [H, I].
        moments: E[h' h'^T] [I, I].
        missing: E[(h - h') h'^T] [I, I].
    """
    ridge = (DAMPING * moments.diagonal().mean()).clamp(min=torch.finfo(moments.dtype).tiny)
    M = moments + ridge * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    return down + down @ torch.linalg.solve(M, missing.T).T
