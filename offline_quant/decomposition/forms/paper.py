"""Three bases from the weights alone, as the BitsMoE paper has them (arXiv 2606.00079)."""

from torch import Tensor

from bitsmoe_kernels.format.schema import Basis, Projection, ProjectionName
from offline_quant.decomposition.bases import Decomposition, paper
from offline_quant.decomposition.forms.base import Form, Grams, MeasuredWeights, Projections, apart, gram_of


class Paper(Form):
    """Right bases for gate and for up, a left basis for down."""

    name = "paper"

    def projections(self, basis: Basis, gated: bool) -> Projections:
        """See `Form.projections`."""
        inputs = Projection(code_rows=0, order="expert", basis=basis)
        outputs = Projection(code_rows=0, order="expert", basis=basis, component_axis="output")
        return dict.fromkeys(apart(gated), inputs) | {"down": outputs}

    def grams(self, expert: MeasuredWeights) -> Grams:
        """See `Form.grams`."""
        I, names = expert.down.shape[1], apart(expert.gated)  # noqa: E741
        inputs = zip(names, expert.gate_up.split(I), expert.output_weights.split(I), strict=True)
        grams: Grams = {name: gram_of(W, weights).double() for name, W, weights in inputs}
        return grams | {"down": gram_of(expert.down.T).double()}

    def decompositions(
        self, grams: Grams, moments: Tensor, output_unit: float, bits: int, gated: bool
    ) -> dict[ProjectionName, Decomposition]:
        """See `Form.decompositions`."""
        inputs = {name: paper(name, grams[name], "input", bits) for name in apart(gated)}
        return inputs | {"down": paper("down", grams["down"], "output", bits)}
