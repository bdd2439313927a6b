"""Codes of one projection of some experts under a plan, before they are stored."""

from torch import Tensor

from offline_quant.decomposition.ranking import RankedProjection
from offline_quant.layer.plan import LayerPlan
from offline_quant.layer.view import LayerView
from offline_quant.linalg import CholeskyFactor
from offline_quant.rounding.error_feedback import Quantized, RoundingMode, quantize


def round_projection(
    view: LayerView,
    plan: LayerPlan,
    projection: RankedProjection,
    chunk: range,
    W: Tensor,
    M: Tensor,
    factor: CholeskyFactor | None,
    mode: RoundingMode,
) -> tuple[Quantized, Tensor]:
    """Codes of W, and the factor they are codes of.

    Args:
        view: the layer.
        plan: its bit-widths.
        projection: decomposition and order of components.
        chunk: experts.
        W: [n, N, K], rows scaled.
        M: [n, K, K], moments of what enters the contraction, in stored order.
        factor: of M, where it is known.
        mode: how much work it takes.

    Returns:
        The codes; the spectral factors [n, K', N'] in stored order.
    """
    decomposition = projection.decomposition
    order = projection.components.order[chunk.start : chunk.stop]
    F = decomposition.factors(W)
    on_input = decomposition.component_axis == "input"
    F = F.gather(1, order[:, :, None].expand_as(F)) if on_input else F.gather(2, order[:, None].expand_as(F))
    width = plan.widths(projection.name, chunk, view.config.block_size, view.ctx.device).flatten(1)
    return quantize(F, M, width, "K" if on_input else "N", mode, factor), F
