"""What a model's tensors are read from."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from bitsmoe_kernels.format.schema import TensorSpec
from bitsmoe_kernels.models.families import MoEShape
from offline_quant.model.expert_weights import ExpertWeights


class Tensors(Protocol):
    """Tensors by name, as `ShardReader` has them."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of each."""

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU."""


class WeightSource(Protocol):
    """A model's weights, ordinary or quantized."""

    directory: Path
    config: dict[str, Any]
    shape: MoEShape

    @property
    def tensors(self) -> Tensors:
        """The files' tensors; quantized ones outside the experts appear as dequantized matrices."""

    def experts(self, layer: int, chunk: range | None = None) -> ExpertWeights:
        """Routed experts of a layer, all or a chunk of them."""
