"""What a bitsmoe checkpoint holds: the `quantization_config` of config.json and every tensor's name, dtype and shape.

Symbols used throughout the project:

    E  experts of the layer            H  hidden_size
    I  intermediate_size               G  block_size, components per block
    C  components of a matrix          F  features of a matrix (its other axis)
    B  blocks, ceil(C / G)             R  rank of a basis (then C = R)

Shapes follow from the schema alone, so a checkpoint can be checked from its safetensors headers before a byte of
tensor data is read. See SPEC.md for the meaning of each tensor.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, get_args

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from bitsmoe_kernels.errors import FormatError
from bitsmoe_kernels.expert_mlp import HIDDEN_ACT, HiddenAct, input_matrices

FORMAT_VERSION = 3
"""The newest that this version reads and writes. Older ones are read for ever."""
LATER_KEYS: dict[str, tuple[int, Any]] = {"hidden_act": (2, HIDDEN_ACT), "bias": (2, False)}
"""Keys of a layer or a projection that came later: the format version they came with, and their default. They are
written where they differ from it, so that readers of older versions know all keys."""
LATER_VALUES: dict[tuple[str, Any], int] = {("hidden_act", "relu2"): 3}
"""(key, value) pairs that came later than their key, and the format version they came with."""
QUANT_METHOD: Final = "bitsmoe"
MAX_BITS = 8
"""Widest code. Whole experts may also stay at 16 bits (`Projection.kept_experts`)."""

Axis = Literal["input", "output"]
ProjectionName = Literal["gate_up", "gate", "up", "down"]
Part = Literal[
    "codes", "bits", "component_scale", "feature_scale", "order", "basis", "basis_scale",
    "kept", "lowrank_rank", "lowrank_in", "lowrank_out", "shift",
]  # fmt: skip
PARTS: tuple[Part, ...] = get_args(Part)
PROJECTION_NAMES: tuple[ProjectionName, ...] = get_args(ProjectionName)


def code_dtype(block_size: int) -> torch.dtype:
    """Word type of codes: int16 for blocks of 16 components, int32 for blocks of 32."""
    return {16: torch.int16, 32: torch.int32}[block_size]


def json_integer(value: Any) -> Any:
    """Refuse what is not an integer in JSON: Literal compares by value, and 16.0 == 16."""
    if type(value) is not int:
        raise ValueError("must be an integer")
    return value


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape one tensor of a checkpoint must have."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        n = self.dtype.itemsize
        for d in self.shape:
            n *= d
        return n

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


class StrictModel(BaseModel):
    """JSON data that must have the very types and keys its schema names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


MAX_INTEGER = 2**31 - 1
"""Of a schema; with it no count of bytes or bits is beyond a float."""
Size = Annotated[int, Field(ge=1, le=MAX_INTEGER)]
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]


class Basis(StrictModel):
    """A basis shared by all experts of a layer, on the component side of a projection.

    Rows are components: on the input side a token enters as z = basis @ x, on the output side it leaves as
    y = basis.T @ z.
    """

    rank: Size
    bits: Annotated[Literal[8, 16], BeforeValidator(json_integer)]
    """16: float16 rows. 8: int8 rows with one float32 scale each."""


class Projection(StrictModel):
    """How one projection of a MoE layer is stored: E mixed-bit matrices of one shape, plus optional parts."""

    component_axis: Axis = "input"
    """The side whose components carry their own bit-widths; features are the other side."""
    basis: Basis | None = None
    order: Literal["none", "shared", "expert"] = "none"
    """Which component each stored row is: the identity, one permutation for the layer, or one for each expert."""
    code_rows: Count
    """Rows of `codes`: the sum of all block bits over the layer's experts."""
    kept_experts: tuple[int, ...] = ()
    """Experts stored whole at 16 bits; their block bits are all zero."""
    kept_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    lowrank_total: Count = 0
    """Ranks of the low-rank compensators, summed over experts; 0: none."""
    bias: bool = False
    """Whether the projection has a bias, in the part `shift`: serving engines read meaning into "bias" in names."""

    @model_validator(mode="before")
    @classmethod
    def _json_lists(cls, data: Any) -> Any:
        # JSON has lists only; strict mode would refuse them for a tuple.
        if isinstance(data, dict) and isinstance(data.get("kept_experts"), list):
            data = {**data, "kept_experts": tuple(data["kept_experts"])}
        return data


