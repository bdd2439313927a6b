"""How vLLM computes the routed experts of a bitsmoe checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from bitsmoe_kernels.backends.base import Prepared
from bitsmoe_kernels.backends.select import select
from bitsmoe_kernels.errors import BitsmoeError, FormatError
from bitsmoe_kernels.expert_mlp import SILU_LIMIT, SWIGLU_LIMIT, HiddenAct
from bitsmoe_kernels.format.schema import Layer
from bitsmoe_kernels.reference import LayerWeights
from bitsmoe_vllm import _compat
from bitsmoe_vllm.startup import compute_target
from bitsmoe_vllm.weight_loading import LayerLoader

logger = init_logger(f"vllm.{__name__}")


_NAMES: dict[HiddenAct, tuple[str, ...]] = {
    "silu": ("silu",),
    "gelu_pytorch_tanh": ("gelu_tanh",),
    # The same for weights of vLLM's own kernels in different orders.
    "swigluoai": ("swigluoai", "swigluoai_uninterleave"),
    "silu_clamp10": ("silu",),
    "relu2": ("relu2_no_mul",),
}
"""vLLM's names of activations."""
_LIMITS: dict[HiddenAct, tuple[float | None, ...]] = {
    "silu": (None,),
    "gelu_pytorch_tanh": (None,),
    "swigluoai": (None, SWIGLU_LIMIT),
    "silu_clamp10": (SILU_LIMIT,),
    "relu2": (None,),
}
"""Where vLLM's layers clamp gate and up."""


