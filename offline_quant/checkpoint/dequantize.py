"""Writes a bitsmoe checkpoint as an ordinary one, with dequantized weights."""

import json
from pathlib import Path

import torch

from bitsmoe_kernels.format.checkpoint import plain_config
from bitsmoe_kernels.format.safetensors_io import ShardWriter
from offline_quant.checkpoint.directory import check_output, check_space, new_directory
from offline_quant.model.expert_files import expert_tensors
from offline_quant.model.quantized import QuantizedModel
from offline_quant.model.side_files import copy_side_files
from offline_quant.runtime.progress import track


def dequantize_checkpoint(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the experts as ordinary matrices, in the form of the family's files.

    Other tensors are copied, quantized ones as ordinary matrices.

    Channels of an expert stay in the quantized checkpoint's order, which changes nothing about its function.

    Args:
        source: a bitsmoe checkpoint.
        out: directory to make.
        dtype: of the dequantized weights, and the dtype config.json names. float32 holds the weights exactly.

    Raises:
        BitsmoeError: a damaged checkpoint, or `out` cannot be written; nothing is left behind.
    """
    check_output(out)
    model = QuantizedModel(source)
    quantized = model.checkpoint.config.tensor_specs()
    dense = {f"{name}.weight" for name in (model.dense.matrices if model.dense else ())}
    others = sum(
        spec.nbytes * dtype.itemsize // spec.dtype.itemsize if name in dense else spec.nbytes
        for name, spec in model.tensors.specs.items()
        if name not in quantized
    )
    check_space(out, others + dtype.itemsize * model.shape.num_weights)
    with new_directory(out) as scratch:
        writer = ShardWriter(scratch)
        for name in model.tensors:
            if name not in quantized:
                tensor = model.tensors.get(name)
                writer.add(name, tensor.to(dtype) if name in dense else tensor)
        for layer in track(model.shape.layers, "Dequantizing"):
            for name, weights in expert_tensors(model.shape, layer, model.experts(layer)):
                writer.add(name, weights.to(dtype))
        writer.finish()
        config = plain_config(model.config)
        config["dtype" if "dtype" in model.config else "torch_dtype"] = str(dtype).removeprefix("torch.")
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_side_files(source, scratch)
