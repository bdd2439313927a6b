"""From the experts a baseline left to an ordinary checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError, fault_list
from bitsmoe_kernels.format.safetensors_io import ShardWriter
from offline_quant.checkpoint.directory import new_directory
from offline_quant.model.side_files import copy_side_files
from offline_quant.model.source import SourceModel


def write_checkpoint(model: Path, out: Path, experts: Mapping[str, Tensor]) -> None:
    """Write `model` with other routed experts, float32 and one by one; all else stays as it is.

    Args:
        model: the ordinary checkpoint the experts come from.
        out: a directory that does not exist or is empty.
        experts: gate and up [I, H], down [H, I] of every expert by their names in the per-expert form.

    Raises:
        BitsmoeError: lists what is missing, too many, misshapen or not finite.
    """
    source = SourceModel(model)
    s = source.shape
    shapes = {
        name: shape
        for layer in s.layers
        for expert in range(s.num_experts)
        for name, shape in zip(
            s.expert_names(layer, expert),
            [(s.intermediate_size, s.hidden_size)] * 2 + [(s.hidden_size, s.intermediate_size)],
            strict=True,
        )
    }
    faults = [f"tensor {name} is missing" for name in shapes.keys() - experts.keys()]
    faults += [f"tensor {name} is of no routed expert of {model}" for name in experts.keys() - shapes.keys()]
    for name in shapes.keys() & experts.keys():
        if tuple(experts[name].shape) != shapes[name]:
            faults.append(f"tensor {name} has shape {list(experts[name].shape)}, must be {list(shapes[name])}")
        elif not bool(experts[name].isfinite().all()):
            faults.append(f"tensor {name} holds NaN or infinity")
    if faults:
        raise BitsmoeError(fault_list(f"{out}: these cannot be the quantized experts of {model}", sorted(faults)))
    with new_directory(out) as scratch:
        writer = ShardWriter(scratch)
        for name in source.tensors:
            if not s.is_expert_tensor(name):
                writer.add(name, source.tensors.get(name))
        for name in shapes:
            writer.add(name, experts[name].float())
        writer.finish()
        config = {k: v for k, v in source.config.items() if k not in ("dtype", "torch_dtype")}
        config["torch_dtype"] = "float32"
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_side_files(model, scratch)
