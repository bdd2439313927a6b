"""Weights of chance for a model of any size, in the memory of its largest tensor."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from bitsmoe_kernels.format.schema import TensorSpec
from offline_quant.model.outside.skeleton import covered

_STEP = 7
"""Values between the places of two tensors."""


class Chance:
    """Weights of chance: matrices are windows into one vector, at a place of its own each, and so is every expert.

    Args:
        tensors: with the shapes that are wanted.
        hidden_size: inverse of the variance of matrices. Other weights are around 1.
        dtype: of the weights.
        below: what whole numbers stay below.
    """

    def __init__(self, tensors: Mapping[str, Tensor], hidden_size: int, dtype: torch.dtype, below: int = 1):
        self._tensors, self._below = tensors, below
        self._places = {name: _STEP * i for i, name in enumerate(tensors)}
        longest = max((covered(tensor) for tensor in tensors.values()), default=0)
        generator = torch.Generator().manual_seed(0)
        self._vector = torch.randn(longest + _STEP * len(tensors), generator=generator, dtype=dtype)
        self._vector *= hidden_size**-0.5

    def __getitem__(self, name: str) -> Tensor:
        like, place = self._tensors[name], self._places[name]
        if not like.is_floating_point():
            return (torch.arange(like.numel()) % self._below).to(like.dtype).view(like.shape)
        if like.dim() > 2:
            inner = torch.empty(like.shape[1:], device="meta").stride()
            return self._vector[place:].as_strided(like.shape, (1, *inner))
        window = self._vector[place : place + like.numel()].view(like.shape)
        return window if like.dim() == 2 else 1 + window


class HeldTensors:
    """Tensors in memory by their names in files, see `Tensors`.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self.specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def get(self, name: str) -> Tensor:
        """One tensor."""
        return self._tensors[name]
