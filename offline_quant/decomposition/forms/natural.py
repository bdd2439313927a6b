"""No basis: components are the channels."""

from torch import Tensor

from bitsmoe_kernels.format.schema import Basis, Projection, ProjectionName
from offline_quant.decomposition.bases import Decomposition, natural
from offline_quant.decomposition.forms.base import NATURAL_DOWN, Form, Grams, Projections


class Natural(Form):
    """Channels as components, sorted by importance for each expert."""

    name = "natural"

    def projections(self, basis: Basis) -> Projections:
        """See `Form.projections`."""
        return {"gate_up": Projection(code_rows=0, order="expert"), "down": NATURAL_DOWN}

    def decompositions(
        self, grams: Grams, moments: Tensor, output_unit: float, bits: int
    ) -> dict[ProjectionName, Decomposition]:
        """See `Form.decompositions`."""
        return {"gate_up": natural("gate_up"), "down": natural("down")}
