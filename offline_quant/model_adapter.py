"""Which tensors of a model are routed experts: one table. An architecture outside it is refused, never guessed."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError, FormatError
from bitsmoe_kernels.format.checkpoint import Checkpoint, is_bitsmoe
from bitsmoe_kernels.format.shards import ShardReader, read_json
from bitsmoe_kernels.reference import LayerWeights


def _qwen_moe_layers(config: dict[str, Any]) -> list[int]:
    step = config.get("decoder_sparse_step", 1)
    dense = set(config.get("mlp_only_layers") or [])
    return [i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0]


@dataclass(frozen=True)
class Family:
    """Tensor and configuration names of one architecture."""

    architecture: str
    model_type: str
    decoder: str
    """Tensor prefix of decoder layer {layer}."""
    experts: str
    """The experts module, relative to the decoder layer."""
    gate_name: str
    up_name: str
    down_name: str
    num_experts_key: str
    intermediate_size_key: str
    moe_layers: Callable[[dict[str, Any]], list[int]]
    """Indices of the decoder layers that have routed experts, from config.json."""
    optional_sizes: tuple[str, ...] = ()
    """Further keys of config.json that must be whole numbers above 0 where present."""


FAMILIES = {
    f.architecture: f
    for f in (
        Family(
            architecture="Qwen3MoeForCausalLM",
            model_type="qwen3_moe",
            decoder="model.layers.{layer}",
            experts="mlp.experts",
            gate_name="gate_proj",
            up_name="up_proj",
            down_name="down_proj",
            num_experts_key="num_experts",
            intermediate_size_key="moe_intermediate_size",
            moe_layers=_qwen_moe_layers,
            optional_sizes=("decoder_sparse_step", "num_attention_heads", "num_key_value_heads", "head_dim"),
        ),
    )
}


@dataclass(frozen=True)
class MoEShape:
    """Where a model's routed experts are and how large: E experts of gate, up [I, H] and down [H, I]."""

    family: Family
    layers: tuple[int, ...]
    num_experts: int
    hidden_size: int
    intermediate_size: int

    def prefix(self, layer: int) -> str:
        """Tensor prefix of the experts of one decoder layer."""
        return f"{self.family.decoder.format(layer=layer)}.{self.family.experts}"

    def expert_names(self, layer: int, expert: int) -> tuple[str, str, str]:
        """Names of gate, up and down of one expert, per-expert form."""
        f = self.family
        return tuple(f"{self.prefix(layer)}.{expert}.{n}.weight" for n in (f.gate_name, f.up_name, f.down_name))  # type: ignore[return-value]

    def is_expert_tensor(self, name: str) -> bool:
        """Whether a tensor belongs to routed experts."""
        return any(name.startswith(f"{self.prefix(layer)}.") for layer in self.layers)

    @property
    def num_weights(self) -> int:
        """Weights in all routed experts."""
        return 3 * len(self.layers) * self.num_experts * self.hidden_size * self.intermediate_size


def moe_shape(config: dict[str, Any], subject: str) -> MoEShape:
    """Find a model's experts from its config.json.

    Raises:
        BitsmoeError: not a MoE model, or an architecture outside the table.
    """
    architectures = config.get("architectures")
    named = [a for a in architectures if isinstance(a, str)] if isinstance(architectures, list) else []
    family = next((FAMILIES[a] for a in named if a in FAMILIES), None)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        if not any(k for k in config if "expert" in k):
            raise BitsmoeError(
                f"{subject}: {named or 'a config without architectures'} is not a Mixture-of-Experts model (its config "
                f"names no experts); bitsmoe quantizes routed experts only. Supported: {known}"
            )
        raise BitsmoeError(f"{subject}: architecture {named} is not supported. Supported: {known}")
    sizes = (family.num_experts_key, family.intermediate_size_key, "hidden_size", "num_hidden_layers", "vocab_size")
    if missing := [k for k in (*sizes, "hidden_act", "model_type") if k not in config]:
        raise BitsmoeError(f"{subject}: config.json lacks {missing}")
    faults = [
        f"{key} is {config[key]!r}, but must be a whole number above 0"
        for key in (*sizes, *(k for k in family.optional_sizes if k in config))
        if type(config[key]) is not int or config[key] < 1
    ]
    if config["model_type"] != family.model_type:
        faults.append(f"model_type is {config['model_type']!r}, but {family.architecture} has {family.model_type!r}")
    if config["hidden_act"] != "silu":
        faults.append(f"hidden_act is {config['hidden_act']!r}, but only 'silu' experts are supported")
    if faults:
        raise BitsmoeError(fault_list(f"{subject}: config.json cannot be right", faults))
    layers = tuple(family.moe_layers(config))
    if not layers:
        raise BitsmoeError(f"{subject}: the model has no Mixture-of-Experts layers (config.json)")
    return MoEShape(
        family, layers, config[family.num_experts_key], config["hidden_size"], config[family.intermediate_size_key]
    )


class WeightSource(Protocol):
    """A model's weights, ordinary or quantized."""

    directory: Path
    config: dict[str, Any]
    shape: MoEShape
    tensors: ShardReader

    def experts(self, layer: int) -> tuple[Tensor, Tensor]:
        """Routed experts of a layer, float32: gate and up [E, 2 I, H], down [E, H, I]."""