class BitsmoeMoEMethod(FusedMoEMethodBase):
    """The method of one layer's routed experts: loads this rank's shard and computes its part of the output.

    vLLM routes before and, as `moe_kernel` stays None, sums over the ranks after.

    Args:
        layer: vLLM's RoutedExperts.
        prefix: the layer's name.
        schema: how the whole layer is stored.
        block_size: G.
        loaders: the model's loaders so far; this layer's is added.
    """

    def __init__(self, layer: Any, prefix: str, schema: Layer, block_size: int, loaders: list[LayerLoader]):
        super().__init__(layer.moe_config)
        self.prefix, self.schema, self.block_size, self._loaders = prefix, schema, block_size, loaders
        self._own_routing = _compat.own_routing(layer)
        self._names: list[str] = []
        """The layer's parameters in the order in which the backend takes them; none before loading."""

    @property
    def is_monolithic(self) -> bool:
        """Whether vLLM hands over router logits instead of the experts it selected."""
        return self._own_routing is not None

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: this describes weights to vLLM's own kernels, which do not compute these experts."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Called by vLLM in each worker to make the layer's parameters; ours are empty until they are loaded.

        Raises:
            BitsmoeError: the model uses something these experts cannot do, or does not fit the checkpoint.
        """
        schema, moe = self.schema, self.moe
        self._refuse_unsupported(layer)
        asked = (moe.num_experts, hidden_size, moe.intermediate_size)
        if asked != (schema.num_experts, schema.hidden_size, schema.intermediate_size):
            raise BitsmoeError(
                f"{self.prefix}: config.json describes experts, hidden_size, intermediate_size {asked}, but its "
                f"quantization_config {(schema.num_experts, schema.hidden_size, schema.intermediate_size)}: "
                "quantize the model again"
            )
        self.loader = LayerLoader(
            self.prefix,
            schema,
            self.block_size,
            tp_rank=moe.moe_parallel_config.tp_rank,
            tp_size=moe.moe_parallel_config.tp_size,
            experts=local_experts(layer.expert_map),
        )
        self.loader.register(layer)
        # Models reach expert weights in one of two ways: through this method of the layer, or through the
        # weight_loader of its parameters.
        layer.load_weights = self.loader.load_weights
        self._loaders.append(self.loader)
        self._dtype = params_dtype
        self._dummy = get_current_vllm_config().load_config.load_format == "dummy"

    def _refuse_unsupported(self, layer: Any) -> None:
        parallel = self.moe.moe_parallel_config
        faults = []
        stored = self.schema.hidden_act
        if layer.activation.value not in _NAMES[stored]:
            faults.append(f"activation {layer.activation.value!r} of a layer that was quantized for {stored!r}")
        if layer.apply_router_weight_on_input and self.moe.experts_per_token != 1:
            faults.append("routing weights applied to the input of several experts")
        biased = any(p.bias for p in self.schema.projections.values())
        if self.moe.has_bias != biased:
            said = [f"{'with' if yes else 'without'} biases" for yes in (self.moe.has_bias, biased)]
            faults.append(f"experts {said[0]}, which were quantized {said[1]}")
        if layer.swiglu_limit not in _LIMITS[stored]:
            faults.append(f"swiglu_limit {layer.swiglu_limit} of a layer that was quantized for {stored!r}")
        if parallel.enable_eplb:
            faults.append("expert-parallel load balancing (drop --enable-eplb)")
        if faults:
            raise BitsmoeError(f"{self.prefix}: bitsmoe does not support {', '.join(faults)}")

    def process_weights_after_loading(self, layer: Any) -> None:
        """Called by vLLM for each layer once all weights are loaded.

        Raises:
            FormatError: lists every tensor, of any layer, that never arrived.
        """
        if self._dummy and self.loader.shard is None:
            self.loader.fill_dummy()
        elif faults := [fault for loader in self._loaders for fault in loader.missing()]:
            raise FormatError("the loaded weights", faults)
        if self._names:  # after a reload, which has put the weights in place
            return
        shard = self.loader.shard
        assert shard is not None
        self._target = compute_target(self._dtype)
        choice = select(shard, self._target)
        self._backend = choice.backend
        self._use(layer, shard)
        (logger.warning_once if choice.loud else logger.info_once)("%s", choice.message)

    def _prepare(self, shard: Layer, tensors: Mapping[str, Tensor]) -> Prepared:
        return self._backend.prepare(LayerWeights(shard, self.block_size, tensors), self._target)

    def _use(self, layer: Any, shard: Layer) -> None:
        """Replace the parameters that hold the file's tensors by those that the backend computes with."""
        stored = {name: getattr(layer, name).data for name in shard.tensor_specs(self.block_size)}
        prepared = self._prepare(shard, stored)
        for name, tensor in stored.items():
            if prepared.tensors.get(name) is not tensor:
                delattr(layer, name)
        for name, tensor in prepared.tensors.items():
            if tensor is not stored.get(name):
                layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        self._names, self._key = list(prepared.tensors), prepared.key
        parameters = {name: getattr(layer, name) for name in self._names}
        self.loader.reload_into(lambda part, tensors: self._replace(parameters, part, tensors))

    def _replace(self, parameters: Mapping[str, Tensor], shard: Layer, tensors: Mapping[str, Tensor]) -> None:
        """Write reloaded weights into the memory of the layer's parameters: CUDA graphs hold their addresses.

        Args:
            parameters: the layer's, as the backend named them.
            shard: schema of this rank's part of the new weights.
            tensors: the new weights, on the CPU.

        Raises:
            BitsmoeError: the new weights need other memory.
        """
        device = next(iter(parameters.values())).device
        new = self._prepare(shard, {name: tensor.to(device) for name, tensor in tensors.items()})
        if new.key != self._key or any(new.tensors[name].shape != p.shape for name, p in parameters.items()):
            raise BitsmoeError(
                f"{self.prefix}: the weights to be loaded have other bit-widths than those they replace, which "
                "takes other memory: start the server anew with them"
            )
        for name, parameter in parameters.items():
            parameter.data.copy_(new.tensors[name])

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """This rank's part of the experts' output.

        Args:
            layer: vLLM's RoutedExperts.
            x: [T, H].
            topk_weights: [T, top_k].
            topk_ids: [T, top_k], global expert ids.
            shared_experts: unused; vLLM computes them.
            shared_experts_input: unused.

        Returns:
            [T, H] in x's dtype.
        """
        if layer.apply_router_weight_on_input:  # of one expert
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        tensors = [getattr(layer, name) for name in self._names]
        return self._backend.compute(x, topk_weights, topk_ids, layer.expert_map, tensors, self._key)

    def apply_monolithic(self, layer: Any, x: Tensor, router_logits: Tensor, input_ids: Tensor | None = None) -> Tensor:
        """As `apply`, where this vLLM leaves the routing to the method."""
        assert self._own_routing is not None
        topk_weights, topk_ids = self._own_routing(layer, x, router_logits)
        return self.apply(layer, x, topk_weights, topk_ids)


def local_experts(expert_map: Tensor | None) -> list[int] | None:
    """Global ids of a rank's experts in local order, from vLLM's map; None: all of them.

    Args:
        expert_map: int32 [experts], local index or -1 for experts of other ranks; None without expert parallelism.
    """
    if expert_map is None:
        return None
    place = expert_map.tolist()
    return sorted((e for e, local in enumerate(place) if local >= 0), key=place.__getitem__)
