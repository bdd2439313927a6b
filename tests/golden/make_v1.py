"""Writes the golden files of format version 1: small checkpoints that use every part, and the weights they stand for.

    PYTHONPATH=tests:kernels python -m golden.make_v1

The files are frozen once a release has written the format: a difference is a change of format, not a reason to run this
again. `make_v2` adds those of version 2.

All values are drawn with `random.Random.random`, the one generator Python promises to keep. Scales are powers of two
and all else are small integers over a power of two, so that every sum stays below 2^24 steps of its grid (at most
128 * 127.5 * 2 * 2 * 2 * 20 terms) and float32 holds the weights exactly, in whatever order a machine adds.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from bitsmoe_kernels.format.packing import pack_codes
from bitsmoe_kernels.format.safetensors_io import ShardWriter
from bitsmoe_kernels.format.schema import (
    Basis,
    CheckpointConfig,
    Layer,
    Projection,
    ProjectionName,
    num_blocks,
    order_dtype,
)
from bruteforce import biases, expert_weights

HERE = Path(__file__).resolve().parent / "v1"


def layers(block_size: int) -> dict[str, Layer]:
    """Schemas with a gate; `code_rows` is filled in when the bits are drawn."""
    if block_size == 32:
        natural: dict[ProjectionName, Projection] = {
            "gate_up": Projection(code_rows=0, order="shared"),
            "down": Projection(code_rows=0),
        }
        return {"0": Layer(num_experts=4, hidden_size=33, intermediate_size=6, projections=natural)}

    def layer(**projections: Projection) -> Layer:
        return Layer.model_validate(
            {"num_experts": 3, "hidden_size": 18, "intermediate_size": 20, "projections": projections}
        )

    return {
        "0": layer(gate_up=Projection(code_rows=0, order="expert"), down=Projection(code_rows=0)),
        "1": layer(
            gate_up=Projection(code_rows=0, basis=Basis(rank=17, bits=8), order="shared", lowrank_total=3),
            down=Projection(code_rows=0, kept_experts=(1,), lowrank_total=2),
        ),
        "3": layer(
            gate=Projection(code_rows=0, basis=Basis(rank=18, bits=16), kept_experts=(0, 2), kept_dtype="float16"),
            up=Projection(code_rows=0, component_axis="output"),
            down=Projection(code_rows=0, component_axis="output", basis=Basis(rank=18, bits=8), order="expert"),
        ),
    }


def draw(random: Random, low: int, high: int, *shape: int) -> Tensor:
    """Integers from low to high, both included, as float64."""
    values = [low + int(random.random() * (high - low + 1)) for _ in range(math.prod(shape))]
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def permutation(random: Random, n: int) -> Tensor:
    return torch.tensor(sorted(range(n), key=[random.random() for _ in range(n)].__getitem__))


def power(random: Random, low: int, high: int, *shape: int) -> Tensor:
    """Powers of two of either sign."""
    return 2 ** draw(random, low, high, *shape) * (2 * draw(random, 0, 1, *shape) - 1)


def parts(
    layer: Layer, name: ProjectionName, block_size: int, widths: Iterator[int], random: Random
) -> dict[str, Tensor]:
    """Tensors of one projection; block bits come from `widths` in turn."""
    p = layer.projections[name]
    E, C, F = layer.num_experts, layer.components(name), layer.features(name)
    into, out = layer.side(name, "input"), layer.side(name, "output")
    bits = torch.tensor(
        [[0 if e in p.kept_experts else next(widths) for _ in range(num_blocks(C, block_size))] for e in range(E)],
        dtype=torch.uint8,
    )
    words = []
    for e in range(E):
        top = (2 ** bits[e].double().repeat_interleave(block_size)[:C])[:, None]
        codes = (draw(random, 0, 255, C, F) % top).to(torch.uint8)
        words.append(pack_codes(codes, bits[e], block_size))
    made = {
        "codes": torch.cat(words),
        "bits": bits,
        "component_scale": power(random, -6, -5, E, C).half(),
        "feature_scale": power(random, -2, -1, E, F).half(),
    }
    if p.order == "shared":
        made["order"] = permutation(random, C).to(order_dtype(C))
    elif p.order == "expert":
        made["order"] = torch.stack([permutation(random, C) for _ in range(E)]).to(order_dtype(C))
    if p.basis:
        side = layer.side(name, p.component_axis)
        if p.basis.bits == 16:
            made["basis"] = (draw(random, -5, 5, C, side) / 4).half()
        else:
            made["basis"] = draw(random, -128, 127, C, side).to(torch.int8)
            made["basis_scale"] = power(random, -7, -6, C).float()
    if p.kept_experts:
        made["kept"] = (draw(random, -9, 9, len(p.kept_experts), out, into) / 16).to(getattr(torch, p.kept_dtype))
    if p.lowrank_total:
        # All ranks but one on the last expert, one on the first: the expert between them has none.
        made["lowrank_rank"] = torch.tensor([1, *[0] * (E - 2), p.lowrank_total - 1], dtype=torch.int32)
        made["lowrank_in"] = (draw(random, -3, 3, p.lowrank_total, into) / 4).half()
        made["lowrank_out"] = (draw(random, -3, 3, p.lowrank_total, out) / 4).half()
    if p.bias:
        made["shift"] = (draw(random, -9, 9, E, out) / 8).half()
    return made


def without_gate(projections: Mapping[ProjectionName, Projection]) -> dict[ProjectionName, Projection]:
    """The same of experts that have none: up is stored as gate and up were, or as up was."""
    return {"up": projections["gate_up" if "gate_up" in projections else "up"], "down": projections["down"]}


def write(
    directory: Path,
    block_size: Literal[16, 32],
    version: int = 1,
    bias: bool = False,
    gated: bool = True,
    **more: Any,
) -> None:
    """Write the checkpoint `block{G}/` and `block{G}.expected.safetensors` into a directory.

    `bias` is that of every projection, and `more` are keys of every layer: these came after version 1, and so did
    experts that are not `gated`.
    """
    random = Random(block_size)
    # Every width from 0 to 8, neighbours in no order.
    widths = iter([(5 * i + 3) % 9 for i in range(1000)])
    checkpoint = directory / f"block{block_size}"
    checkpoint.mkdir(parents=True)
    writer = ShardWriter(checkpoint, max_shard_bytes=4000 if block_size == 16 else 10**6)
    writer.add("model.norm.weight", draw(random, 1, 9, 18).bfloat16())
    schemas, expected = {}, {}
    for index, draft in layers(block_size).items():
        prefix = f"model.layers.{index}.mlp.experts"
        named = draft.projections if gated else without_gate(draft.projections)
        given = {name: p.model_copy(update={"bias": bias}) for name, p in named.items()}
        draft = draft.model_copy(update={"projections": given})
        tensors: dict[str, Tensor] = {}
        projections = {}
        for name, p in draft.projections.items():
            made = parts(draft, name, block_size, widths, random)
            tensors |= {f"{name}_{part}": tensor for part, tensor in made.items()}
            projections[name] = p.model_copy(update={"code_rows": int(made["bits"].sum())})
        schemas[prefix] = layer = draft.model_copy(update={"projections": projections} | more)
        for key, tensor in tensors.items():
            writer.add(f"{prefix}.{key}", tensor)
        weights = expert_weights(layer.model_dump(mode="json"), block_size, tensors)
        for which, weight in list(zip(("gate", "up", "down"), weights, strict=True))[0 if gated else 1 :]:
            exact = torch.from_numpy(weight).contiguous()
            assert torch.equal(exact.float().double(), exact)
            expected[f"{prefix}.{which}"] = exact.float()
        added = biases(layer.model_dump(mode="json"), tensors) if bias else ()
        for which, values in list(zip(("gate", "up", "down"), added, strict=bool(added)))[0 if gated else 1 :]:
            expected[f"{prefix}.{which}.bias"] = torch.from_numpy(values).float().contiguous()
    writer.finish()
    config = CheckpointConfig(
        quant_method="bitsmoe",
        format_version=version,
        block_size=block_size,
        bpw=0.0,
        layers=schemas,
        linear_quantization={"quant_method": "fp8"} if block_size == 32 else None,
        tool_version="0.1.0",
        run={"bits": 4.5},
    )
    config = config.model_copy(update={"bpw": config.all_in_bpw()})
    data = {"architectures": ["Qwen3MoeForCausalLM"], "quantization_config": config.dump()}
    (checkpoint / "config.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    save_file(expected, directory / f"block{block_size}.expected.safetensors")


if __name__ == "__main__":
    write(HERE, 16)
    write(HERE, 32)
