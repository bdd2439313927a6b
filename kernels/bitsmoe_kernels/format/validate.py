"""Check a checkpoint's tensors against its schema. Every check returns faults as sentences and reports all of them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bitsmoe_kernels.format.schema import MAX_BITS, PARTS, CheckpointConfig, Layer, ProjectionName, TensorSpec


def check_headers(config: CheckpointConfig, found: Mapping[str, TensorSpec]) -> list[str]:
    """Faults visible from names, dtypes and shapes alone.

    Args:
        config: the checkpoint's schema.
        found: every tensor of the checkpoint, bitsmoe's and others.
    """
    faults = []
    expected = config.tensor_specs()
    for name, spec in expected.items():
        if name not in found:
            faults.append(f"tensor {name} is missing (expected {spec})")
        elif found[name] != spec:
            faults.append(f"tensor {name} is {found[name]}, but the schema says {spec}")
    suffixes = tuple(f"_{part}" for part in PARTS)
    for name in sorted(found.keys() - expected.keys()):
        prefix, _, last = name.rpartition(".")
        if prefix in config.layers and last.endswith(suffixes):
            faults.append(f"tensor {name} is not part of the schema")
    if abs(config.all_in_bpw() - config.bpw) > 1e-6:
        faults.append(f"bpw is {config.bpw}, but the tensors take {config.all_in_bpw():.6f} bits per weight")
    return faults


def check_values(prefix: str, layer: Layer, block_size: int, tensors: Mapping[str, Tensor]) -> list[str]:
    """Faults visible in the values of one layer's tensors.

    Args:
        prefix: the layer's tensor prefix, for the messages.
        layer: its schema.
        block_size: G.
        tensors: `{projection}_{part}` -> tensor; shapes and dtypes already checked.
    """
    faults = []
    for name in layer.projections:
        faults += [f"{prefix}.{name}_{f}" for f in _projection_faults(layer, name, block_size, tensors)]
    return faults


def check_bits(prefix: str, layer: Layer, bits: Mapping[ProjectionName, Tensor]) -> list[str]:
    """The part of `check_values` that needs the block bits only: small, yet they say where every code lies.

    Args:
        prefix: the layer's tensor prefix, for the messages.
        layer: its schema.
        bits: uint8 [E, B] of each projection; shapes and dtypes already checked.
    """
    return [f"{prefix}.{name}_{f}" for name in layer.projections for f in _bit_faults(layer, name, bits[name].long())]


def _bit_faults(layer: Layer, name: ProjectionName, bits: Tensor) -> list[str]:
    p = layer.projections[name]
    faults = []
    rows = int(bits.sum())
    if int(bits.max()) > MAX_BITS:
        expert, at = (bits > MAX_BITS).nonzero()[0].tolist()
        faults.append(f"bits: block {at} of expert {expert} says {int(bits.max())} bits; at most {MAX_BITS} exist")
    if rows != p.code_rows:
        faults.append(f"bits: block bits sum to {rows}, but {name}_codes has {p.code_rows} rows")
    for expert in p.kept_experts:
        if int(bits[expert].sum()):
            faults.append(f"bits: expert {expert} is kept at 16 bits, but its block bits are not zero")
    return faults


def _projection_faults(layer: Layer, name: ProjectionName, block: int, tensors: Mapping[str, Tensor]) -> list[str]:
    p = layer.projections[name]
    faults = []

    def part(which: str) -> Tensor:
        return tensors[f"{name}_{which}"]

    bits = part("bits").long()
    faults += _bit_faults(layer, name, bits)
    for which in PARTS:
        tensor = tensors.get(f"{name}_{which}")
        if tensor is not None and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            faults.append(f"{which}: {count} of {tensor.numel()} values are not finite")
    if p.order != "none":
        order = part("order").long()
        identity = torch.arange(layer.components(name), device=order.device)
        bad = (order.sort(-1).values != identity).reshape(-1, len(identity)).any(-1).nonzero()[:, 0].tolist()
        if bad:
            whose = f" for expert(s) {bad[:8]}" if p.order == "expert" else ""
            faults.append(f"order: not a permutation of 0..{len(identity) - 1}{whose}")
    if p.lowrank_total:
        ranks = part("lowrank_rank")
        if int(ranks.min()) < 0 or int(ranks.sum()) != p.lowrank_total:
            faults.append(f"lowrank_rank: ranks {ranks.tolist()} must be >= 0 and sum to {p.lowrank_total}")
        for expert in p.kept_experts:
            if int(ranks[expert]):
                faults.append(f"lowrank_rank: expert {expert} is kept at 16 bits, but its rank is not zero")
    tail = layer.components(name) % block
    if tail and not faults:
        # Bits of components beyond the last one must be clear, so that equal matrices have equal bytes.
        last = torch.cat(
            [torch.arange(end - b, end) for end, b in zip(bits.sum(1).cumsum(0), bits[:, -1], strict=True)]
        )
        if bool((part("codes")[last.to(bits.device)] >> tail).any()):
            faults.append(f"codes: words of the last, partial block have bits set beyond component {tail - 1}")
    return faults
