"""Checks in vLLM's main process, before a worker starts: the checkpoint, and options that cannot work with it."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bitsmoe_kernels.backends.base import Target
from bitsmoe_kernels.backends.select import select
from bitsmoe_kernels.errors import BitsmoeError, FormatError, fault_list
from bitsmoe_kernels.expert_mlp import OWN_NAMES
from bitsmoe_kernels.format.checkpoint import Checkpoint
from bitsmoe_kernels.format.linear_layers import DenseConfig, DenseWeights, Linear, dense_linears, plain_specs
from bitsmoe_kernels.format.safetensors_io import SINGLE_FILE, read_index
from bitsmoe_kernels.format.schema import CheckpointConfig, TensorSpec
from bitsmoe_kernels.models.families import (
    EXPERT_COUNT_KEYS,
    LATENT_SIZE_KEYS,
    moe_shape,
    named_architectures,
    why_not_served,
)
from bitsmoe_kernels.sharding import parallel_sizes
from bitsmoe_vllm import _compat
from bitsmoe_vllm.options import option_faults


def local_directory(model: str, revision: str | None, weights: str = "") -> Path | None:
    """Where a checkpoint is on this machine: a directory, or a hub name already in the cache; None if nowhere.

    Args:
        model: a directory or a hub name.
        revision: of the hub name.
        weights: where the weights are, if not there: vLLM copies only the small files of a model in object storage.
    """
    if weights:
        return Path(weights) if os.path.isfile(os.path.join(weights, "config.json")) else None
    if os.path.isdir(model):
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    # By now vLLM may have fetched config.json alone; the weights, or the rest of them, follow later.
    index = read_index(directory)
    files = [SINGLE_FILE] if index is None else index.values()
    return directory if all((directory / file).exists() for file in files) else None


def check_checkpoint(directory: Path, hf_config: Any = None, vllm_config: Any = None) -> Checkpoint:
    """Check files, headers of all tensors, and the block bits.

    Args:
        directory: the checkpoint.
        hf_config: its transformers config; given, tensors outside the experts are checked as well.
        vllm_config: vLLM's VllmConfig; given, quantized ones among those are checked against the kernels it has, and
            a draft model that is to come from the same checkpoint is looked for.

    Returns:
        The checkpoint.

    Raises:
        BitsmoeError: lists every fault.
    """
    checkpoint = Checkpoint(directory)
    faults = checkpoint.bit_faults()
    dense, specs = checkpoint.dense(), checkpoint.tensors.specs
    if dense is not None:
        specs, found = plain_specs(dense, checkpoint.model_config, specs)
        faults += found
    if hf_config is not None:
        faults += _other_faults(checkpoint, specs, hf_config)
    if faults:
        raise FormatError(str(directory), faults)
    if vllm_config is not None:
        _check_draft(checkpoint, vllm_config)
        if dense is not None:
            check_linear_kernels(dense, checkpoint.model_config, specs, vllm_config)
    return checkpoint


def _check_draft(checkpoint: Checkpoint, vllm_config: Any) -> None:
    """Refuse to draft with a layer that is not there: vLLM would draft with uninitialized memory."""
    speculative, model = vllm_config.speculative_config, vllm_config.model_config
    if speculative is None or speculative.method != "mtp" or speculative.draft_model_config.model != model.model:
        return
    layers = checkpoint.model_config.get("num_hidden_layers", 0)
    if not any(is_draft_layer(name, layers) for name in checkpoint.tensors.specs):
        raise BitsmoeError(
            f"--speculative-config with method mtp: {checkpoint.directory} holds no layer for multi-token prediction "
            f"(no tensor mtp.* or model.layers.{layers}.*); drop the option, or quantize a model that has one"
        )


def is_draft_layer(name: str, num_layers: int) -> bool:
    """Whether a tensor or module belongs to a layer for multi-token prediction, which is not quantized.

    Args:
        name: of the tensor or module.
        num_layers: the model's num_hidden_layers.
    """
    index = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return name.startswith("mtp.") or (index is not None and int(index[1]) >= num_layers)


def plain_experts(checkpoint: Checkpoint) -> frozenset[str]:
    """Prefixes of the routed experts that a checkpoint holds, but not quantized: `model.layers.61.mlp.experts`."""
    found = (name.partition(".experts.") for name in checkpoint.tensors.specs)
    return frozenset(f"{start}.experts" for start, inside, _ in found if inside) - checkpoint.config.layers.keys()


def _other_faults(checkpoint: Checkpoint, specs: Mapping[str, TensorSpec], hf_config: Any) -> list[str]:
    """Faults of the tensors outside the routed experts, by the names and shapes transformers' own model has.

    vLLM does not notice when one is missing from a quantized checkpoint, and would serve uninitialized memory.
    """
    if why := why_not_served(checkpoint.model_config):
        named = named_architectures(checkpoint.model_config)
        raise BitsmoeError(
            f"{checkpoint.directory}: vLLM is not known to serve {named}: {why}; "
            "`bitsmoe dequantize` makes an ordinary checkpoint of it"
        )
    shape = moe_shape(checkpoint.model_config, str(checkpoint.directory))
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    # --trust-remote-code and --hf-overrides change how vLLM reads the file, not what is in it.
    # vLLM has classes of its own for some, which it puts in the place of transformers' in `CONFIG_MAPPING`.
    own = getattr(transformers, CONFIG_MAPPING_NAMES[shape.family.model_type])
    if type(hf_config) is not own or hf_config.architectures != checkpoint.model_config["architectures"]:
        hf_config = own.from_dict(checkpoint.model_config)
    with torch.device("meta"):
        auto = getattr(transformers, shape.family.auto_class)
        model = auto.from_config(shape.family.built_part(hf_config))
    return shape.other_faults(model, specs)


def check_linear_kernels(
    dense: DenseConfig, model_config: Mapping[str, Any], specs: Mapping[str, TensorSpec], vllm_config: Any
) -> None:
    """Refuse quantized linear layers that vLLM has no kernel for: on this platform, or in these parts.

    Args:
        dense: how they are stored.
        model_config: config.json.
        specs: with the shape of each as `{module}.weight`.
        vllm_config: vLLM's VllmConfig, perhaps still under construction.

    Raises:
        BitsmoeError: lists the layers and vLLM's reasons, each once.
    """
    parallel, dtype = vllm_config.parallel_config, vllm_config.model_config.dtype
    reasons: dict[str, list[str]] = {}
    matrices = dense.matrices
    for linear in dense_linears(model_config, specs):
        weights = matrices.get(linear.names[0])
        if weights is None:
            continue
        whole, part = _linear_shapes(linear, model_config, specs, parallel)
        if weights.group_size and part[0] % weights.group_size:
            size = parallel.tensor_parallel_size
            reason = f"--tensor-parallel-size {size}: {part[0]} columns for a rank, in groups of {weights.group_size}"
        else:
            reason = _why_no_linear_kernel(weights, whole, part, dtype) or ""
        if reason:
            reasons.setdefault(reason, []).append(" + ".join(linear.names))
    if reasons:
        faults = [f"{_few(names)}: {reason}" for reason, names in reasons.items()]
        raise BitsmoeError(fault_list(f"vLLM has no kernel for these quantized linear layers; {_REMEDY}", faults))


def _why_no_linear_kernel(
    weights: DenseWeights, whole: tuple[int, int], part: tuple[int, int], dtype: torch.dtype
) -> str | None:
    """See `_compat.why_no_linear_kernel`; our own kernel counts."""
    from bitsmoe_vllm import linear_kernel  # noqa: F401 - adds it

    return _compat.why_no_linear_kernel(weights, whole, part, dtype)


_REMEDY = "serve with fewer tensor-parallel ranks, or quantize with --dense-bits 16"


def _few(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _dense_option_faults(dense: DenseConfig, dtype: torch.dtype) -> Iterator[str]:
    """What no shape of a quantized linear layer can mend."""
    forms = {form.num_bits: form for form in dense.matrices.values()}
    for bits, form in forms.items():
        stored = f"linear layers outside the routed experts are stored at {bits} bits (--dense-bits {bits})"
        if dtype not in (torch.bfloat16, torch.float16):
            yield (
                f"{stored}, for which vLLM has kernels in bfloat16 and float16 only: serve with --dtype bfloat16, not "
                f"{str(dtype).removeprefix('torch.')}"
            )
        elif reason := _why_no_linear_kernel(form, _FITS_ALL, _FITS_ALL, dtype):
            yield (
                f"{stored}, for which vLLM has no kernel on this platform: serve on a GPU, or quantize with "
                f"--dense-bits 16{' or 4' * (bits != 4)} ({reason})"
            )


_FITS_ALL = (1024, 1024)
"""A layer that any kernel takes."""


_VOCABULARY_UNIT = 64
"""vLLM pads the vocabulary to a multiple of this."""


def _linear_shapes(
    linear: Linear, model_config: Mapping[str, Any], specs: Mapping[str, TensorSpec], parallel: Any
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(inputs, outputs) of a linear layer, and of one tensor-parallel rank's part of it."""
    # With expert parallelism some models give every rank the whole shared experts.
    divided = linear.split and not (parallel.enable_expert_parallel and ".shared_expert" in linear.names[0])
    ranks = parallel.tensor_parallel_size if divided else 1
    heads = model_config.get("num_key_value_heads") or ranks
    inputs = specs[f"{linear.names[0]}.weight"].shape[1]
    whole = part = 0
    for name in linear.names:
        rows = specs[f"{name}.weight"].shape[0]
        if name == "lm_head":
            rows = -(-rows // _VOCABULARY_UNIT) * _VOCABULARY_UNIT
        whole += rows
        if linear.split == "output":
            # Key and value heads are repeated where there are fewer than ranks.
            rows //= min(ranks, heads) if name.endswith((".k_proj", ".v_proj")) else ranks
        part += rows
    return (inputs, whole), (inputs // ranks if linear.split == "input" else inputs, part)


def check_model(checkpoint: CheckpointConfig, text_config: Any) -> None:
    """Check that config.json and its `quantization_config` speak of the same model.

    Args:
        checkpoint: the parsed `quantization_config`.
        text_config: transformers config of the language model.

    Raises:
        BitsmoeError: names what differs.
    """
    faults = []
    for prefix, layer in checkpoint.layers.items():
        for ours, keys in _SIZES.items():
            theirs = next((v for k in keys if isinstance(v := getattr(text_config, k, None), int)), None)
            if theirs is not None and theirs != getattr(layer, ours):
                faults.append(f"{prefix}: {ours} is {getattr(layer, ours)}, but config.json says {theirs}")
    if faults:
        raise FormatError("config.json", faults)


_SIZES = {
    "num_experts": EXPERT_COUNT_KEYS,
    "hidden_size": (*LATENT_SIZE_KEYS, "hidden_size"),
    "intermediate_size": ("moe_intermediate_size", "intermediate_size"),
}
"""Our names of a layer's sizes and those of config.json, by architecture."""


def compute_target(dtype: torch.dtype) -> Target:
    """What this process computes layers on.

    Args:
        dtype: of activations.
    """
    from vllm.platforms import current_platform as platform

    capability = platform.get_device_capability().to_int() if platform.is_cuda() else None
    return Target(platform.device_type, capability, dtype)


def check_options(checkpoint: CheckpointConfig, text_config: Any, vllm_config: Any) -> None:
    """Refuse options of `vllm serve` that cannot work.

    Args:
        checkpoint: the parsed `quantization_config`.
        text_config: transformers config of the language model, or None.
        vllm_config: vLLM's VllmConfig, perhaps still under construction.

    Raises:
        BitsmoeError: names option, value and remedy; all at once.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        _compat.warn_once(
            "VLLM_CPU_KVCACHE_SPACE is not set: vLLM will take most of this machine's memory for its KV cache. "
            "Set it to a number of GiB, for example VLLM_CPU_KVCACHE_SPACE=4"
        )
    parallel = vllm_config.parallel_config
    faults = list(option_faults(vllm_config))
    if (linear := checkpoint.linear_quantization) is not None:
        faults += _dense_option_faults(DenseConfig.parse(linear, "config.json"), vllm_config.model_config.dtype)
    faults += _parallel_faults(checkpoint, {} if text_config is None else text_config.to_dict(), parallel)
    if fault := _compat.cpu_parallel_fault(parallel, vllm_config.model_config.enforce_eager):
        faults.append(fault)
    faults += _graph_faults(checkpoint, vllm_config.model_config)
    faults += [
        f"{key} of config.json is {found!r}, but the experts were quantized for {layer.hidden_act!r}"
        for key in ("hidden_act", "hidden_activation", "mlp_hidden_act")
        for layer in checkpoint.layers.values()
        if (found := getattr(text_config, key, None)) is not None
        and found != layer.hidden_act
        and layer.hidden_act not in OWN_NAMES  # config.json says something else; the layer itself is compared
    ]
    if faults:
        raise BitsmoeError("\n".join(dict.fromkeys(faults)))


def _graph_faults(checkpoint: CheckpointConfig, model: Any) -> list[str]:
    """Why CUDA graphs cannot capture the experts, of the first layer only: the other layers are usually alike."""
    target = compute_target(model.dtype)
    if target.capability is None or model.enforce_eager:
        return []
    for prefix, layer in checkpoint.layers.items():
        choice = select(layer, target)
        if not choice.backend.cuda_graphs:
            return [
                f"{prefix}: {'; '.join(choice.refusals)}; CUDA graphs cannot capture {choice.backend.name}: "
                f"add --enforce-eager{' (very slow, for trying out only)' * choice.backend.slow}"
            ]
    return []


def _parallel_faults(checkpoint: CheckpointConfig, model_config: dict[str, Any], parallel: Any) -> list[str]:
    """Sizes of tensor, expert and pipeline parallelism that the model does not divide into, and those that it does."""
    tp, dp, pp = parallel.tensor_parallel_size, parallel.data_parallel_size, parallel.pipeline_parallel_size
    layer = min(checkpoint.layers.values(), key=lambda layer: layer.num_experts)  # their other sizes are alike
    sizes = parallel_sizes(
        layer.num_experts, layer.intermediate_size, len(checkpoint.layers), checkpoint.block_size, model_config, dp
    )
    works = sizes.tensor_with_experts if parallel.enable_expert_parallel else sizes.tensor
    faults = []
    if parallel.enable_expert_parallel and tp * dp > sizes.expert_ranks:
        faults.append(
            f"--enable-expert-parallel: {tp * dp} ranks of expert parallelism, but {sizes.expert_ranks} experts; "
            "use at most that"
        )
    elif tp not in works:
        faults.append(
            f"--tensor-parallel-size {tp}{f' with --data-parallel-size {dp}' if dp > 1 else ''}: the model has "
            f"{layer.num_experts} experts with intermediate_size {layer.intermediate_size} in blocks of "
            f"{checkpoint.block_size} channels, and vLLM splits heads, shared experts, dense layers and vocabulary; "
            f"tensor parallel sizes that work: {', '.join(map(str, works)) or 'none'}"
            + (" (or add --enable-expert-parallel)" if tp in sizes.tensor_with_experts else "")
        )
    if pp > sizes.stages:
        faults.append(
            f"--pipeline-parallel-size {pp}: the model has {sizes.stages} layers, and every stage needs one; "
            f"use at most {sizes.stages}"
        )
    return faults
