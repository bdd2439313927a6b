"""Random valid layers and checkpoints for tests, with the codes they were made from.

`build_layer` makes one layer from a `Plan` for each projection, `form_plans` names the forms of interest, `layers` is
a hypothesis strategy over all combinations, and `write_tiny_qwen3_moe` writes a whole checkpoint that can be served.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitsmoe_kernels.expert_mlp import HiddenAct
from bitsmoe_kernels.format.checkpoint import with_schema
from bitsmoe_kernels.format.linear_layers import DenseBits, DenseConfig, DenseGroup, DenseWeights, dense_linears, pack
from bitsmoe_kernels.format.packing import pack_codes
from bitsmoe_kernels.format.safetensors_io import ShardWriter
from bitsmoe_kernels.format.schema import (
    QUANT_METHOD,
    Axis,
    Basis,
    CheckpointConfig,
    Layer,
    Projection,
    ProjectionName,
    least_version,
    num_blocks,
    order_dtype,
)

REPO = Path(__file__).resolve().parents[2]
TINY_MOE = REPO / "examples" / "tiny_moe"
ALL_BITS = tuple(range(9))


@dataclass(frozen=True)
class Plan:
    """How to make one projection.

    Block bits are drawn from `bits`; `ranks` are those of the compensators, kept experts excepted, which have none.
    """

    component_axis: Axis = "input"
    basis: Basis | None = None
    order: Literal["none", "shared", "expert"] = "none"
    bits: tuple[int, ...] = ALL_BITS
    kept_experts: tuple[int, ...] = ()
    kept_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    ranks: tuple[int, ...] = ()
    bias: bool = False


@dataclass(frozen=True)
class MadeLayer:
    """A layer and what it was made from."""

    layer: Layer
    block_size: int
    tensors: dict[str, Tensor]
    codes: dict[ProjectionName, Tensor] = field(repr=False)
    """uint8 [E, C, F] before packing, rows in stored order; zeros where the block has 0 bits."""


def build_layer(
    plans: Mapping[ProjectionName, Plan],
    *,
    num_experts: int = 4,
    hidden_size: int = 40,
    intermediate_size: int = 56,
    block_size: int = 16,
    seed: int = 0,
) -> MadeLayer:
    """A random layer whose weights have a standard deviation of roughly 1 / sqrt(input size).

    Its activation is silu, or relu2 where there is no gate.
    """
    gen = torch.Generator().manual_seed(seed)
    # Shapes come from a schema whose totals are still zero.
    draft = Layer(
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        hidden_act="relu2" if plans.keys() == {"up", "down"} else "silu",
        projections={
            name: Projection(
                component_axis=plan.component_axis, basis=plan.basis, order=plan.order, code_rows=0, bias=plan.bias
            )
            for name, plan in plans.items()
        },
    )
    projections: dict[ProjectionName, Projection] = {}
    tensors: dict[str, Tensor] = {}
    codes: dict[ProjectionName, Tensor] = {}
    for name, plan in plans.items():
        plan = replace(plan, ranks=tuple(0 if e in plan.kept_experts else r for e, r in enumerate(plan.ranks)))
        parts, codes[name] = _build_projection(draft, name, plan, block_size, gen)
        tensors |= {f"{name}_{part}": tensor for part, tensor in parts.items()}
        projections[name] = draft.projections[name].model_copy(
            update={
                "code_rows": int(parts["bits"].sum()),
                "kept_experts": plan.kept_experts,
                "kept_dtype": plan.kept_dtype,
                "lowrank_total": sum(plan.ranks),
            }
        )
    layer = draft.model_copy(update={"projections": projections})
    return MadeLayer(Layer.model_validate(layer.model_dump()), block_size, tensors, codes)


def _build_projection(
    layer: Layer, name: ProjectionName, plan: Plan, block_size: int, gen: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    E, C, F = layer.num_experts, layer.components(name), layer.features(name)
    into, out = layer.side(name, "input"), layer.side(name, "output")

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=gen) + 0.5

    bits = torch.tensor(plan.bits, dtype=torch.uint8)[
        torch.randint(len(plan.bits), (E, num_blocks(C, block_size)), generator=gen)
    ]
    bits[list(plan.kept_experts)] = 0
    width = bits.repeat_interleave(block_size, 1)[:, :C].float()
    top = torch.exp2(width)[:, :, None]
    codes = (torch.rand(E, C, F, generator=gen) * top).to(torch.uint8)
    # Both ends of the grid occur in every matrix, whatever the draw.
    codes[:, :, 0] = (top[:, :, 0] - 1).to(torch.uint8)
    codes[:, :, F - 1] = 0
    codes[:, 0, F // 2] = (top[:, 0, 0] - 1).to(torch.uint8)

    # Components of zero-bit blocks get a scale too: it must have no effect.
    component_scale = uniform(E, C) / top[:, :, 0]
    parts = {
        "codes": torch.cat([pack_codes(codes[e], bits[e], block_size) for e in range(E)]),
        "bits": bits,
        "component_scale": component_scale.half(),
        "feature_scale": (uniform(E, F) * 3 / into**0.5).half(),
    }
    if plan.order != "none":
        shape = (C,) if plan.order == "shared" else (E, C)
        parts["order"] = torch.rand(*shape, generator=gen).argsort(-1).to(order_dtype(C))
    if plan.basis:
        side = layer.side(name, plan.component_axis)
        if plan.basis.bits == 16:
            parts["basis"] = (torch.randn(C, side, generator=gen) / C**0.5).half()
        else:
            parts["basis"] = torch.randint(-128, 128, (C, side), generator=gen, dtype=torch.int8)
            parts["basis_scale"] = uniform(C) / 73 / C**0.5
    if plan.kept_experts:
        kept = torch.randn(len(plan.kept_experts), out, into, generator=gen) / into**0.5
        parts["kept"] = kept.to(getattr(torch, plan.kept_dtype))
    if total := sum(plan.ranks):
        parts["lowrank_rank"] = torch.tensor(plan.ranks, dtype=torch.int32)
        parts["lowrank_in"] = (torch.randn(total, into, generator=gen) / into**0.5).half()
        parts["lowrank_out"] = (torch.randn(total, out, generator=gen) * 0.3).half()
    if plan.bias:
        parts["shift"] = torch.randn(E, out, generator=gen).half()
    return parts, codes


FORMS = ("natural", "ordered", "shared_basis", "expert_order_basis", "paper", "left", "apart", "extras", "zero")


def form_plans(form: str, num_experts: int, hidden_size: int, intermediate_size: int) -> dict[ProjectionName, Plan]:
    """Plans of a named form.

    natural              channels as they are, gate and up together
    ordered              gate_up sorted by one order for the layer
    shared_basis         gate_up in an 8-bit basis, its rows in one order
    expert_order_basis   gate_up in a 16-bit basis of less than full rank, each expert with its own order
    paper                gate and up each with a right basis, down with a left basis
    left                 bases on the intermediate side: left for gate and up, right for down
    apart                gate, up and down with natural components on the output side
    extras               natural, with kept experts and compensators (one of rank 0) on both projections
    zero                 no codes at all: every block has 0 bits
    """
    H, I = hidden_size, intermediate_size  # noqa: E741 - the paper's symbol
    low = max(1, H * 3 // 4)
    match form:
        case "natural":
            return {"gate_up": Plan(), "down": Plan()}
        case "ordered":
            return {"gate_up": Plan(order="shared"), "down": Plan()}
        case "shared_basis":
            return {"gate_up": Plan(basis=Basis(rank=H, bits=8), order="shared"), "down": Plan()}
        case "expert_order_basis":
            return {"gate_up": Plan(basis=Basis(rank=low, bits=16), order="expert"), "down": Plan()}
        case "paper":
            right = Plan(basis=Basis(rank=H, bits=16))
            return {"gate": right, "up": right, "down": Plan(basis=Basis(rank=H, bits=16), component_axis="output")}
        case "left":
            left = Plan(basis=Basis(rank=max(1, I // 2), bits=16), component_axis="output")
            right = Plan(basis=Basis(rank=I, bits=8), order="expert")
            return {"gate": left, "up": replace(left, order="expert"), "down": right}
        case "apart":
            out = Plan(component_axis="output")
            return {"gate": out, "up": out, "down": replace(out, order="expert")}
        case "extras":
            last = num_experts - 1
            ranks = tuple(e % 3 for e in range(num_experts))
            return {
                "gate_up": Plan(kept_experts=(last,), ranks=ranks),
                "down": Plan(kept_experts=tuple(sorted({0, last})), kept_dtype="float16", ranks=ranks[::-1]),
            }
        case "zero":
            return {"gate_up": Plan(bits=(0,)), "down": Plan(bits=(0,))}
    raise ValueError(f"no form {form!r}; there are {FORMS}")


def without_gate(plans: Mapping[ProjectionName, Plan]) -> dict[ProjectionName, Plan]:
    """The same of experts that have none: what gate and up had is up's."""
    return {"up": plans["gate_up" if "gate_up" in plans else "up"], "down": plans["down"]}