class QuantizedModel:
    """A bitsmoe checkpoint as a source of ordinary weights.

    Raises:
        BitsmoeError: whatever is wrong with the checkpoint; lists every fault.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.checkpoint = Checkpoint(directory)
        self.checkpoint.check()
        self.config = self.checkpoint.model_config
        self.shape = moe_shape(self.config, str(directory))
        self.tensors = self.checkpoint.tensors
        self._check_schema()

    def _check_schema(self) -> None:
        """config.json and its quantization_config must speak of the same experts."""
        s, layers = self.shape, self.checkpoint.config.layers
        expected = {s.prefix(i) for i in s.layers}
        faults = [f"{p}: config.json has these experts, quantization_config does not" for p in expected - layers.keys()]
        faults += [
            f"{p}: quantization_config has these experts, config.json does not" for p in layers.keys() - expected
        ]
        for prefix, layer in layers.items():
            for name in ("num_experts", "hidden_size", "intermediate_size"):
                if getattr(layer, name) != getattr(s, name):
                    faults.append(f"{prefix}: {name} is {getattr(layer, name)}, config.json says {getattr(s, name)}")
        if faults:
            raise FormatError(str(self.directory), sorted(faults))

    def experts(self, layer: int) -> tuple[Tensor, Tensor]:
        """Dequantized experts of a layer, float32: gate and up [E, 2 I, H], down [E, H, I]."""
        prefix = self.shape.prefix(layer)
        config = self.checkpoint.config
        weights = LayerWeights(config.layers[prefix], config.block_size, self.checkpoint.layer_tensors(prefix))
        return weights.all_experts()


def open_model(directory: Path) -> "SourceModel | QuantizedModel":
    """Open an ordinary or a quantized checkpoint, whichever it is."""
    config = read_json(directory / "config.json")
    return QuantizedModel(directory) if is_bitsmoe(config) else SourceModel(directory)


class SourceModel:
    """An unquantized checkpoint directory: config, tensors, and its experts as stacked matrices.

    Raises:
        BitsmoeError: lists all missing or misshapen tensors and files.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = read_json(directory / "config.json")
        if (quantization := self.config.get("quantization_config")) is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise BitsmoeError(f"{directory}: is already quantized ({method}); quantize the 16-bit model instead")
        self.shape = moe_shape(self.config, str(directory))
        self.tensors = ShardReader(directory)
        self._check_experts()

    def _fused_names(self, layer: int) -> tuple[str, str]:
        prefix = self.shape.prefix(layer)
        return f"{prefix}.gate_up_proj", f"{prefix}.down_proj"

    def _check_experts(self) -> None:
        s = self.shape
        E, H, I = s.num_experts, s.hidden_size, s.intermediate_size  # noqa: E741
        faults = []
        for layer in s.layers:
            expected: dict[str, tuple[int, ...]] = {}
            gate_up, down = self._fused_names(layer)
            if gate_up in self.tensors:
                expected = {gate_up: (E, 2 * I, H), down: (E, H, I)}
            else:
                for e in range(E):
                    gate, up, down = s.expert_names(layer, e)
                    expected |= {gate: (I, H), up: (I, H), down: (H, I)}
            for name, shape in expected.items():
                spec = self.tensors.specs.get(name)
                if spec is None:
                    faults.append(f"tensor {name} is missing")
                elif spec.shape != shape:
                    faults.append(f"tensor {name} has shape {list(spec.shape)}, config.json says {list(shape)}")
                elif spec.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                    faults.append(f"tensor {name} is {spec.dtype}; bfloat16, float16 or float32 is needed")
        if faults:
            raise BitsmoeError(fault_list(f"{self.directory}: experts are not as config.json describes them", faults))

    def experts(self, layer: int) -> tuple[Tensor, Tensor]:
        """All experts of a layer, float32: gate and up [E, 2 I, H], down [E, H, I]."""
        gate_up, down = self._fused_names(layer)
        if gate_up in self.tensors:
            return self.tensors.get(gate_up).float(), self.tensors.get(down).float()
        s = self.shape
        w_in = torch.empty(s.num_experts, 2 * s.intermediate_size, s.hidden_size)
        w_out = torch.empty(s.num_experts, s.hidden_size, s.intermediate_size)
        for e in range(s.num_experts):
            names = s.expert_names(layer, e)
            w_in[e, : s.intermediate_size] = self.tensors.get(names[0])
            w_in[e, s.intermediate_size :] = self.tensors.get(names[1])
            w_out[e] = self.tensors.get(names[2])
        return w_in, w_out

    def check_finite(self, progress: Callable[[Sequence[str], str], Iterable[str]]) -> None:
        """Read every tensor once and look for NaN or infinity.

        Raises:
            BitsmoeError: names every tensor that has some.
        """
        faults = []
        for name in progress(list(self.tensors), "Checking weights"):
            tensor = self.tensors.get(name)
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                bad = int((~tensor.isfinite()).sum())
                faults.append(f"tensor {name}: {bad} of {tensor.numel()} values are NaN or infinite")
        if faults:
            raise BitsmoeError(fault_list(f"{self.directory}: damaged weights; download the model again", faults))


def fault_list(title: str, faults: list[str], shown: int = 12) -> str:
    """A message with one line for each fault, the first `shown` of them."""
    more = [f"... and {len(faults) - shown} more"] if len(faults) > shown else []
    return "\n".join([f"{title}:", *(f"  - {f}" for f in faults[:shown]), *(f"  {m}" for m in more)])
