"""One basis on the input side of gate and up, from weights and activations."""

from torch import Tensor

from bitsmoe_kernels.format.schema import Basis, Projection, ProjectionName
from offline_quant.decomposition.bases import Decomposition, natural, whitened
from offline_quant.decomposition.forms.base import (
    NATURAL_DOWN,
    Form,
    Grams,
    MeasuredWeights,
    Projections,
    gram_of,
)


class Whitened(Form):
    """Whitened SVD of the stacked gate and up matrices; down keeps its channels."""

    name = "whitened"

    def projections(self, basis: Basis) -> Projections:
        """See `Form.projections`."""
        return {"gate_up": Projection(code_rows=0, order="expert", basis=basis), "down": NATURAL_DOWN}

    def grams(self, expert: MeasuredWeights) -> Grams:
        """See `Form.grams`."""
        gram = gram_of(expert.gate_up, expert.output_weights)
        return {"gate_up": gram.double() * expert.routing_frequency}

    def decompositions(
        self, grams: Grams, moments: Tensor, output_unit: float, bits: int
    ) -> dict[ProjectionName, Decomposition]:
        """See `Form.decompositions`."""
        gate_up = whitened("gate_up", grams["gate_up"] / output_unit, moments, bits)
        return {"gate_up": gate_up, "down": natural("down")}