def build_form(
    form: str,
    *,
    num_experts: int = 4,
    hidden_size: int = 40,
    intermediate_size: int = 56,
    block_size: int = 16,
    seed: int = 0,
    bias: bool = False,
    gated: bool = True,
) -> MadeLayer:
    """A random layer of a named form (`form_plans`), with biases or without, with a gate or without."""
    plans = form_plans(form, num_experts, hidden_size, intermediate_size)
    plans = plans if gated else without_gate(plans)
    return build_layer(
        {name: replace(plan, bias=bias) for name, plan in plans.items()},
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        block_size=block_size,
        seed=seed,
    )


def with_act(made: MadeLayer, hidden_act: HiddenAct) -> MadeLayer:
    """The same with another activation."""
    return replace(made, layer=made.layer.model_copy(update={"hidden_act": hidden_act}))


@st.composite
def layers(draw: st.DrawFn, max_experts: int = 4, max_side: int = 70) -> MadeLayer:
    """Hypothesis strategy: any valid layer."""
    block_size = draw(st.sampled_from([16, 32]))
    E = draw(st.integers(1, max_experts))
    H, I = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))  # noqa: E741
    names: tuple[ProjectionName, ...] = draw(
        st.sampled_from([("gate_up", "down"), ("gate", "up", "down"), ("up", "down")])
    )
    plans = {}
    for name in names:
        axis: Axis = "input" if name == "gate_up" else draw(st.sampled_from(["input", "output"]))
        side = I if (axis == "input") == (name == "down") else H
        basis = draw(st.none() | st.builds(Basis, rank=st.integers(1, side), bits=st.sampled_from([8, 16])))
        sortable = basis is not None or side_is_hidden(name, axis)
        plans[name] = Plan(
            component_axis=axis,
            basis=basis,
            order=draw(st.sampled_from(["none", "shared", "expert"])) if sortable else "none",
            bits=tuple(draw(st.lists(st.integers(0, 8), min_size=1, max_size=4, unique=True))),
            kept_experts=tuple(sorted(draw(st.sets(st.integers(0, E - 1), max_size=2)))),
            kept_dtype=draw(st.sampled_from(["bfloat16", "float16"])),
            ranks=tuple(draw(st.lists(st.integers(0, 3), min_size=E, max_size=E))) if draw(st.booleans()) else (),
            bias=draw(st.booleans()),
        )
    return build_layer(
        plans,
        num_experts=E,
        hidden_size=H,
        intermediate_size=I,
        block_size=block_size,
        seed=draw(st.integers(0, 2**16)),
    )


