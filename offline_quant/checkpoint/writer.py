"""Puts a checkpoint together from the tensors of quantized layers and the original model."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from torch import Tensor

from bitsmoe_kernels.format.checkpoint import with_schema
from bitsmoe_kernels.format.linear_layers import DenseConfig
from bitsmoe_kernels.format.safetensors_io import ShardWriter, largest_shard
from bitsmoe_kernels.format.schema import QUANT_METHOD, CheckpointConfig, Layer, least_version
from offline_quant import VERSION
from offline_quant.checkpoint.linear_layers import write_other_tensors
from offline_quant.model.side_files import copy_side_files, missing_code
from offline_quant.model.sizes import RunSizes
from offline_quant.model.source import SourceModel
from offline_quant.runtime.malloc import trim

SHARD_BYTES = 1 << 30
"""Bytes of a shard of the result, which is put together in memory."""


def write_checkpoint(
    directory: Path,
    source: SourceModel,
    experts: Iterable[tuple[str, Tensor]],
    layers: dict[str, Layer],
    block_size: Literal[16, 32],
    options: dict[str, object],
    dense: DenseConfig | None,
) -> None:
    """Write experts, other tensors, config.json, tokenizer and generation config.

    Args:
        directory: an existing directory.
        source: the original model.
        experts: names and tensors of the quantized experts.
        layers: schemas of the MoE layers, by tensor prefix.
        block_size: components that share a bit-width.
        options: of the run, as config.json records them.
        dense: how linear layers outside the experts are stored; None: they are not quantized.
    """
    # A large block may lie in free room of the heap, and would stay resident: memory is given back after every shard.
    writer = ShardWriter(directory, SHARD_BYTES, trim)
    writer.add_all(experts)
    write_other_tensors(source, dense, writer)
    writer.finish()
    draft = CheckpointConfig(
        quant_method=QUANT_METHOD,
        format_version=least_version(layers.values()),
        block_size=block_size,
        bpw=0.0,
        layers=layers,
        linear_quantization=None if dense is None else dense.dump(),
        tool_version=VERSION,
        run=options,
    )
    final = draft.model_copy(update={"bpw": draft.all_in_bpw()})
    model_config = dict(source.config)
    if missing_code(source.directory):
        del model_config["auto_map"]
    config = with_schema(model_config, final.dump())
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_side_files(source.directory, directory)


def writing_bytes(sizes: RunSizes) -> int:
    """Bytes of memory that `write_checkpoint` takes: a shard, and what its tensors are copied from."""
    # A layer's experts are about two tensors: codes of gate and up, and of down.
    coded = sizes.coded_bytes
    experts = [2 * coded // 3, coded // 3] * len(sizes.shape.layers)
    return largest_shard([*experts, *_other_tensors(sizes)], SHARD_BYTES) + max(coded, sizes.whole_tensor_bytes)


def result_bytes(sizes: RunSizes) -> int:
    """Bytes of all tensors of the result, about."""
    return sum(_other_tensors(sizes)) + sizes.all_coded_bytes


def _other_tensors(sizes: RunSizes) -> list[int]:
    """Bytes of the tensors outside the routed experts, as the original model has them."""
    return [spec.nbytes for name, spec in sizes.specs.items() if not sizes.shape.is_expert_tensor(name)]
