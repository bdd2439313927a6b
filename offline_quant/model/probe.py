"""What is known of a model from config.json and the index of its weights, before anything large is downloaded."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bitsmoe_kernels.errors import BitsmoeError, fault_list
from bitsmoe_kernels.format.safetensors_io import INDEX_FILE, ShardReader, read_index, read_json
from bitsmoe_kernels.format.schema import TensorSpec
from bitsmoe_kernels.models.families import MoEShape, Tested, decoder_of, without_quantization
from offline_quant.model.download import resolve_model
from offline_quant.model.expert_files import expert_tensor_shapes
from offline_quant.model.mxfp4 import BLOCKS
from offline_quant.model.outside.shape import described, model_shape
from offline_quant.model.packed_integers import PACKED
from offline_quant.model.source import source_reader
from offline_quant.model.streaming import model_without_memory


@dataclass(frozen=True)
class Probe:
    """A model that can be quantized, as far as config.json and the index say.

    Attributes:
        architecture: of config.json.
        models: what is published with it.
        tested: how far the architecture is tested, see `Tested`.
        num_layers: decoder layers.
        moe_layers: those with routed experts.
        num_experts: of a layer.
        hidden_size, intermediate_size: of an expert.
        expert_weights: weights in all routed experts.
        index: whether there was an index of the weights to compare with.
        derived: of a model outside the table, what was derived of its experts; None for one of the table.
        unserved: why vLLM cannot serve the result, if that is known.
    """

    architecture: str
    models: str
    tested: Tested
    num_layers: int
    moe_layers: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    expert_weights: int
    index: bool
    derived: str | None = None
    unserved: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


def probe(name: str, revision: str | None = None) -> Probe:
    """Look at a model without its weights, with the checks that `quantize` makes of config.json.

    Args:
        name: of a directory, or on the Hub.
        revision: branch, tag or commit of a Hub name; None: the main branch.

    Raises:
        BitsmoeError: the model cannot be quantized, and why.
    """
    directory = resolve_model(name, revision, with_weights=False)
    config = read_json(directory / "config.json")
    source_reader(config, directory)
    index, names = directory / INDEX_FILE, _names_of(directory)
    shape = model_shape(
        without_quantization(config), directory, lambda: ShardReader(directory).specs if names is None else names
    )
    built = model_without_memory(config, shape, directory)
    if names is not None and (faults := _index_faults(names, shape, built)):
        raise BitsmoeError(fault_list(f"{index}: does not name the tensors of config.json", faults))
    return Probe(
        architecture=shape.family.architecture,
        models=shape.family.title,
        tested=shape.family.tested,
        num_layers=len(decoder_of(built).layers),
        moe_layers=len(shape.layers),
        num_experts=shape.num_experts,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        expert_weights=shape.num_weights,
        index=names is not None,
        derived=described(shape),
        unserved=shape.family.unserved,
    )


def _names_of(directory: Path) -> list[str] | None:
    """Names of the tensors that the index stands for; None without an index."""
    named = read_index(directory)
    return None if named is None else [name.removesuffix(PACKED).removesuffix(BLOCKS) for name in named]


def _index_faults(names: list[str], shape: MoEShape, model: Any) -> list[str]:
    """Tensors that the index does not name: of every layer's experts the first, and all others."""
    unknown = TensorSpec(torch.bfloat16, ())  # only names are compared
    stored = dict.fromkeys(names, unknown)
    missing = []
    for layer in shape.layers:
        wanted = expert_tensor_shapes(shape, layer, stored, shape.num_experts)
        missing += [name for name in wanted if name not in stored][:1]
    missing += sorted(shape.needed_tensors(model) - stored.keys())
    return [f"tensor {name} is missing" for name in missing]