def side_is_hidden(name: ProjectionName, axis: Axis) -> bool:
    """Whether a projection's side is the hidden size, and not the intermediate size."""
    return (axis == "output") == (name == "down")


def make_config(layers: Mapping[str, MadeLayer], **updates: Any) -> CheckpointConfig:
    """The schema of a checkpoint that holds these layers, `bpw` filled in."""
    config = CheckpointConfig.model_validate(
        {
            "quant_method": QUANT_METHOD,
            "format_version": least_version(made.layer for made in layers.values()),
            "block_size": next(iter(layers.values())).block_size,
            "bpw": 0.0,
            "layers": {prefix: made.layer for prefix, made in layers.items()},
            "tool_version": "0.0.0",
        }
    )
    return config.model_copy(update={"bpw": config.all_in_bpw()} | updates)


def write_checkpoint(
    directory: Path,
    layers: Mapping[str, MadeLayer],
    *,
    other_tensors: Mapping[str, Tensor] | None = None,
    model_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 1000**3,
) -> CheckpointConfig:
    """Write config.json and safetensors into an existing directory."""
    config = make_config(layers)
    writer = ShardWriter(directory, max_shard_bytes)
    for name, tensor in (other_tensors or {}).items():
        writer.add(name, tensor)
    for prefix, made in layers.items():
        for name, tensor in made.tensors.items():
            writer.add(f"{prefix}.{name}", tensor)
    writer.finish()
    write_config(directory, dict(model_config or {}), config.dump())
    return config


