"""What a form of decomposition decides: which projections have a basis, and where the basis comes from."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from bitsmoe_kernels.format.schema import Basis, Layer, Projection, ProjectionName
from bitsmoe_kernels.models.families import MoEShape
from offline_quant.decomposition.bases import Decomposition
from offline_quant.linalg import add_product, mirrored

Projections = dict[ProjectionName, Projection]
Grams = dict[ProjectionName, Tensor]
"""Float64 [side, side] by projection, summed over experts: what shared bases are found from."""


@dataclass(frozen=True)
class MeasuredWeights:
    """One expert's weights, with what calibration says of them.

    Attributes:
        gate_up: float32 [2 I, H]; without a gate up alone, [I, H].
        down: float32 [H, I].
        output_weights: float32 [2 I] or [I], what the layer's output feels of an error in each gate and up output.
        routing_frequency: share of expert slots that went to the expert.
    """

    gate_up: Tensor
    down: Tensor
    output_weights: Tensor
    routing_frequency: float

    @property
    def gated(self) -> bool:
        """Whether the expert has a gate."""
        return len(self.gate_up) > self.down.shape[1]


class Form(ABC):
    """One form of decomposition: schema, grams and decompositions of a layer's projections.

    Attributes:
        name: as `--basis` takes it, if it does.
    """

    name: str

    @property
    def shares_bases(self) -> bool:
        """Whether experts share bases, for which every token served pays a projection."""
        return any(p.basis is not None for p in self.projections(Basis(rank=1, bits=8), True).values())

    @abstractmethod
    def projections(self, basis: Basis, gated: bool) -> Projections:
        """Every projection's entry in the schema, with no codes yet.

        Args:
            basis: the entry of a shared one.
            gated: whether experts have a gate.
        """

    @abstractmethod
    def decompositions(
        self, grams: Grams, moments: Tensor, output_unit: float, bits: int, gated: bool
    ) -> dict[ProjectionName, Decomposition]:
        """The decomposition of every projection.

        Args:
            grams: sum over experts of what `grams` gave.
            moments: float32 [H, H], second moments of the layer's inputs, pooled over tokens.
            output_unit: mean weight of a gate or up output.
            bits: of a stored basis, 8 or 16.
            gated: whether experts have a gate.
        """

    def grams(self, expert: MeasuredWeights) -> Grams:
        """One expert's share of what shared bases are found from; empty without any."""
        return {}

    def schema(self, shape: MoEShape, basis_bits: Literal[8, 16]) -> Layer:
        """A layer's schema under this form, with no codes yet."""
        return Layer(
            num_experts=shape.num_experts,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            hidden_act=shape.hidden_act,
            projections={
                name: projection.model_copy(update={"bias": shape.family.bias})
                for name, projection in self.projections(
                    Basis(rank=shape.hidden_size, bits=basis_bits), shape.family.gated
                ).items()
            },
        )


NATURAL_DOWN = Projection(code_rows=0)
"""Intermediate channels without a basis are permuted with the expert's other matrices, which costs no bytes."""


def together(gated: bool) -> ProjectionName:
    """The projection of all matrices that read an expert's input."""
    return "gate_up" if gated else "up"


def apart(gated: bool) -> tuple[ProjectionName, ...]:
    """The projections of these matrices, one by one."""
    return ("gate", "up") if gated else ("up",)


def gram_of(W: Tensor, weights: Tensor | None = None) -> Tensor:
    """W^T diag(weights) W [K, K] of W [N, K]; weights [N], None: of one."""
    weighed = W if weights is None else W * weights[:, None]
    return mirrored(add_product(W.new_zeros(W.shape[1], W.shape[1]), W, weighed))


def add_grams(total: Grams, grams: Mapping[ProjectionName, Tensor]) -> None:
    """Add grams to a sum, in place."""
    for name, gram in grams.items():
        total[name] = total[name].add_(gram) if name in total else gram
