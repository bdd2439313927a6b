"""Where the bits of a checkpoint went."""

from pathlib import Path

from bitsmoe_kernels.format.checkpoint import Checkpoint
from bitsmoe_kernels.format.schema import Layer, ProjectionName
from bitsmoe_kernels.models.families import in_table, language_config, moe_shape
from bitsmoe_kernels.sharding import ParallelSizes, parallel_sizes
from offline_quant.checkpoint.directory import existing_directory
from offline_quant.report.collect import linear_layers_report, width_histogram
from offline_quant.report.schema import Inspection, LayerInspection, ProjectionInspection


def parallel_sizes_of(checkpoint: Checkpoint) -> ParallelSizes:
    """Sizes of vLLM's parallelism that a checkpoint's model divides into."""
    config, model_config = checkpoint.config, checkpoint.model_config
    if in_table(model_config, str(checkpoint.directory)):
        moe_shape(model_config, str(checkpoint.directory))
    layer = min(config.layers.values(), key=lambda layer: layer.num_experts)  # their other sizes are alike
    return parallel_sizes(
        layer.num_experts, layer.intermediate_size, len(config.layers), config.block_size, language_config(model_config)
    )


def inspect_directory(directory: Path) -> Inspection:
    """Check a checkpoint in full, and say where its bits went and how it can be served.

    Raises:
        BitsmoeError: no such directory, or a damaged checkpoint.
    """
    checkpoint = Checkpoint(existing_directory(directory))
    checkpoint.check()
    return inspect_checkpoint(checkpoint)


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Where the bits of a checkpoint went, and how it can be served.

    Args:
        checkpoint: read here are headers and block bit-widths; call `check` before, where values are not trusted.
    """
    config, total_bytes = checkpoint.config, sum(spec.nbytes for spec in checkpoint.tensors.specs.values())
    linear_layers = linear_layers_report(checkpoint.dense(), checkpoint.plain_tensors().specs)
    parallel = parallel_sizes_of(checkpoint)
    layers = [
        LayerInspection(
            layer=prefix,
            bpw=8 * layer.nbytes(config.block_size) / layer.num_weights,
            num_experts=layer.num_experts,
            hidden_size=layer.hidden_size,
            intermediate_size=layer.intermediate_size,
            projections={name: _projection(checkpoint, prefix, layer, name) for name in layer.projections},
        )
        for prefix, layer in config.layers.items()
    ]
    weights_by_width: dict[str, int] = {}
    for row in layers:
        for projection in row.projections.values():
            for width, count in projection.weights_by_width.items():
                weights_by_width[width] = weights_by_width.get(width, 0) + count
    return Inspection(
        format_version=config.format_version,
        bpw=config.all_in_bpw(),
        expert_weights=config.num_weights,
        expert_bytes=config.nbytes,
        dense_layers=linear_layers,
        other_bytes=total_bytes - config.nbytes - (linear_layers.bytes if linear_layers else 0),
        weights_by_width=dict(sorted(weights_by_width.items(), key=lambda item: int(item[0]))),
        options=config.run,
        tool_version=config.tool_version,
        parallel_sizes=parallel,
        layers=layers,
    )


def _projection(checkpoint: Checkpoint, prefix: str, layer: Layer, name: ProjectionName) -> ProjectionInspection:
    block_size, basis = checkpoint.config.block_size, layer.projections[name].basis
    nbytes = {
        tensor.removeprefix(f"{name}_"): spec.nbytes
        for tensor, spec in layer.tensor_specs(block_size).items()
        if tensor.startswith(f"{name}_")
    }
    bits = checkpoint.tensors.get(f"{prefix}.{name}_bits")
    weights = layer.num_experts * layer.side(name, "input") * layer.side(name, "output")
    code_bits = bits.double().sum(1) * block_size * layer.features(name) * layer.num_experts / weights
    return ProjectionInspection(
        bpw=8 * sum(nbytes.values()) / weights,
        basis=f"{basis.bits}-bit, rank {basis.rank}" if basis else None,
        bytes=nbytes,
        code_bits_by_expert=[round(v, 4) for v in code_bits.tolist()],
        weights_by_width=width_histogram(layer, name, bits, block_size),
        basis_rank=basis.rank if basis else None,
    )
