"""Weights of a bitsmoe checkpoint, dequantized as they are read."""

from pathlib import Path

from bitsmoe_kernels.errors import FormatError
from bitsmoe_kernels.format.checkpoint import Checkpoint, is_bitsmoe
from bitsmoe_kernels.format.safetensors_io import read_json
from bitsmoe_kernels.reference import LayerWeights
from offline_quant.model.expert_weights import ExpertBiases, ExpertWeights
from offline_quant.model.outside.shape import model_shape
from offline_quant.model.side_files import check_side_files
from offline_quant.model.source import SourceModel


class QuantizedModel:
    """A bitsmoe checkpoint as a source of ordinary weights.

    Raises:
        BitsmoeError: the checkpoint is damaged; lists every fault.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.checkpoint = Checkpoint(directory)
        self.checkpoint.check()
        self.config = self.checkpoint.model_config
        layers = self.checkpoint.config.layers.keys()
        self.shape = model_shape(self.config, directory, self._plain_names, layers)
        self.dense = self.checkpoint.dense()
        self.tensors = self.checkpoint.plain_tensors()
        self._last: tuple[int, LayerWeights] | None = None
        check_side_files(directory)
        self._check_schema()

    def _plain_names(self) -> list[str]:
        """Tensors outside the quantized experts."""
        quantized = self.checkpoint.config.tensor_specs()
        return [name for name in self.checkpoint.plain_tensors() if name not in quantized]

    def _check_schema(self) -> None:
        """Refuse a config.json whose quantization_config describes other experts."""
        s, layers = self.shape, self.checkpoint.config.layers
        expected = {s.prefix(i) for i in s.layers}
        faults = [f"{p}: config.json has these experts, quantization_config does not" for p in expected - layers.keys()]
        faults += [
            f"{p}: quantization_config has these experts, config.json does not" for p in layers.keys() - expected
        ]
        quantized = self.checkpoint.config.tensor_specs()
        faults += [
            f"tensor {name} belongs to experts, but is not part of the schema"
            for name in self.tensors
            if s.is_expert_tensor(name) and name not in quantized
        ]
        of = {s.prefix(i): s.of_layer(i) for i in s.layers}
        for prefix, layer in layers.items():
            said = of.get(prefix, s)
            for name in ("num_experts", "hidden_size", "intermediate_size", "hidden_act"):
                if getattr(layer, name) != getattr(said, name):
                    faults.append(f"{prefix}: {name} is {getattr(layer, name)}, config.json says {getattr(said, name)}")
            if any(p.bias != s.family.bias for p in layer.projections.values()):
                faults.append(f"{prefix}: biases of its experts are not as {s.family.architecture} has them")
        if faults:
            raise FormatError(str(self.directory), sorted(faults))

    def experts(self, layer: int, chunk: range | None = None) -> ExpertWeights:
        """Dequantized experts of a layer, see `WeightSource`."""
        # Chunks of one layer are read one after another.
        if self._last is None or self._last[0] != layer:
            prefix, config = self.shape.prefix(layer), self.checkpoint.config
            tensors = self.checkpoint.layer_tensors(prefix)
            self._last = layer, LayerWeights(config.layers[prefix], config.block_size, tensors)
        weights = self._last[1]
        return as_read(weights, range(weights.layer.num_experts) if chunk is None else chunk)


def as_read(weights: LayerWeights, chunk: range) -> ExpertWeights:
    """Experts of a stored layer, dequantized."""
    biases = weights.biases(chunk)
    return ExpertWeights(*weights.experts(chunk), None if biases is None else ExpertBiases(*biases))


def open_model(directory: Path) -> "SourceModel | QuantizedModel":
    """Open an ordinary or a quantized checkpoint, whichever it is."""
    config = read_json(directory / "config.json")
    return QuantizedModel(directory) if is_bitsmoe(config) else SourceModel(directory)
