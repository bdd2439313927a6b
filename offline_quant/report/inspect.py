"""Where the bits of a checkpoint went."""

from dataclasses import asdict
from typing import Any

from bitsmoe_kernels.format.checkpoint import Checkpoint
from bitsmoe_kernels.models.families import moe_shape
from bitsmoe_kernels.sharding import ParallelSizes, parallel_sizes
from offline_quant.checkpoint.linear_layers import dense_report
from offline_quant.report.collect import width_histogram


def parallel_sizes_of(checkpoint: Checkpoint) -> ParallelSizes:
    """Sizes a checkpoint's model divides into."""
    shape = moe_shape(checkpoint.model_config, str(checkpoint.directory))
    return parallel_sizes(
        shape.num_experts, shape.intermediate_size, len(shape.layers), checkpoint.config.block_size,
        checkpoint.model_config,
    )  # fmt: skip


def inspect_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where the bits of a checkpoint went, and how it can be served; values of its tensors are not checked."""
    config, total_bytes = checkpoint.config, sum(spec.nbytes for spec in checkpoint.tensors.specs.values())
    bits_of = {
        prefix: {name: checkpoint.tensors.get(f"{prefix}.{name}_bits") for name in layer.projections}
        for prefix, layer in config.layers.items()
    }
    dense = dense_report(checkpoint.dense(), checkpoint.plain_tensors().specs)
    parallel = parallel_sizes_of(checkpoint)
    layers = []
    histogram: dict[str, int] = {}
    for prefix, layer in config.layers.items():
        specs = layer.tensor_specs(config.block_size)
        projections = {}
        for name, spec in layer.projections.items():
            parts = {k.removeprefix(f"{name}_"): s.nbytes for k, s in specs.items() if k.startswith(f"{name}_")}
            bits = bits_of[prefix][name]
            share = 2 if name == "gate_up" else 1
            weights = share * layer.num_experts * layer.hidden_size * layer.intermediate_size
            widths = width_histogram(layer, name, bits, config.block_size)
            for width, count in widths.items():
                histogram[width] = histogram.get(width, 0) + count
            projections[name] = {
                "bpw": 8 * sum(parts.values()) / weights,
                "basis": f"{spec.basis.bits}-bit, rank {spec.basis.rank}" if spec.basis else None,
                "bytes": parts,
                "code_bits_by_expert": [
                    round(v, 4)
                    for v in (
                        bits.double().sum(1) * config.block_size * layer.features(name) * layer.num_experts / weights
                    ).tolist()
                ],
                "weights_by_width": widths,
            }
        layers.append(
            {
                "layer": prefix,
                "bpw": 8 * layer.nbytes(config.block_size) / layer.num_weights,
                "num_experts": layer.num_experts,
                "hidden_size": layer.hidden_size,
                "intermediate_size": layer.intermediate_size,
                "projections": projections,
            }
        )
    return {
        "format_version": config.format_version,
        "bpw": config.all_in_bpw(),
        "expert_weights": config.num_weights,
        "expert_bytes": config.nbytes,
        **dense,
        "other_bytes": total_bytes - config.nbytes - (dense["dense_layers"] or {"bytes": 0})["bytes"],
        "weights_by_width": dict(sorted(histogram.items(), key=lambda kv: int(kv[0]))),
        "options": config.run,
        "tool_version": config.tool_version,
        "parallel_sizes": asdict(parallel),
        "layers": layers,
    }
