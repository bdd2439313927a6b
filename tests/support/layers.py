"""One layer of given experts, measured on given calibration inputs."""

from torch import Tensor

from bitsmoe_kernels.models.families import FAMILIES, MoEShape
from offline_quant.calibration.moments import LayerMoments
from offline_quant.config import QuantizeConfig
from offline_quant.layer.context import LayerContext
from offline_quant.layer.first_pass import measure_layer
from offline_quant.layer.view import LayerView
from offline_quant.model.expert_inputs import ExpertInputs
from offline_quant.model.expert_weights import ExpertWeights


def measured_layer(gate_up: Tensor, down: Tensor, inputs: ExpertInputs, config: QuantizeConfig) -> LayerView:
    """A layer after its first pass.

    Args:
        gate_up: [E, 2 I, H].
        down: [E, H, I].
        inputs: what enters the experts.
        config: options.
    """
    E, H, I = down.shape  # noqa: E741
    shape = MoEShape(FAMILIES["Qwen3MoeForCausalLM"], (0,), E, H, I)

    def load(chunk: range) -> ExpertWeights:
        return ExpertWeights(gate_up[chunk.start : chunk.stop], down[chunk.start : chunk.stop])

    ctx = LayerContext(load, LayerMoments(inputs, E), shape, config, "layer")
    return LayerView(ctx, measure_layer(ctx))
