"""Everything that differs between vLLM versions. No other file branches on the version.

Tried: 0.26 <= vLLM <= 0.33 (0.33 by its interfaces alone: no build of it runs on a CPU yet). What was seen to differ:

- Routing on a CPU. Newer versions have `CPURouter`, plain torch, and pass its result to `apply`. Older ones
  (0.26) route with an operator that CPU builds lack; there the method declares itself monolithic, receives the
  router's logits and selects the experts with vLLM's own torch function. So it does in newer versions for layers
  that `CPURouter` refuses or routes wrongly, see `own_routing`.
- The description of a linear layer that vLLM's choice of kernels takes: older versions want one more field.

Seen in 0.32.0, with any model: on a CPU some kinds of parallelism start up and then fail at the first request (see
`cpu_parallel_fault`).
"""

import ast
import copy
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import textwrap
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError, fault_list
from bitsmoe_kernels.format.linear_layers import DenseConfig, DenseWeights
from bitsmoe_kernels.models.families import FAMILIES

OLDEST_VLLM = (0, 26)
NEWEST_VLLM = (0, 33)

OwnClasses = Callable[[], Sequence[type]]
"""Imports the plugin's classes that vLLM calls, each derived from a class of vLLM's."""


def check_vllm_version(own_classes: OwnClasses) -> None:
    """Refuse a vLLM that this plugin does not fit. One newer than those tried has to have the same interfaces.

    Args:
        own_classes: see `interface_faults`.

    Raises:
        BitsmoeError: names the version found, those tried, and every interface that does not match.
    """
    import vllm

    oldest, newest = (".".join(map(str, v)) for v in (OLDEST_VLLM, NEWEST_VLLM))
    installed = f"vLLM {vllm.__version__} is installed, and this bitsmoe-vllm was tried with {oldest} to {newest}"
    remedy = f"pip install 'vllm>={oldest},<{NEWEST_VLLM[0]}.{NEWEST_VLLM[1] + 1}', or a newer bitsmoe-vllm"
    try:
        found = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    except ValueError:  # built from a source tree without a version
        found = None
    if found is not None and found <= NEWEST_VLLM:
        if found < OLDEST_VLLM:
            raise BitsmoeError(f"{installed}: {remedy}")
        return
    if faults := interface_faults(own_classes):
        raise BitsmoeError(fault_list(f"{installed}. It does not fit; {remedy}", faults))
    warn_once(
        "bitsmoe: %s. All interfaces that it uses match, so it starts, UNTRIED. If anything goes wrong: %s",
        installed,
        remedy,
    )


def warn_once(message: str, *args: object) -> None:
    """Log a warning where vLLM logs, the same one once in a process."""
    from vllm.logger import init_logger

    init_logger(f"vllm.{__name__}").warning_once(message, *args)


_USED: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm.config": {
        "VllmConfig": (
            "model_config", "parallel_config", "load_config", "lora_config", "speculative_config", "offload_config",
            "kernel_config",
        ),
        "ModelConfig": (
            "model", "model_weights", "hf_config", "dtype", "enforce_eager", "quantization_config", "runner_type",
        ),
        "ParallelConfig": (
            "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "enable_expert_parallel",
            "enable_eplb", "enable_elastic_ep", "all2all_backend", "distributed_executor_backend",
        ),
        "LoadConfig": ("load_format", "safetensors_load_strategy"),
        "LoRAConfig": ("target_modules",),
        "SpeculativeConfig": ("method", "draft_model_config"),
        "OffloadConfig": ("uva", "prefetch"),
        "KernelConfig": ("moe_backend",),
        "get_current_vllm_config": (),
    },
    "vllm.config.offload": {
        "UVAOffloadConfig": ("cpu_offload_gb",), "PrefetchOffloadConfig": ("offload_group_size",),
    },
    "vllm.logger": {"init_logger": ()},
    "vllm.model_executor.layers.fused_moe": {
        "RoutedExperts": (
            "moe_config", "expert_map", "activation", "apply_router_weight_on_input", "swiglu_limit", "load_weights",
        ),
        "FusedMoEMethodBase": ("moe", "moe_kernel"),
    },
    "vllm.model_executor.layers.fused_moe.activation": {"MoEActivation": ("SILU",)},
    "vllm.model_executor.layers.fused_moe.config": {
        "FusedMoEConfig": (
            "num_experts", "intermediate_size", "experts_per_token", "has_bias", "moe_parallel_config",
        ),
        "FusedMoEParallelConfig": ("tp_rank", "tp_size", "enable_eplb"),
    },
    "vllm.model_executor.layers.linear": {"LinearBase": (), "UnquantizedLinearMethod": ()},
    "vllm.model_executor.layers.quantization": {
        "QUANTIZATION_METHODS": (), "get_quantization_config": (), "register_quantization_config": (),
    },
    "vllm.model_executor.layers.quantization.base_config": {
        "QuantizationConfig": ("packed_modules_mapping",), "QuantizeMethodBase": (),
    },
    "vllm.model_executor.layers.vocab_parallel_embedding": {"ParallelLMHead": ()},
    "vllm.model_executor.kernels.linear": {
        "MPLinearLayerConfig": (
            "full_weight_shape", "partition_weight_shape", "weight_type", "act_type", "group_size", "zero_points",
        ),
        "choose_mp_linear_kernel": (), "_POSSIBLE_KERNELS": (),
    },
    "vllm.model_executor.kernels.linear.mixed_precision.cpu": {"CPUWNA16LinearKernel": ("can_implement",)},
    "vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel": {"MPLinearKernel": ("_get_weight_params",)},
    "vllm.model_executor.model_loader.reload.layerwise": {"make_online_process_loader": ()},
    "vllm.model_executor.models.config": {
        "MODELS_CONFIG_MAP": (),
        "VerifyAndUpdateConfig": ("verify_and_update_config", "verify_and_update_model_config"),
    },
    "vllm.model_executor.models.utils": {"WeightsMapper": ("orig_to_new_regex", "apply_dict", "apply_list", "__or__")},
    "vllm.platforms": {"current_platform": ("is_cpu", "is_cuda", "device_type", "get_device_capability")},
    "vllm.scalar_type": {"scalar_types": ("uint4b8", "uint8b128")},
}  # fmt: skip
"""What the plugin takes from vLLM: module, name in it, and the names of that which are read."""


