"""What an objective says, and what it may ask of the layer it values."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bitsmoe_kernels.format.schema import ProjectionName
from bitsmoe_kernels.models.families import MoEShape
from offline_quant.config import QuantizeConfig, Scope
from offline_quant.decomposition.ranking import RankedProjection
from offline_quant.linalg import CholeskyFactor
from offline_quant.model.expert_weights import ExpertWeights
from offline_quant.rounding.gaussian import kappa

Result = TypeVar("Result")
RankedProjections = dict[ProjectionName, RankedProjection]
Widths = NDArray[np.int64]
Ranks = NDArray[np.int64]
Losses = NDArray[np.float64]


class ValuedLayer(Protocol):
    """What an objective may ask of the layer it values."""

    @property
    def config(self) -> QuantizeConfig:
        """Options."""

    @property
    def shape(self) -> MoEShape:
        """Sizes of the layer's experts."""

    @property
    def routing_frequency(self) -> Tensor:
        """Share of expert slots that went to each expert, with a floor, float32 [E]."""

    def each(self, work: Callable[[range], Result]) -> Iterator[Result]:
        """`work` of every chunk of experts, in their order."""

    def load(self, chunk: range) -> ExpertWeights:
        """Experts of a chunk, their intermediate channels sorted."""

    def scaled_weights(self, name: ProjectionName, chunk: range, experts: ExpertWeights) -> Tensor:
        """W [n, N, K] of a projection, rows scaled by the root of the weight of their outputs."""

    def moments(self, projection: RankedProjection, chunk: range) -> Tensor:
        """Second moments [n, K, K] of what enters the contraction, rows in stored order."""

    def factor(self, projection: RankedProjection, chunk: range, M: Tensor) -> CholeskyFactor:
        """Factor of `moments`, or independent components where errors are not handed on."""

    def unit_energy(self, name: ProjectionName) -> float:
        """Energy at the layer's output of one unit of a projection's error."""


class Objective(ABC):
    """One way to value bits.

    Attributes:
        name: as `--objective` takes it.
        unit: what gets one width: a block of components, an expert's matrix, or a whole expert.
        forms: names of the forms of decomposition it chooses from with `--basis auto`.
        scope: whether one budget holds for each layer or for the model.
        ranks: whether compensators are among the choices.
        sensitive: whether losses are relative errors, to be weighed by trials of the layers under one model budget.
        pilots: whether a rough quantization of every form measures row norms before the choice.
    """

    name: str
    unit: Literal["block", "matrix", "expert"]
    forms: tuple[str, ...]
    scope: Scope
    ranks = False
    sensitive = False
    pilots = False

    @property
    def predicts_errors(self) -> bool:
        """Whether losses are relative errors of one projection's output, which add up."""
        return self.unit == "block"

    @abstractmethod
    def loss(self, view: ValuedLayer, projections: RankedProjections, width: Widths, rank: Ranks) -> Losses:
        """Loss of every unit at every choice, [units, choices].

        Args:
            view: the layer.
            projections: components of every projection.
            width: [choices].
            rank: [choices].
        """

    def weights(self, view: ValuedLayer, projections: RankedProjections) -> dict[ProjectionName, float]:
        """What a unit of each projection's loss counts, 1 on average; all 1 where units span projections.

        Args:
            view: the layer.
            projections: components of every projection.
        """
        return dict.fromkeys(projections, 1.0)

    def check(self, shape: MoEShape) -> None:  # noqa: B027 - most value any model
        """Refuse a model the objective cannot value.

        Raises:
            BitsmoeError: names the reason and the remedy.
        """


def output_energy(projection: RankedProjection, frequency: Tensor) -> float:
    """Energy of a projection's outputs per expert slot, weighed.

    Args:
        projection: its components.
        frequency: of the experts, [E].
    """
    return float((projection.components.total.double() * frequency.double()).sum())


def lost_shares(width: Widths) -> Losses:
    """Share of a Gaussian's energy that each width loses, [choices]."""
    return np.array([kappa(int(b)) for b in width])


def matrix_sizes(view: ValuedLayer, projections: RankedProjections) -> Losses:
    """Weights of one expert's matrix, by projection."""
    one = float(view.shape.hidden_size * view.shape.intermediate_size)
    return np.array([2 * one if name == "gate_up" else one for name in projections])
