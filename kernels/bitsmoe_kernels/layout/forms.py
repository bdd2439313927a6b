"""Which forms of a layer the kernels can compute, on GPUs and CPUs alike."""

from bitsmoe_kernels.format.schema import Layer


def restricted(layer: Layer) -> str | None:
    """Why no kernels can compute this layer; None where some may."""
    if layer.projections["down"].component_axis == "output":
        return "its down projection has components on the output side (--basis paper)"
    if any(p.component_axis == "output" for p in layer.projections.values()):
        return "gate or up has components on the output side"
    if layer.projections["down"].basis:
        return "its down projection has a basis"
    if len({p.basis and p.basis.bits for name, p in layer.projections.items() if name != "down"}) > 1:
        return "gate and up have bases of different kinds"
    return None
