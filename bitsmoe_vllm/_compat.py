"""Everything that differs between vLLM versions. No other file branches on the version.

Supported: 0.26.0 <= vLLM < 0.33. What was seen to differ within that range:

- Routing on a CPU. Newer versions have `CPURouter`, plain torch, and pass its result to `apply`. Older ones
  (0.26) route with an operator that CPU builds lack; there the method declares itself monolithic, receives the
  router's logits and selects the experts with vLLM's own torch function.
- The description of a linear layer that vLLM's choice of kernels takes: older versions want one more field.

Seen in 0.32.0, with any model: on a CPU some kinds of parallelism start up and then fail at the first request (see
`cpu_parallel_fault`).
"""

import copy
import dataclasses
import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.dense import DenseConfig, DenseWeights

MIN_VLLM = (0, 26)
BELOW_VLLM = (0, 33)


def check_vllm_version() -> None:
    """Refuse a vLLM this plugin was not written for.

    Raises:
        BitsmoeError: names the version found and the range.
    """
    import vllm

    low, high = (".".join(map(str, v)) for v in (MIN_VLLM, BELOW_VLLM))
    try:
        found = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    except ValueError:
        found = ()
    if not MIN_VLLM <= found < BELOW_VLLM:
        raise BitsmoeError(
            f"vLLM {vllm.__version__} is installed, but this version of bitsmoe-vllm supports vLLM >= {low}, < {high}: "
            f"pip install 'vllm>={low},<{high}', or a bitsmoe-vllm made for your vLLM"
        )


def config_under_construction() -> Any | None:
    """The `VllmConfig` whose constructor is running, or None.

    The main process builds our quantization config while it builds the `VllmConfig`, and hands it neither parallel
    sizes nor load format. Looking up the call stack is the one way to refuse an impossible setting before any worker
    starts, as one clear error; where nothing is found the workers refuse it.
    """
    from vllm.config import VllmConfig

    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, VllmConfig):
            return owner
        frame = frame.f_back
    return None


def cpu_parallel_fault(parallel: Any, enforce_eager: bool) -> str | None:
    """What of a parallel configuration vLLM cannot do on a CPU, though it would start; None if nothing.

    - Pipeline stages receive into buffers that a profiling run makes; a CPU worker leaves it out unless it compiles.
    - Data-parallel ranks of a MoE model exchange tokens by an operation that CPU communicators may lack.

    Args:
        parallel: vLLM's ParallelConfig.
        enforce_eager: the option.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    if parallel.pipeline_parallel_size > 1 and (enforce_eager or envs.VLLM_CPU_CI_ENV):
        without = "VLLM_CPU_CI_ENV" if envs.VLLM_CPU_CI_ENV else "--enforce-eager"
        return (
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size}: on a CPU vLLM cannot pass anything between "
            f"pipeline stages that it has not compiled; drop {without}"
        )
    if parallel.data_parallel_size > 1:
        from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
        from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

        if CpuCommunicator.all_gatherv is DeviceCommunicatorBase.all_gatherv:
            return (
                f"--data-parallel-size {parallel.data_parallel_size}: this vLLM cannot exchange tokens between "
                "data-parallel ranks on a CPU; use --tensor-parallel-size or --pipeline-parallel-size, or separate "
                "servers"
            )
    return None


def needs_own_routing() -> bool:
    """Whether this vLLM, on this platform, cannot route tokens before it calls the method's `apply`."""
    from vllm.platforms import current_platform

    router = "vllm.model_executor.layers.fused_moe.router.cpu_router"
    return current_platform.is_cpu() and importlib.util.find_spec(router) is None


def select_experts(layer: Any, x: Tensor, router_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Routing by vLLM's torch function for CPUs, where `needs_own_routing`.

    Args:
        layer: vLLM's RoutedExperts.
        x: [T, H].
        router_logits: [T, experts].

    Returns:
        Routing weights float32 [T, top_k] and global expert ids int32 [T, top_k].
    """
    from vllm.model_executor.layers.fused_moe.cpu_fused_moe import select_experts as vllm_select_experts

    weights, ids = vllm_select_experts(
        hidden_states=x,
        router_logits=router_logits,
        top_k=layer.top_k,
        use_grouped_topk=layer.use_grouped_topk,
        renormalize=layer.renormalize,
        topk_group=layer.topk_group,
        num_expert_group=layer.num_expert_group,
        custom_routing_function=layer.custom_routing_function,
        scoring_func=layer.scoring_func,
        routed_scaling_factor=layer.routed_scaling_factor,
        e_score_correction_bias=layer.e_score_correction_bias,
    )
    return weights.to(torch.float32), ids


def linear_quantization(dense: DenseConfig) -> Any:
    """vLLM's own quantization config for linear layers outside the routed experts."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    # It edits the dictionary it is given.
    return get_quantization_config(dense.quant_method).from_config(copy.deepcopy(dense.dump()))


def why_no_linear_kernel(
    weights: DenseWeights, whole: tuple[int, int], part: tuple[int, int], dtype: torch.dtype
) -> str | None:
    """Why vLLM, on this platform, has no kernel for a quantized linear layer; None where it has one.

    Args:
        weights: how the layer is stored.
        whole: its columns and rows (inputs, outputs).
        part: those of one rank.
        dtype: of activations.
    """
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
    from vllm.scalar_type import scalar_types

    known = {field.name for field in dataclasses.fields(MPLinearLayerConfig)}
    try:
        choose_mp_linear_kernel(
            MPLinearLayerConfig(
                full_weight_shape=whole,
                partition_weight_shape=part,
                weight_type={4: scalar_types.uint4b8, 8: scalar_types.uint8b128}[weights.num_bits],
                act_type=dtype,
                group_size=weights.group_size or -1,
                zero_points=False,
                **({"has_g_idx": False} if "has_g_idx" in known else {}),
            )
        )
    except ValueError as e:
        return "; ".join(line.strip() for line in str(e).splitlines()[1:])
    return None
