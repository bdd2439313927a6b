"""No basis, gate and up apart: for objectives that give every matrix one bit-width."""

from torch import Tensor

from bitsmoe_kernels.format.schema import Basis, Projection, ProjectionName
from offline_quant.decomposition.bases import Decomposition, natural
from offline_quant.decomposition.forms.base import NATURAL_DOWN, Form, Grams, Projections


class Split(Form):
    """Gate, up and down as three matrices; with one width for a matrix there is nothing to sort."""

    name = "split"

    def projections(self, basis: Basis) -> Projections:
        """See `Form.projections`."""
        return {"gate": Projection(code_rows=0), "up": Projection(code_rows=0), "down": NATURAL_DOWN}

    def decompositions(
        self, grams: Grams, moments: Tensor, output_unit: float, bits: int
    ) -> dict[ProjectionName, Decomposition]:
        """See `Form.decompositions`."""
        return {"gate": natural("gate"), "up": natural("up"), "down": natural("down")}
