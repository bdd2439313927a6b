"""Open a bitsmoe checkpoint directory: config.json, schema, tensors, all checks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError, FormatError
from bitsmoe_kernels.format.linear_layers import DenseConfig, DenseReader
from bitsmoe_kernels.format.safetensors_io import ShardReader, read_json
from bitsmoe_kernels.format.schema import QUANT_METHOD, CheckpointConfig
from bitsmoe_kernels.format.validate import check_bits, check_headers, check_values

WEIGHTS_KEY = "transformers_weights"
"""Key of config.json under which transformers looks for the name of the file that holds a model's weights."""
WEIGHTS_NOTE = (
    "this is a bitsmoe checkpoint, which transformers cannot load alone: install bitsmoe-vllm and `import bitsmoe` "
    "before from_pretrained, or make an ordinary checkpoint with `bitsmoe dequantize`"
)
"""Its value: transformers shows it as a file name it must refuse. As short as a file name, and no path."""


class Checkpoint:
    """A quantized checkpoint whose schema and tensor headers have been checked.

    Args:
        directory: holds config.json and safetensors.

    Raises:
        FormatError: lists every fault of the schema, or of all headers.
        BitsmoeError: files missing or damaged.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.model_config: dict[str, Any] = read_json(directory / "config.json")
        data = self.model_config.get("quantization_config")
        if not isinstance(data, dict) or data.get("quant_method") != QUANT_METHOD:
            method = data.get("quant_method") if isinstance(data, dict) else None
            raise BitsmoeError(
                f"{directory / 'config.json'}: quant_method is {method!r:.80}, expected {QUANT_METHOD!r}: "
                "make a checkpoint with `bitsmoe quantize`"
            )
        self.config = CheckpointConfig.parse(data, str(directory / "config.json"))
        self.tensors = ShardReader(directory)
        if faults := check_headers(self.config, self.tensors.specs):
            raise FormatError(str(directory), faults)

    def dense(self) -> DenseConfig | None:
        """How linear layers outside the routed experts are quantized; None: they are not.

        Raises:
            FormatError: in a way this version does not read.
        """
        data = self.config.linear_quantization
        return None if data is None else DenseConfig.parse(data, str(self.directory / "config.json"))

    def plain_tensors(self) -> ShardReader:
        """All tensors; quantized linear layers outside the routed experts appear as dequantized matrices.

        Raises:
            FormatError: lists every fault of those layers.
        """
        if (dense := self.dense()) is None:
            return self.tensors
        reader = DenseReader(self.directory, self.model_config, dense)
        if faults := reader.value_faults():
            raise FormatError(str(self.directory), faults)
        return reader

    def layer_tensors(self, prefix: str) -> dict[str, Tensor]:
        """All tensors of one layer, `{projection}_{part}` -> tensor, values not checked."""
        specs = self.config.layers[prefix].tensor_specs(self.config.block_size)
        return {name: self.tensors.get(f"{prefix}.{name}") for name in specs}

    def bit_faults(self) -> list[str]:
        """Faults of the block bits of all layers; reads no other tensor."""
        faults: list[str] = []
        for prefix, layer in self.config.layers.items():
            bits = {name: self.tensors.get(f"{prefix}.{name}_bits") for name in layer.projections}
            faults += check_bits(prefix, layer, bits)
        return faults

    def check(self) -> None:
        """Read all bitsmoe tensors and check their values.

        Raises:
            FormatError: lists every fault of every layer.
        """
        faults: list[str] = []
        for prefix, layer in self.config.layers.items():
            faults += check_values(prefix, layer, self.config.block_size, self.layer_tensors(prefix))
        if faults:
            raise FormatError(str(self.directory), faults)


def is_bitsmoe(model_config: dict[str, Any]) -> bool:
    """Whether a config.json belongs to a bitsmoe checkpoint."""
    data = model_config.get("quantization_config")
    return isinstance(data, dict) and data.get("quant_method") == QUANT_METHOD


def with_schema(model_config: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a bitsmoe checkpoint.

    Args:
        model_config: config.json of the original model.
        schema: `quantization_config`, as `CheckpointConfig.dump` makes it.
    """
    return {**model_config, "quantization_config": dict(schema), WEIGHTS_KEY: WEIGHTS_NOTE}


def plain_config(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of an ordinary checkpoint of the same model, from that of either kind; without its dtype."""
    own = ("quantization_config", WEIGHTS_KEY, "dtype", "torch_dtype")
    return {k: v for k, v in model_config.items() if k not in own}
