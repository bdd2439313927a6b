"""No basis: components are the channels."""

from torch import Tensor

from bitsmoe_kernels.format.schema import Basis, Projection, ProjectionName
from offline_quant.decomposition.bases import Decomposition, natural
from offline_quant.decomposition.forms.base import NATURAL_DOWN, Form, Grams, Projections, together


class Natural(Form):
    """Channels as components, sorted by importance for each expert."""

    name = "natural"

    def projections(self, basis: Basis, gated: bool) -> Projections:
        """See `Form.projections`."""
        return {together(gated): Projection(code_rows=0, order="expert"), "down": NATURAL_DOWN}

    def decompositions(
        self, grams: Grams, moments: Tensor, output_unit: float, bits: int, gated: bool
    ) -> dict[ProjectionName, Decomposition]:
        """See `Form.decompositions`."""
        return {name: natural(name) for name in (together(gated), "down")}
