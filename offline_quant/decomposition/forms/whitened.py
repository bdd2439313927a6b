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
    together,
)


class Whitened(Form):
    """Whitened SVD of the stacked gate and up matrices; down keeps its channels."""

    name = "whitened"

    def projections(self, basis: Basis, gated: bool) -> Projections:
        """See `Form.projections`."""
        return {together(gated): Projection(code_rows=0, order="expert", basis=basis), "down": NATURAL_DOWN}

    def grams(self, expert: MeasuredWeights) -> Grams:
        """See `Form.grams`."""
        gram = gram_of(expert.gate_up, expert.output_weights)
        return {together(expert.gated): gram.double() * expert.routing_frequency}

    def decompositions(
        self, grams: Grams, moments: Tensor, output_unit: float, bits: int, gated: bool
    ) -> dict[ProjectionName, Decomposition]:
        """See `Form.decompositions`."""
        name = together(gated)
        return {name: whitened(name, grams[name] / output_unit, moments, bits), "down": natural("down")}
