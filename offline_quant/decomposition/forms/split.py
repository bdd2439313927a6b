"""No basis, gate and up apart: for objectives that give every matrix one bit-width."""

from torch import Tensor

from bitsmoe_kernels.format.schema import Basis, Projection, ProjectionName
from offline_quant.decomposition.bases import Decomposition, natural
from offline_quant.decomposition.forms.base import NATURAL_DOWN, Form, Grams, Projections, apart


class Split(Form):
    """Gate, up and down as three matrices; with one width for a matrix there is nothing to sort."""

    name = "split"

    def projections(self, basis: Basis, gated: bool) -> Projections:
        """See `Form.projections`."""
        return {name: Projection(code_rows=0) for name in apart(gated)} | {"down": NATURAL_DOWN}

    def decompositions(
        self, grams: Grams, moments: Tensor, output_unit: float, bits: int, gated: bool
    ) -> dict[ProjectionName, Decomposition]:
        """See `Form.decompositions`."""
        return {name: natural(name) for name in (*apart(gated), "down")}
