"""The forms of decomposition: which projections have a basis, and the schema that follows."""

from bitsmoe_kernels.format.schema import Basis, Layer, Projection, ProjectionName
from bitsmoe_kernels.models.families import MoEShape
from offline_quant.config import QuantizeConfig


def schema_of(form: str, shape: MoEShape, config: QuantizeConfig) -> Layer:
    """A layer's schema under one form, with no codes yet: natural, whitened, paper, or split (gate and up apart)."""
    basis = Basis(rank=shape.hidden_size, bits=config.basis_bits)
    # Intermediate channels without a basis are permuted with the expert's other matrices instead, at no cost.
    natural_down = Projection(code_rows=0)
    inputs = Projection(code_rows=0, order="expert", basis=basis)
    forms: dict[str, dict[ProjectionName, Projection]] = {
        "natural": {"gate_up": Projection(code_rows=0, order="expert"), "down": natural_down},
        "whitened": {"gate_up": inputs, "down": natural_down},
        "paper": {
            "gate": inputs,
            "up": inputs,
            "down": Projection(code_rows=0, order="expert", basis=basis, component_axis="output"),
        },
        # One width for a matrix: nothing to sort.
        "split": {"gate": Projection(code_rows=0), "up": Projection(code_rows=0), "down": natural_down},
    }
    return Layer(
        num_experts=shape.num_experts,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        projections=forms[form],
    )


def _shares_bases(layer: Layer) -> bool:
    return any(p.basis is not None for p in layer.projections.values())
