"""What a model's tensors are read from."""

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

from bitsmoe_kernels.format.schema import TensorSpec


class Tensors(Protocol):
    """Tensors by name, as `ShardReader` has them."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of each."""

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
