"""Options of vLLM that cannot work with any bitsmoe checkpoint, each with the way that does."""

import importlib.util
from collections.abc import Iterator
from typing import Any

from bitsmoe_vllm import _compat

LORA_TARGETS = "q_proj k_proj v_proj o_proj"
"""The attention of most families."""

ALL2ALL = ("allgather_reducescatter", "naive", "pplx")
"""Of `--all2all-backend`. vLLM takes the last two for the first."""

_STATE = "it reads what vLLM itself has saved after loading, which is not written for bitsmoe checkpoints"
_SAFETENSORS = "it does not read the checkpoint's safetensors"
REFUSED_FORMATS = {
    "bitsandbytes": "it quantizes experts of its own",
    "gguf": _SAFETENSORS,
    "ipc_cache": _STATE,
    "mistral": "it reads files named consolidated*.safetensors, of which the checkpoint has none",
    "modelexpress": "it copies the parameters of another server, whose shapes are not known here before loading",
    "npcache": _SAFETENSORS,
    "pt": _SAFETENSORS,
    "runai_streamer_sharded": _STATE,
    "sharded_state": _STATE,
    "tensorizer": _STATE,
}
"""Of `--load-format`, and why."""
PACKAGES = {
    "fastsafetensors": "fastsafetensors",
    "instanttensor": "instanttensor",
    "runai_streamer": "runai_model_streamer",
}
"""What vLLM imports for a load format."""
ON_GPU = ("fastsafetensors", "instanttensor")
"""Load formats that read into the memory of a CUDA device."""


def option_faults(vllm_config: Any) -> Iterator[str]:
    """One sentence for each option that cannot work: option, reason and remedy.

    Args:
        vllm_config: vLLM's VllmConfig, perhaps still under construction.
    """
    yield from _parallel_faults(vllm_config.parallel_config)
    yield from _load_faults(vllm_config.load_config)
    yield from _offload_faults(vllm_config.offload_config)
    yield from _backend_faults(vllm_config)
    if vllm_config.lora_config is not None and vllm_config.model_config.runner_type != "draft":
        yield from _lora_faults(vllm_config.lora_config.target_modules)


def _parallel_faults(parallel: Any) -> Iterator[str]:
    if parallel.enable_eplb:
        yield "--enable-eplb: expert-parallel load balancing is not supported; drop the option"
    if parallel.enable_elastic_ep:
        yield "--enable-elastic-ep: experts cannot be dealt out anew while serving; drop the option"
    if (backend := parallel.all2all_backend) not in ALL2ALL:
        yield (
            f"--all2all-backend {backend}: it works only with experts that vLLM's modular kernels compute; "
            f"use {ALL2ALL[0]}, the default"
        )


def _load_faults(load: Any) -> Iterator[str]:
    from vllm.platforms import current_platform

    asked = f"--load-format {load.load_format}"
    if load.load_format in REFUSED_FORMATS:
        yield f"{asked}: {REFUSED_FORMATS[load.load_format]}; drop the option"
    elif load.load_format in ON_GPU and current_platform.is_cpu():
        yield f"{asked}: it loads onto CUDA devices only, and this vLLM computes on a CPU; drop the option"
    elif (package := PACKAGES.get(load.load_format)) and importlib.util.find_spec(package) is None:
        yield f"{asked}: it needs a package that is not installed; pip install {package.replace('_', '-')}"
    if load.safetensors_load_strategy == "torchao":
        yield (
            "--safetensors-load-strategy torchao: it is for checkpoints that torchao has quantized; "
            "use lazy, eager or prefetch"
        )


def _offload_faults(offload: Any) -> Iterator[str]:
    # vLLM moves the parameters that it finds before loading. Those of our experts are made by loading.
    why = "vLLM cannot offload the quantized experts, which are nearly all of the model; drop the option"
    if offload.uva.cpu_offload_gb > 0:
        yield f"--cpu-offload-gb {offload.uva.cpu_offload_gb:g}: {why}"
    if offload.prefetch.offload_group_size > 0:
        yield f"--offload-group-size {offload.prefetch.offload_group_size}: {why}"


def _backend_faults(vllm_config: Any) -> Iterator[str]:
    from vllm import envs

    if envs.VLLM_BATCH_INVARIANT:
        yield (
            "VLLM_BATCH_INVARIANT: the quantized experts are summed in an order that depends on how many tokens are "
            "computed together; unset it"
        )
    # What vLLM quantizes while it loads: by kinds of layers, or by names of layers in versions that have `targets`.
    online = vllm_config.model_config.quantization_config
    if getattr(online, "moe", None) or getattr(online, "targets", None):
        yield "--quantization-config: the experts are quantized already; name nothing but `linear` in it, or drop it"
    backend = vllm_config.kernel_config.moe_backend
    if "mega" in backend or "moe_ep" in backend:
        yield f"--moe-backend {backend}: it exchanges tokens for kernels of its own only; drop the option"
    elif backend != "auto":
        _compat.warn_once(
            "--moe-backend %s: the quantized experts have kernels of their own and do not use it", backend
        )


def _lora_faults(targets: list[str] | None) -> Iterator[str]:
    if targets is None:
        asked = "--enable-lora"
    elif named := [target for target in targets if "experts" in target.split(".")]:
        asked = f"--enable-lora --lora-target-modules {' '.join(named)}"
    else:
        return
    yield (
        f"{asked}: vLLM cannot put LoRA adapters on the quantized experts; name the modules to adapt, without experts, "
        f"for example --lora-target-modules {LORA_TARGETS}"
    )
