"""Linear layers outside the routed experts at 8 or 4 bits, in a form that vLLM serves with kernels of its own.

The form is `pack-quantized` of compressed-tensors: symmetric integers of N rows and K columns, one scale for 128
columns of a row, or for the whole row where 128 does not divide K. This file says which layers may be stored so, what
`linear_quantization` of a checkpoint's schema may hold, and what its tensors are. See SPEC.md.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import BeforeValidator, Field, ValidationError, model_validator
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError, FormatError
from bitsmoe_kernels.format.safetensors_io import ShardReader
from bitsmoe_kernels.format.schema import StrictModel, TensorSpec, json_integer, pydantic_faults

GROUP: Final = 128
"""Columns that share a scale; the kernels of vLLM for GPUs take 32, 64, 128 or a whole row."""
DenseBits = Literal[4, 8]
PARTS = ("weight_packed", "weight_scale", "weight_shape")
"""What stands in a checkpoint for `weight`."""
PLAIN_DTYPE = torch.float32
"""Of a dequantized matrix: integer times scale is exact in it."""


@dataclass(frozen=True)
class Linear:
    """One linear layer as an engine computes it: matrices with the same input, side by side.

    Attributes:
        names: modules of the checkpoint, without `.weight`.
        split: side that tensor parallelism divides; None: every rank has all of it.
    """

    names: tuple[str, ...]
    split: Literal["output", "input"] | None


_MLPS = (
    "mlp", "mlp.shared_expert", "mlp.shared_experts", "mlp.shared_mlp", "feed_forward",
    "block_sparse_moe.shared_experts",
)  # fmt: skip
_IN_LAYER = (
    Linear(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "output"),
    Linear(("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), None),
    Linear(("self_attn.q_b_proj",), "output"),
    Linear(("self_attn.o_proj",), "input"),
    Linear(("self_attn.out_proj",), "input"),
    Linear(("feed_forward.w1", "feed_forward.w3"), "output"),
    Linear(("feed_forward.w2",), "input"),
    Linear(("linear_attn.in_proj_qkvz",), "output"),
    Linear(("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), "output"),
    Linear(("linear_attn.out_proj",), "input"),
    *(
        linear
        for mlp in _MLPS
        for linear in (Linear((f"{mlp}.gate_proj", f"{mlp}.up_proj"), "output"), Linear((f"{mlp}.down_proj",), "input"))
    ),
)
"""All there are within a decoder layer, over all families. Left out on purpose: routers and the gates of shared experts
and the indexers of sparse attention (few weights, and they decide), `kv_b_proj` (vLLM multiplies it into its
neighbours, for which it needs the matrix itself), `in_proj_ba`, gates of attention and of norms (few weights),
convolutions, state-space layers, MiniMax-01's linear attention, Granite's `shared_mlp` and Llama 4's `shared_expert`
(not tried with vLLM's)."""

_PLAIN_HEADS = frozenset({"Qwen3NextForCausalLM"})
"""Architectures in which vLLM has no place for a quantized `lm_head`."""


def dense_linears(model_config: Mapping[str, Any], names: Mapping[str, Any]) -> Iterator[Linear]:
    """The linear layers of a model that can be stored at 8 or 4 bits.

    Layers beyond `num_hidden_layers` are not among them: they are copied as they are.

    Args:
        model_config: config.json.
        names: by tensor name, `.weight` included; matrices that are not there are left out.

    Raises:
        BitsmoeError: config.json does not say how many layers there are.
    """
    layers = model_config.get("num_hidden_layers")
    if type(layers) is not int:
        raise BitsmoeError(f"config.json: num_hidden_layers is {layers!r}, but must be a whole number above 0")
    tied = model_config.get("tie_word_embeddings", False)
    plain_head = tied or _PLAIN_HEADS.intersection(model_config.get("architectures") or ())
    head = [] if plain_head else [Linear(("lm_head",), "output")]
    inside = [
        Linear(tuple(f"model.layers.{i}.{name}" for name in linear.names), linear.split)
        for i in range(layers)
        for linear in _IN_LAYER
    ]
    for linear in inside + head:
        if there := tuple(name for name in linear.names if f"{name}.weight" in names):
            yield Linear(there, linear.split)


class DenseWeights(StrictModel):
    """How the matrices of a group are stored; keys and values are those of compressed-tensors."""

    num_bits: Annotated[DenseBits, BeforeValidator(json_integer)]
    type: Literal["int"] = "int"
    symmetric: Literal[True] = True
    strategy: Literal["group", "channel"]
    group_size: int | None = None
    dynamic: Literal[False] = False

    @model_validator(mode="after")
    def _consistent(self) -> "DenseWeights":
        if self.group_size != (expected := GROUP if self.strategy == "group" else None):
            raise ValueError(f"group_size is {self.group_size}, but strategy {self.strategy!r} goes with {expected}")
        return self

    def tensor_specs(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """The tensors that store a matrix [rows, columns]: part -> dtype and shape."""
        return {
            "weight_packed": TensorSpec(torch.int32, (rows, columns * self.num_bits // 32)),
            "weight_scale": TensorSpec(torch.bfloat16, (rows, columns // (self.group_size or columns))),
            "weight_shape": TensorSpec(torch.int64, (2,)),
        }


class DenseGroup(StrictModel):
    """Matrices stored alike."""

    targets: tuple[str, ...] = Field(min_length=1)
    """Module names: tensor names without `.weight`."""
    weights: DenseWeights
    input_activations: None = None
    output_activations: None = None

    @model_validator(mode="before")
    @classmethod
    def _json_lists(cls, data: Any) -> Any:
        # JSON has lists only; strict mode would refuse them for a tuple.
        if isinstance(data, dict) and isinstance(data.get("targets"), list):
            data = {**data, "targets": tuple(data["targets"])}
        return data


class DenseConfig(StrictModel):
    """The one form of `linear_quantization` that is read and written: a quantization_config of compressed-tensors."""

    quant_method: Literal["compressed-tensors"]
    format: Literal["pack-quantized"]
    quantization_status: Literal["compressed"] = "compressed"
    config_groups: dict[str, DenseGroup] = Field(min_length=1)

    @model_validator(mode="after")
    def _each_once(self) -> "DenseConfig":
        times = Counter(t for group in self.config_groups.values() for t in group.targets)
        if twice := sorted(t for t, n in times.items() if n > 1):
            raise ValueError(f"targets named twice: {', '.join(twice)}")
        return self

    @classmethod
    def parse(cls, data: dict[str, Any], subject: str) -> "DenseConfig":
        """Build from JSON data.

        Raises:
            FormatError: lists every fault.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as e:
            raise FormatError(subject, [f"linear_quantization.{fault}" for fault in pydantic_faults(e)]) from None

    def dump(self) -> dict[str, Any]:
        """JSON data; `parse` of it gives an equal object."""
        return self.model_dump(mode="json")

    @property
    def matrices(self) -> dict[str, DenseWeights]:
        """Module name -> how its matrix is stored."""
        return {target: group.weights for group in self.config_groups.values() for target in group.targets}


def plain_specs(
    dense: DenseConfig, model_config: Mapping[str, Any], found: Mapping[str, TensorSpec]
) -> tuple[dict[str, TensorSpec], list[str]]:
    """A checkpoint's tensors as if its quantized matrices were ordinary ones, and the faults of those.

    Args:
        dense: its `linear_quantization`.
        model_config: config.json.
        found: the tensors there are.

    Returns:
        Tensors by name, a quantized matrix as `{module}.weight`; and faults as sentences.
    """
    specs, faults, matrices = dict(found), [], dense.matrices
    for name, weights in matrices.items():
        parts = {part: specs.pop(f"{name}.{part}", None) for part in PARTS}
        if missing := [part for part, spec in parts.items() if spec is None]:
            faults += [f"tensor {name}.{part} is missing, though linear_quantization names {name}" for part in missing]
            continue
        if f"{name}.weight" in specs:
            faults.append(f"tensor {name}.weight is there, though linear_quantization says that {name} is quantized")
        packed = parts["weight_packed"]
        assert packed is not None
        rows, words = packed.shape if len(packed.shape) == 2 else (0, 0)
        columns = words * 32 // weights.num_bits
        if weights.group_size and columns % weights.group_size:
            faults.append(f"tensor {name}.weight_packed is {packed}: {columns} columns in groups of {GROUP}")
            continue
        for part, spec in weights.tensor_specs(rows, max(columns, 1)).items():
            if parts[part] != spec:
                faults.append(f"tensor {name}.{part} is {parts[part]}, but {spec} goes with weight_packed {packed}")
        specs[f"{name}.weight"] = TensorSpec(PLAIN_DTYPE, (rows, columns))
    known = set()
    for linear in dense_linears(model_config, specs):
        known |= set(linear.names)
        if len({matrices.get(name) for name in linear.names}) > 1:
            faults.append(
                f"linear_quantization: {', '.join(linear.names)} are computed as one, so must be stored alike"
            )
    for name in sorted(matrices.keys() - known):
        if f"{name}.weight" in specs:
            faults.append(f"linear_quantization: {name} is no linear layer that can be quantized")
    faults += [
        f"tensor {name} is there, though linear_quantization does not name {name.rpartition('.')[0]}"
        for name in specs
        if name.endswith(".weight_packed")
    ]
    return specs, faults


class DenseReader(ShardReader):
    """Tensors of a checkpoint with quantized linear layers; those appear as `{module}.weight`, float32 [N, K].

    Args:
        directory: the checkpoint.
        model_config: its config.json.
        dense: its `linear_quantization`.

    Raises:
        BitsmoeError: damaged files, or lists every fault of the quantized matrices' headers.
    """

    def __init__(self, directory: Any, model_config: Mapping[str, Any], dense: DenseConfig):
        super().__init__(directory)
        self.matrices = dense.matrices
        self.specs, faults = plain_specs(dense, model_config, self.specs)
        if faults:
            raise FormatError(str(directory), faults)

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU; quantized matrices in float32."""
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in self.matrices:
            return super().get(name)
        words, scale = super().get(f"{module}.weight_packed"), super().get(f"{module}.weight_scale")
        return dequantize(words, scale, self.matrices[module].num_bits)

    def value_faults(self) -> list[str]:
        """Faults in the values of the small tensors: scales and shapes."""
        faults = []
        for module in self.matrices:
            scale, shape = super().get(f"{module}.weight_scale"), super().get(f"{module}.weight_shape")
            if not bool(scale.isfinite().all()):
                faults.append(f"tensor {module}.weight_scale has values that are not finite")
            if (said := tuple(shape.tolist())) != (is_ := self.specs[f"{module}.weight"].shape):
                faults.append(f"tensor {module}.weight_shape says {list(said)}, but the matrix is {list(is_)}")
        return faults


def pack(codes: Tensor, bits: DenseBits) -> Tensor:
    """int8 [N, K] within -2^(bits-1) .. 2^(bits-1) - 1 -> int32 [N, K bits / 32], first column in the lowest bits."""
    shifted = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    if bits == 4:
        shifted = shifted[:, ::2] | shifted[:, 1::2] << 4
    return shifted.contiguous().view(torch.int32)


def unpack(words: Tensor, bits: DenseBits) -> Tensor:
    """Inverse of `pack`: int32 [N, K bits / 32] -> int8 [N, K]."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 4:
        octets = torch.stack((octets & 15, octets >> 4), -1).flatten(1)
    return (octets.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def dequantize(words: Tensor, scale: Tensor, bits: DenseBits) -> Tensor:
    """The matrix that is stored.

    Args:
        words: int32 [N, K bits / 32].
        scale: bfloat16 [N, K / 128], or [N, 1] for whole rows.
        bits: of an integer.

    Returns:
        float32 [N, K].
    """
    codes = unpack(words, bits)
    grouped = codes.view(*scale.shape, -1).to(PLAIN_DTYPE) * scale.to(PLAIN_DTYPE)[..., None]
    return grouped.view(codes.shape)


@dataclass(frozen=True)
class DenseSize:
    """What quantized linear layers take.

    Attributes:
        weights: the number of weights that the codes describe.
        nbytes: bytes of their tensors, scales included.
    """

    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Scales included."""
        return 8 * self.nbytes / max(1, self.weights)


def dense_size(dense: DenseConfig, specs: Mapping[str, TensorSpec]) -> DenseSize:
    """Size of all quantized matrices.

    Args:
        dense: how they are stored.
        specs: with the shape of each as `{module}.weight`.
    """
    weights = nbytes = 0
    for name, form in dense.matrices.items():
        rows, columns = specs[f"{name}.weight"].shape
        weights += rows * columns
        nbytes += sum(spec.nbytes for spec in form.tensor_specs(rows, columns).values())
    return DenseSize(weights, nbytes)