class Layer(StrictModel):
    """The routed experts of one MoE layer."""

    num_experts: Size
    hidden_size: Size
    intermediate_size: Size
    hidden_act: HiddenAct = HIDDEN_ACT
    """The activation of the experts. Version 1 of the format knows `HIDDEN_ACT` alone, and does not name it."""
    projections: dict[ProjectionName, Projection]

    @model_validator(mode="after")
    def _consistent(self) -> "Layer":
        names = sorted(self.projections)
        known = [["down", "gate_up"], ["down", "gate", "up"]] if self.gated else [["down", "up"]]
        if names not in known:
            shown = " or ".join(map(str, known))
            raise ValueError(f"projections are {names}, but must be {shown} with hidden_act {self.hidden_act!r}")
        faults = []
        for name, p in self.projections.items():
            if name == "gate_up" and p.component_axis == "output":
                faults.append("gate_up cannot have its components on the output side; store gate and up apart")
            if p.order != "none" and not p.basis and (p.component_axis == "input") == (name == "down"):
                faults.append(
                    f"{name}: order {p.order!r} on intermediate channels; permute the expert's channels instead"
                )
            kept = p.kept_experts
            if list(kept) != sorted(set(kept)) or any(not 0 <= e < self.num_experts for e in kept):
                faults.append(f"{name}: kept_experts {list(kept)} must ascend within 0..{self.num_experts - 1}")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def gated(self) -> bool:
        """Whether the experts have a gate. Those without one have the projections up and down."""
        return input_matrices(self.hidden_act) == 2

    def side(self, name: ProjectionName, axis: Axis) -> int:
        """Size of a projection's input or output side."""
        wide = 2 * self.intermediate_size if name == "gate_up" else self.intermediate_size
        into, out = (self.intermediate_size, self.hidden_size) if name == "down" else (self.hidden_size, wide)
        return into if axis == "input" else out

    def components(self, name: ProjectionName) -> int:
        """C: the basis rank, or the size of the component side itself."""
        p = self.projections[name]
        return p.basis.rank if p.basis else self.side(name, p.component_axis)

    def features(self, name: ProjectionName) -> int:
        """F: the size of the side that has no components."""
        return self.side(name, "output" if self.projections[name].component_axis == "input" else "input")

    @property
    def num_weights(self) -> int:
        """Weights these experts had before quantization: 3 E H I, or 2 E H I without a gate."""
        return (1 + input_matrices(self.hidden_act)) * self.num_experts * self.hidden_size * self.intermediate_size

    def tensor_specs(self, block_size: int) -> dict[str, TensorSpec]:
        """Every tensor of this layer: `{projection}_{part}` -> dtype and shape."""
        return {
            f"{name}_{part}": spec
            for name, p in self.projections.items()
            for part, spec in _projection_specs(self, name, p, block_size)
        }

    def nbytes(self, block_size: int) -> int:
        """Bytes of all tensors of this layer: codes, scales, metadata and basis."""
        return sum(spec.nbytes for spec in self.tensor_specs(block_size).values())