def interface_faults(own_classes: OwnClasses) -> list[str]:
    """Where the installed vLLM does not have what this plugin takes from it, or calls it otherwise; empty if nowhere.

    Names, fields and signatures are looked at; what they do is not.

    Args:
        own_classes: imports the plugin's classes that vLLM calls; needs vLLM to have the names that they import.
    """
    faults = []
    for module, names in _USED.items():
        try:
            there = importlib.import_module(module)
        except ImportError as e:
            faults.append(f"{module} cannot be imported ({e})")
            continue
        for name, read in names.items():
            if (owner := getattr(there, name, None)) is None:
                faults.append(f"{module} has no {name}")
            elif missing := sorted(set(read) - _attributes(owner)):
                faults.append(f"{module}.{name} has no {', '.join(missing)}")
    return faults or list(_override_faults(own_classes()))


def _override_faults(own_classes: Sequence[type]) -> Iterator[str]:
    """Where the plugin's classes do not fill the place of the vLLM classes that they derive from."""
    for ours in own_classes:
        theirs = ours.__mro__[1]
        for name in sorted(getattr(theirs, "__abstractmethods__", frozenset()) - vars(ours).keys()):
            yield f"{theirs.__name__}.{name} is abstract, and {ours.__name__} does not have it"
        for name in vars(ours):
            if name.startswith("_"):
                continue
            if (called := getattr(theirs, name, None)) is None:
                yield f"{theirs.__name__} has no {name}"
            elif callable(called):
                given, taken = (inspect.signature(f).parameters for f in (called, getattr(ours, name)))
                named = {n for n, p in given.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {"self"}
                needed = {n for n, p in taken.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD} - {
                    "self"
                }
                open_ended = any(p.kind is p.VAR_KEYWORD for p in taken.values())
                if more := sorted(named - taken.keys()) if not open_ended else []:
                    yield f"{theirs.__name__}.{name} is called with {', '.join(more)}, which {ours.__name__} has not"
                if fewer := sorted(needed - given.keys()):
                    yield f"{theirs.__name__}.{name} is not called with {', '.join(fewer)}, which {ours.__name__} needs"


def _attributes(owner: Any) -> set[str]:
    """Names that can be read of an object, or of instances of a class: fields, methods and what these assign."""
    names = set(dir(owner)) | set(getattr(owner, "__dataclass_fields__", ()))
    for cls in owner.__mro__ if inspect.isclass(owner) else ():
        if cls.__module__.partition(".")[0] == "vllm":
            names |= _assigned(cls)
    return names


@functools.cache
def _assigned(cls: type) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    return {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}


_TRANSFORMERS_BACKEND = ("TransformersMoEForCausalLM", "TransformersMultiModalMoEForCausalLM")
"""What vLLM calls any architecture with `--model-impl transformers`."""

_constructed: Callable[[], Any] = lambda: None  # noqa: E731


def watch_configs(architectures: Iterable[str]) -> None:
    """Have vLLM show us every `VllmConfig` of these architectures while it constructs it.

    vLLM looks up the architecture in MODELS_CONFIG_MAP and calls what it finds there; what is there already is called
    as before. May be called any number of times.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    for architecture in (*architectures, *FAMILIES, *_TRANSFORMERS_BACKEND):
        known = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
        if not hasattr(known, "shown_to_bitsmoe"):
            MODELS_CONFIG_MAP[architecture] = _showing(known)


def _showing(known: Any) -> Any:
    class Showing(known):
        shown_to_bitsmoe = True

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            global _constructed
            known.verify_and_update_config(vllm_config)
            _constructed = weakref.ref(vllm_config)

    return Showing


def config_under_construction(hf_config: Any) -> Any | None:
    """The `VllmConfig` that vLLM is constructing around a model's transformers config; None where it was not shown.

    vLLM hands our quantization config neither parallel sizes nor load format. This is how the main process can refuse
    an impossible option before any worker starts. Where nothing is found the workers refuse it.
    """
    vllm_config = _constructed()
    return vllm_config if vllm_config is not None and vllm_config.model_config.hf_config is hf_config else None


def kept_on_reload(loader: Callable[..., None]) -> Callable[..., None]:
    """A parameter's `weight_loader` that vLLM's reload calls directly, and not through a wrapper of its own.

    Its wrapper counts elements copied into the parameter, to know when a layer is complete. Ours has none then: its
    size is known once all tensors are there. vLLM takes loaders of this name for wrapped already.
    """

    @functools.wraps(loader, assigned=())
    def online_process_loader(param: Tensor, loaded_weight: Tensor) -> None:
        loader(param, loaded_weight)

    return online_process_loader


def cpu_parallel_fault(parallel: Any, enforce_eager: bool) -> str | None:
    """What of a parallel configuration vLLM cannot do on a CPU, though it would start; None if nothing.

    - Ray deals out devices that it knows, of which CPUs are none.
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
    if parallel.distributed_executor_backend == "ray":
        return (
            "--distributed-executor-backend ray: vLLM gives Ray's workers GPUs and cannot run them on CPUs; drop the "
            "option, or use mp"
        )
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


_CPU_ROUTER = "vllm.model_executor.layers.fused_moe.router.cpu_router"
Routing = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of vLLM's RoutedExperts, tokens [T, H] and the router's logits [T, experts]: routing weights float32 [T, top_k] and
global expert ids int32 [T, top_k]."""


def own_routing(layer: Any) -> Routing | None:
    """How to route a layer's tokens, by vLLM's torch function for CPUs; None where vLLM routes before it calls `apply`.

    Args:
        layer: vLLM's RoutedExperts.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    newer, one_group = importlib.util.find_spec(_CPU_ROUTER) is not None, _is_one_group(layer)
    if newer and not one_group:
        return None
    module = importlib.import_module(_CPU_ROUTER if newer else "vllm.model_executor.layers.fused_moe.cpu_fused_moe")
    return functools.partial(_select_experts, module.select_experts, one_group)


def _is_one_group(layer: Any) -> bool:
    """Whether vLLM's function for CPUs is right only if all experts are called one group, which changes nothing.

    Without groups it refuses sigmoid scores (MiniMax-M2, Laguna) and leaves out the bias of softmax (ERNIE-4.5).
    """
    if layer.use_grouped_topk or layer.custom_routing_function is not None:
        return False
    biased = layer.e_score_correction_bias is not None
    return layer.scoring_func == "sigmoid" or (layer.scoring_func == "softmax" and biased)


def _select_experts(
    select: Callable[..., tuple[Tensor, Tensor]], one_group: bool, layer: Any, x: Tensor, router_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """See `Routing`; `select` is vLLM's function. torch.compile traces this."""
    bias = layer.e_score_correction_bias
    weights, ids = select(
        hidden_states=x,
        router_logits=router_logits,
        top_k=layer.top_k,
        use_grouped_topk=layer.use_grouped_topk or one_group,
        renormalize=layer.renormalize,
        topk_group=1 if one_group else layer.topk_group,
        num_expert_group=1 if one_group else layer.num_expert_group,
        custom_routing_function=layer.custom_routing_function,
        scoring_func=layer.scoring_func,
        # As on GPUs: without groups only biased routing multiplies by it.
        routed_scaling_factor=1.0 if one_group and bias is None else layer.routed_scaling_factor,
        e_score_correction_bias=bias,
    )
    return weights.to(torch.float32), ids


def add_linear_kernel(kernel: type) -> None:
    """Put a kernel for quantized linear layers before those that vLLM has for a CPU."""
    from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        known = _POSSIBLE_KERNELS.setdefault(current_platform._enum, [])
        if kernel not in known:
            known.insert(0, kernel)


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
