"""The backend of the CPU kernels. Importing it loads no library: the first use does."""

from collections.abc import Sequence

from torch import Tensor

from bitsmoe_kernels._cpu import library
from bitsmoe_kernels.backends.base import Backend, Prepared, Target, moe_op
from bitsmoe_kernels.format.schema import Layer
from bitsmoe_kernels.layout.cpu_layout import to_cpu_layout, unsupported
from bitsmoe_kernels.reference import LayerWeights


@moe_op("bitsmoe::moe_cpu")
def moe_cpu_op(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    tensors: Sequence[Tensor],
    key: str,
) -> Tensor:
    """`library.forward` as an op. Shapes are those of `Backend.compute`; `tensors` is the layer's block of bytes."""
    return library.forward(tensors[0], x, topk_weights, topk_ids, expert_map)


class CpuMoE(Backend):
    """Computes a layer on a CPU by integer dot products of codes and activations."""

    name = "CPU kernels"
    device_type = "cpu"
    cuda_graphs = False
    compute = staticmethod(moe_cpu_op)

    def why_not(self, layer: Layer, target: Target) -> str | None:
        """See `Backend`: the device, the dtype, the processor, or what the layout cannot hold."""
        if target.device_type != "cpu":
            return "they are for CPUs"
        if target.dtype not in library.DTYPES:
            return f"activations are {target.dtype_name}, not float32, float16 or bfloat16"
        return library.why_not() or unsupported(layer)

    def describe(self, target: Target) -> str:
        """See `Backend`."""
        return f"CPU kernels: mixed-bit dot products by {library.TITLES[library.best()]}, {target.dtype_name}"

    def prepare(self, weights: LayerWeights, target: Target) -> Prepared:
        """The layer in the layout of the CPU kernels."""
        return Prepared({"cpu_layer": to_cpu_layout(weights)}, key="")
