"""Three bases from the weights alone, as the BitsMoE paper has them (arXiv 2606.00079)."""

from torch import Tensor

from bitsmoe_kernels.format.schema import Basis, Projection, ProjectionName
from offline_quant.decomposition.bases import Decomposition, paper
from offline_quant.decomposition.forms.base import Form, Grams, MeasuredWeights, Projections, gram_of


class Paper(Form):
    """Right bases for gate and for up, a left basis for down."""

    name = "paper"

    def projections(self, basis: Basis) -> Projections:
        """See `Form.projections`."""
        inputs = Projection(code_rows=0, order="expert", basis=basis)
        outputs = Projection(code_rows=0, order="expert", basis=basis, component_axis="output")
        return {"gate": inputs, "up": inputs, "down": outputs}

    def grams(self, expert: MeasuredWeights) -> Grams:
        """See `Form.grams`."""
        (gate, up), (of_gate, of_up) = expert.gate_up.chunk(2), expert.output_weights.chunk(2)
        return {
            "gate": gram_of(gate, of_gate).double(),
            "up": gram_of(up, of_up).double(),
            "down": gram_of(expert.down.T).double(),
        }

    def decompositions(
        self, grams: Grams, moments: Tensor, output_unit: float, bits: int
    ) -> dict[ProjectionName, Decomposition]:
        """See `Form.decompositions`."""
        return {
            "gate": paper("gate", grams["gate"], "input", bits),
            "up": paper("up", grams["up"], "input", bits),
            "down": paper("down", grams["down"], "output", bits),
        }
