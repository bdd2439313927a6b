"""One layer of given experts, measured on given calibration inputs."""

from torch import Tensor

from bitsmoe_kernels.models.families import FAMILIES, MoEShape
from offline_quant.calibration.moments import LayerMoments
from offline_quant.config import QuantizeConfig
from offline_quant.layer.context import LayerContext
from offline_quant.layer.first_pass import measure_layer
from offline_quant.layer.view import LayerView
from offline_quant.model.expert_inputs import ExpertInputs
from offline_quant.model.expert_weights import ExpertBiases, ExpertWeights


def measured_layer(
    gate_up: Tensor,
    down: Tensor,
    inputs: ExpertInputs,
    config: QuantizeConfig,
    biases: ExpertBiases | None = None,
) -> LayerView:
    """A layer after its first pass.

    Args:
        gate_up: [E, 2 I, H].
        down: [E, H, I].
        inputs: what enters the experts.
        config: options.
        biases: of the experts, [E, 2 I] and [E, H]: the layer is one of gpt-oss then.
    """
    E, H, I = down.shape  # noqa: E741
    family = FAMILIES["Qwen3MoeForCausalLM" if biases is None else "GptOssForCausalLM"]
    shape = MoEShape(family, (0,), E, H, I, family.hidden_act)

    def load(chunk: range) -> ExpertWeights:
        own = slice(chunk.start, chunk.stop)
        return ExpertWeights(
            gate_up[own], down[own], None if biases is None else ExpertBiases(*(b[own] for b in biases))
        )

    ctx = LayerContext(load, LayerMoments(inputs, E, shape.hidden_act), shape, config, "layer")
    return LayerView(ctx, measure_layer(ctx))
