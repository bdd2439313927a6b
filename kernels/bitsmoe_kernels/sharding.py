"""Slice a layer for one rank of tensor or expert parallelism. A shard is a valid layer again, only smaller.

Tensor parallelism gives a rank whole blocks of intermediate channels, the same ones for every expert: output columns
of gate and up, input rows of down. Blocks are dealt in turn (block j to rank j mod tp_size): channels are stored in
ascending importance, so neighbours cost nearly the same bytes and every rank gets its share of dear and cheap ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.schema import Layer, Projection, ProjectionName, num_blocks

_VOCAB_PADDING = 64
"""vLLM pads the vocabulary to a multiple of this, then splits it evenly."""


@dataclass(frozen=True)
class ParallelSizes:
    """Which sizes of vLLM's parallelism a model divides into.

    Attributes:
        tensor: tensor-parallel sizes, experts split by channels.
        tensor_with_experts: tensor-parallel sizes with --enable-expert-parallel: experts dealt out whole.
        expert_ranks: most ranks of expert parallelism, tensor times data parallel.
        stages: most pipeline stages; any number up to it works.
    """

    tensor: tuple[int, ...]
    tensor_with_experts: tuple[int, ...]
    expert_ranks: int
    stages: int

    def __str__(self) -> str:
        tensor, experts = (", ".join(map(str, sizes)) or "none" for sizes in (self.tensor, self.tensor_with_experts))
        return (
            f"tensor-parallel sizes {tensor}; with expert parallelism {experts}, times data parallelism at most "
            f"{self.expert_ranks} ranks; up to {self.stages} pipeline stages"
        )


def parallel_sizes(
    num_experts: int,
    intermediate_size: int,
    moe_layers: int,
    block_size: int,
    model_config: Mapping[str, Any],
    data_parallel: int = 1,
) -> ParallelSizes:
    """Parallel sizes that work for a model.

    Ours: a block of channels for every rank, tensor times data parallel. vLLM's: that product divides the experts'
    intermediate_size; the tensor-parallel size divides heads, shared experts, dense layers and the padded vocabulary,
    and is at most the number of experts; key-value heads are divided or repeated.

    Args:
        num_experts: E.
        intermediate_size: I of a routed expert.
        moe_layers: decoder layers with routed experts.
        block_size: G.
        model_config: config.json, or as much of it as is known.
        data_parallel: data-parallel size.
    """
    stages = model_config.get("num_hidden_layers", moe_layers)
    split = _split_by_vllm(model_config, has_dense_layers=moe_layers < stages)
    key_value = model_config.get("num_key_value_heads")
    if not key_value or model_config.get("kv_lora_rank"):
        key_value = 1  # latent attention has none to split
    every = [
        n
        for n in range(1, num_experts + 1)
        if all(size % n == 0 for size in split) and (key_value % n == 0 or n % key_value == 0)
    ]
    tensor = [
        n
        for n in every
        if intermediate_size % (n * data_parallel) == 0
        and n * data_parallel <= num_blocks(intermediate_size, block_size)
    ]
    with_experts = [n for n in every if n * data_parallel <= num_experts]
    return ParallelSizes(tuple(tensor), tuple(with_experts), num_experts, stages)


def _split_by_vllm(model_config: Mapping[str, Any], has_dense_layers: bool) -> list[int]:
    """What a tensor-parallel size must divide outside the routed experts; sizes that are not known are left out."""
    heads = ("num_attention_heads", "linear_num_key_heads", "linear_num_value_heads", "mamba_num_heads")
    shared = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
    sizes = [model_config.get(key) for key in (*heads, *shared)]
    sizes.append((model_config.get("n_shared_experts") or 0) * (model_config.get("moe_intermediate_size") or 0))
    if has_dense_layers:
        sizes.append(model_config.get("intermediate_size"))
    if vocab := model_config.get("vocab_size"):
        sizes.append(-(-vocab // _VOCAB_PADDING) * _VOCAB_PADDING)
    return [size for size in sizes if size]


def check_tensor_parallel(layer: Layer, block_size: int, tp_size: int, subject: str) -> None:
    """Refuse a tensor-parallel size this layer cannot be split into.

    Raises:
        BitsmoeError: names the sizes that work.
    """
    blocks = num_blocks(layer.intermediate_size, block_size)
    if tp_size > blocks:
        raise BitsmoeError(
            f"{subject}: tensor parallel size {tp_size} does not fit intermediate_size {layer.intermediate_size}, "
            f"which holds {blocks} blocks of {block_size} channels: use a size from 1 to {blocks}"
        )


def shard_channels(intermediate_size: int, block_size: int, tp_rank: int, tp_size: int) -> Tensor:
    """Intermediate channels of one rank, int64, ascending."""
    channel = torch.arange(intermediate_size)
    return channel[channel // block_size % tp_size == tp_rank]


def shard_layer(
    layer: Layer,
    tensors: Mapping[str, Tensor],
    block_size: int,
    tp_rank: int = 0,
    tp_size: int = 1,
    experts: Sequence[int] | None = None,
) -> tuple[Layer, dict[str, Tensor]]:
    """One rank's part of a layer.

    Summing `reference.moe_forward` of all ranks gives that of the whole layer.

    Args:
        layer: schema of the whole layer.
        tensors: its tensors, `{projection}_{part}` -> tensor.
        block_size: G.
        tp_rank: rank within tensor parallelism.
        tp_size: number of ranks.
        experts: the experts this rank holds, in its local order; None: all.

    Returns:
        Schema and tensors of the shard.
    """
    check_tensor_parallel(layer, block_size, tp_size, "layer")
    picked = torch.tensor(range(layer.num_experts) if experts is None else list(experts), dtype=torch.int64)
    channels = shard_channels(layer.intermediate_size, block_size, tp_rank, tp_size)
    projections: dict[ProjectionName, Projection] = {}
    out: dict[str, Tensor] = {}
    for name in layer.projections:
        parts = {k.removeprefix(f"{name}_"): v for k, v in tensors.items() if k.startswith(f"{name}_")}
        projections[name], parts = _shard_projection(layer, name, parts, block_size, picked, channels)
        if layer.projections[name].bias and name == "down" and tp_rank:  # one rank adds it
            parts["shift"] = torch.zeros_like(parts["shift"])
        out |= {f"{name}_{k}": v.contiguous() for k, v in parts.items()}
    shard = Layer(
        num_experts=len(picked),
        hidden_size=layer.hidden_size,
        intermediate_size=len(channels),
        hidden_act=layer.hidden_act,
        projections=projections,
    )
    return shard, out


def _shard_projection(
    layer: Layer, name: ProjectionName, parts: dict[str, Tensor], block: int, experts: Tensor, channels: Tensor
) -> tuple[Projection, dict[str, Tensor]]:
    spec = layer.projections[name]
    bits = parts["bits"].long()
    whole = len(channels) == layer.intermediate_size
    into = name == "down"  # the side of the intermediate channels
    columns = torch.cat([channels, channels + layer.intermediate_size]) if name == "gate_up" else channels
    blocks = torch.arange(bits.shape[1])
    on_components = (spec.component_axis == "input") == into

    for key in ("bits", "component_scale", "feature_scale", *(["shift"] if spec.bias else [])):
        parts[key] = parts[key][experts]
    if spec.order == "expert":
        parts["order"] = parts["order"][experts]
    kept = {int(e): i for i, e in enumerate(experts) if int(e) in spec.kept_experts}
    if spec.kept_experts:
        parts["kept"] = parts["kept"][[spec.kept_experts.index(e) for e in kept]]
        if not kept:
            del parts["kept"]
    lowrank_total = 0
    if spec.lowrank_total:
        ends = parts["lowrank_rank"].long().cumsum(0)
        rows = _ranges(ends[experts] - parts["lowrank_rank"][experts], parts["lowrank_rank"][experts].long())
        lowrank_total = len(rows)
        parts["lowrank_rank"] = parts["lowrank_rank"][experts]
        parts["lowrank_in"], parts["lowrank_out"] = parts["lowrank_in"][rows], parts["lowrank_out"][rows]
        if not lowrank_total:
            for key in ("lowrank_rank", "lowrank_in", "lowrank_out"):
                del parts[key]

    if not whole:
        if "kept" in parts:
            parts["kept"] = parts["kept"][:, :, columns] if into else parts["kept"][:, columns]
        if lowrank_total:
            key = "lowrank_in" if into else "lowrank_out"
            parts[key] = parts[key][:, columns]
        if spec.bias and not into:
            parts["shift"] = parts["shift"][:, columns]
        if not on_components:
            parts["feature_scale"] = parts["feature_scale"][:, columns]
            parts["codes"] = parts["codes"][:, columns]
        elif spec.basis:
            parts["basis"] = parts["basis"][:, columns]
        else:
            blocks = channels[::block] // block
            parts["bits"] = parts["bits"][:, blocks]
            parts["component_scale"] = parts["component_scale"][:, columns]

    ends = bits.flatten().cumsum(0).view_as(bits)
    starts, widths = (ends - bits)[experts][:, blocks], bits[experts][:, blocks]
    parts["codes"] = parts["codes"][_ranges(starts.flatten(), widths.flatten())]
    update = {
        "code_rows": int(widths.sum()),
        "kept_experts": tuple(i for i, e in enumerate(experts.tolist()) if e in kept),
        "lowrank_total": lowrank_total,
    }
    return spec.model_copy(update=update), parts


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Indices of all ranges [start, start + length), one after another."""
    shift = (starts - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
    return torch.arange(len(shift), device=shift.device) + shift