def write_config(directory: Path, model_config: Mapping[str, Any], quantization_config: Mapping[str, Any]) -> None:
    """Write config.json; call it again to plant a fault in it."""
    data = with_schema(model_config, quantization_config)
    (directory / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def write_tiny_qwen3_moe(
    directory: Path,
    *,
    form: str = "natural",
    num_layers: int = 2,
    num_experts: int = 4,
    top_k: int = 2,
    hidden_size: int = 64,
    intermediate_size: int = 40,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5 * 1000**3,
    seed: int = 0,
) -> dict[str, MadeLayer]:
    """Write a whole random Qwen3-MoE checkpoint: config.json, weights and the tokenizer of `examples/tiny_moe`.

    Args:
        directory: made if need be.
        form: see `form_plans`; the same for every layer.
        dtype: of all tensors outside the experts.

    Returns:
        The layers by their tensor prefix.
    """
    directory.mkdir(parents=True, exist_ok=True)
    gen = torch.Generator().manual_seed(seed)
    model_config = json.loads((TINY_MOE / "config.json").read_text())
    heads, kv_heads, head_dim, vocab = 2, 1, 32, model_config["vocab_size"]
    model_config |= {
        "hidden_size": hidden_size,
        "moe_intermediate_size": intermediate_size,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_window_layers": num_layers,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(*shape, generator=gen) * std).to(dtype)

    std = hidden_size**-0.5
    # A wide embedding, tied to the output, keeps the two best logits of a random model apart.
    tensors = {"model.embed_tokens.weight": normal(vocab, hidden_size, std=2 * std)}
    experts: dict[str, MadeLayer] = {}
    for i in range(num_layers):
        prefix = f"model.layers.{i}"
        attn = f"{prefix}.self_attn"
        tensors |= {
            f"{prefix}.input_layernorm.weight": 1 + normal(hidden_size, std=0.1),
            f"{prefix}.post_attention_layernorm.weight": 1 + normal(hidden_size, std=0.1),
            f"{attn}.q_proj.weight": normal(heads * head_dim, hidden_size, std=std),
            f"{attn}.k_proj.weight": normal(kv_heads * head_dim, hidden_size, std=std),
            f"{attn}.v_proj.weight": normal(kv_heads * head_dim, hidden_size, std=std),
            f"{attn}.o_proj.weight": normal(hidden_size, heads * head_dim, std=std),
            f"{attn}.q_norm.weight": 1 + normal(head_dim, std=0.1),
            f"{attn}.k_norm.weight": 1 + normal(head_dim, std=0.1),
            f"{prefix}.mlp.gate.weight": normal(num_experts, hidden_size, std=std),
        }
        experts[f"{prefix}.mlp.experts"] = build_form(
            form,
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            block_size=block_size,
            seed=seed * 1000 + i,
        )
    tensors["model.norm.weight"] = 1 + normal(hidden_size, std=0.1)
    write_checkpoint(
        directory, experts, other_tensors=tensors, model_config=model_config, max_shard_bytes=max_shard_bytes
    )
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copyfile(TINY_MOE / file, directory / file)
    return experts


def store_dense(directory: Path, bits: DenseBits) -> dict[str, Tensor]:
    """Quantize the linear layers outside the experts of a checkpoint of one file; returns the matrices they stand for.

    Scales are the largest magnitude over the largest code, without a search.
    """
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    groups: dict[str, DenseGroup] = {}
    meaning: dict[str, Tensor] = {}
    for name in [n for linear in dense_linears(config, tensors) for n in linear.names]:
        weight = tensors.pop(f"{name}.weight").float()
        N, K = weight.shape
        strategy: Literal["group", "channel"] = "channel" if K % 128 or K == 128 else "group"
        form = DenseWeights(num_bits=bits, strategy=strategy, group_size=128 if strategy == "group" else None)
        top = 2 ** (bits - 1) - 1
        scale = (weight.view(N, -1, form.group_size or K).abs().amax(-1) / top).bfloat16()
        columns = scale.float().repeat_interleave(form.group_size or K, 1)
        codes = (weight / columns).round().clamp(-top - 1, top)
        meaning[f"{name}.weight"] = codes * columns
        tensors |= {
            f"{name}.weight_packed": pack(codes.to(torch.int8), bits),
            f"{name}.weight_scale": scale,
            f"{name}.weight_shape": torch.tensor([N, K]),
        }
        before = groups[strategy].targets if strategy in groups else ()
        groups[strategy] = DenseGroup(targets=(*before, name), weights=form)
    dense = DenseConfig(quant_method="compressed-tensors", format="pack-quantized", config_groups=groups)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_config(directory, config, config["quantization_config"] | {"linear_quantization": dense.dump()})
    return meaning


def write_first_layers(directory: Path, count: int, experts: int = 16) -> Path:
    """The demo model with its first decoder layers and the first experts of each; returns its directory."""
    shutil.copytree(TINY_MOE, directory, ignore=shutil.ignore_patterns("*.py", "*.md"))
    config = json.loads((directory / "config.json").read_text())
    smaller = {"num_hidden_layers": count, "num_experts": experts}
    (directory / "config.json").write_text(json.dumps(config | smaller))
    tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        layer, expert = (re.search(rf"\.{kind}\.(\d+)\.", name) for kind in ("layers", "experts"))
        if (layer and int(layer[1]) >= count) or (expert and int(expert[1]) >= experts):
            continue
        tensors[name] = tensor[:experts].clone() if name.endswith(".mlp.gate.weight") else tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def vllm_config(dtype: torch.dtype = torch.bfloat16, **parallel: Any) -> SimpleNamespace:
    """As much of a VllmConfig as the plugin reads, for one eager rank and no further option."""
    sizes = {f"{kind}_parallel_size": 1 for kind in ("tensor", "data", "pipeline")}
    switches = dict.fromkeys(("enable_eplb", "enable_elastic_ep", "enable_expert_parallel"), False)
    backends = {"all2all_backend": "allgather_reducescatter", "distributed_executor_backend": "mp"}
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model="model",
            model_weights="",
            quantization_config=None,
            enforce_eager=True,
            dtype=dtype,
            runner_type="generate",
        ),
        parallel_config=SimpleNamespace(**sizes | switches | backends | parallel),
        load_config=SimpleNamespace(load_format="auto", safetensors_load_strategy=None),
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=0), prefetch=SimpleNamespace(offload_group_size=0)
        ),
        kernel_config=SimpleNamespace(moe_backend="auto"),
        lora_config=None,
        speculative_config=None,
    )