def num_blocks(components: int, block_size: int) -> int:
    """Blocks of `block_size` components; the last one may be partial."""
    return -(-components // block_size)


def order_dtype(components: int) -> torch.dtype:
    """Smallest integer dtype that holds a component's index."""
    return torch.uint8 if components <= 256 else torch.int16 if components <= 32768 else torch.int32


def _projection_specs(
    layer: Layer, name: ProjectionName, p: Projection, block: int
) -> Iterator[tuple[Part, TensorSpec]]:
    E, C, F = layer.num_experts, layer.components(name), layer.features(name)
    half = torch.float16
    yield "codes", TensorSpec(code_dtype(block), (p.code_rows, F))
    yield "bits", TensorSpec(torch.uint8, (E, num_blocks(C, block)))
    yield "component_scale", TensorSpec(half, (E, C))
    yield "feature_scale", TensorSpec(half, (E, F))
    if p.order != "none":
        yield "order", TensorSpec(order_dtype(C), (C,) if p.order == "shared" else (E, C))
    if p.basis:
        side = layer.side(name, p.component_axis)
        yield "basis", TensorSpec(half if p.basis.bits == 16 else torch.int8, (p.basis.rank, side))
        if p.basis.bits == 8:
            yield "basis_scale", TensorSpec(torch.float32, (p.basis.rank,))
    into, out = layer.side(name, "input"), layer.side(name, "output")
    if p.kept_experts:
        yield "kept", TensorSpec(getattr(torch, p.kept_dtype), (len(p.kept_experts), out, into))
    if p.lowrank_total:
        yield "lowrank_rank", TensorSpec(torch.int32, (E,))
        yield "lowrank_in", TensorSpec(half, (p.lowrank_total, into))
        yield "lowrank_out", TensorSpec(half, (p.lowrank_total, out))
    if p.bias:
        yield "shift", TensorSpec(half, (E, out))


class CheckpointConfig(StrictModel):
    """The `quantization_config` object of config.json."""

    quant_method: Literal["bitsmoe"]
    format_version: int
    block_size: Annotated[Literal[16, 32], BeforeValidator(json_integer)]
    bpw: float = Field(ge=0, allow_inf_nan=False)
    """All-in bits per weight: bytes of all tensors below times 8, over the weights they replace."""
    layers: dict[str, Layer]
    """Tensor prefix of a layer's experts, such as `model.layers.0.mlp.experts`, to its layout."""
    linear_quantization: dict[str, Any] | None = None
    """How layers outside the routed experts are quantized: an ordinary Hugging Face quantization_config, which `dense`
    reads. None: they are untouched."""
    tool_version: str
    run: dict[str, Any] = {}
    """Options the checkpoint was made with, for the record; readers ignore it."""

    @classmethod
    def parse(cls, data: dict[str, Any], subject: str = "quantization_config") -> "CheckpointConfig":
        """Build from JSON data.

        Raises:
            FormatError: lists every fault; a wrong `format_version` is reported alone, since nothing else can be
                judged under another version.
        """
        version = data.get("format_version")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise FormatError(
                subject,
                [
                    f"format_version is {version!r}, but this version of bitsmoe-vllm reads 1 to {FORMAT_VERSION}: "
                    "install the version that wrote the checkpoint, or quantize the model again"
                ],
            )
        try:
            config = cls.model_validate(data)
        except ValidationError as e:
            raise FormatError(subject, pydantic_faults(e)) from None
        later = [
            f"layers.{where}.{key}: is not of format_version {version}"
            for prefix, layer in data["layers"].items()
            for where, keys in _described(prefix, layer)
            for key, (least, _) in LATER_KEYS.items()
            if key in keys and version < max(least, LATER_VALUES.get((key, keys[key]), 0))
        ]
        if later:
            raise FormatError(subject, later)
        return config

    def dump(self) -> dict[str, Any]:
        """JSON data; `parse` of it gives an equal object."""
        data = self.model_dump(mode="json")
        for prefix, layer in data["layers"].items():
            for _, keys in _described(prefix, layer):
                for key, (_, default) in LATER_KEYS.items():
                    if keys.get(key, default) == default:
                        keys.pop(key, None)
        return data

    def tensor_specs(self) -> dict[str, TensorSpec]:
        """Every bitsmoe tensor of the checkpoint, by full name."""
        return {
            f"{prefix}.{name}": spec
            for prefix, layer in self.layers.items()
            for name, spec in layer.tensor_specs(self.block_size).items()
        }

    @property
    def num_weights(self) -> int:
        """Weights replaced, over all layers."""
        return sum(layer.num_weights for layer in self.layers.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all bitsmoe tensors."""
        return sum(layer.nbytes(self.block_size) for layer in self.layers.values())

    def all_in_bpw(self) -> float:
        """All-in bits per weight as the tensors say; `bpw` must equal it."""
        return 8 * self.nbytes / max(1, self.num_weights)


def least_version(layers: Iterable[Layer]) -> int:
    """The oldest format version that can hold these layers: older readers go on reading what they can."""
    used = (
        max(least, LATER_VALUES.get((key, keys[key]), 0))
        for layer in layers
        for _, keys in _described("", layer.model_dump())
        for key, (least, default) in LATER_KEYS.items()
        if keys.get(key, default) != default
    )
    return max(used, default=1)


def _described(prefix: str, layer: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A layer's JSON data and that of its projections, with where they stand."""
    yield prefix, layer
    for name, projection in layer["projections"].items():
        yield f"{prefix}.projections.{name}", projection


def pydantic_faults(error: ValidationError) -> list[str]:
    """What a schema found, one sentence each: where, what, and the value."""
    return [_pydantic_fault(err) for err in error.errors()]


def _pydantic_fault(err: Any) -> str:
    where = ".".join(str(x) for x in err["loc"]) or "quantization_config"
    message = err["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(err["input"], dict) else f" (found {err['input']!r:.80})"
    return f"{where}: {message}{shown}"
