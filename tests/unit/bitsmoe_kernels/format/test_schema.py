"""The `quantization_config` object: round trips, faults, and the shapes that follow from it."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given

from bitsmoe_kernels.errors import FormatError
from bitsmoe_kernels.format.schema import PARTS, Basis, CheckpointConfig, ProjectionName, TensorSpec, order_dtype
from builders import FORMS, MadeLayer, Plan, build_form, build_layer, layers, make_config

PREFIX = "model.layers.0.mlp.experts"
HALF = torch.float16


def dumped(**updates: Any) -> dict[str, Any]:
    """JSON data of a valid config with a basis, kept experts and compensators."""
    plans: dict[ProjectionName, Plan] = {
        "gate_up": Plan(basis=Basis(rank=30, bits=8), order="expert", kept_experts=(1, 3)),
        "down": Plan(ranks=(1, 0, 2, 0)),
    }
    config = make_config({PREFIX: build_layer(plans), "model.layers.1.mlp.experts": build_form("paper")})
    return json.loads(json.dumps(config.dump())) | updates


def faults(data: dict[str, Any]) -> list[str]:
    with pytest.raises(FormatError) as e:
        CheckpointConfig.parse(data, "here/config.json")
    assert str(e.value).startswith("here/config.json: ")
    return e.value.faults


@given(made=layers())
def test_round_trip_through_json(made: MadeLayer) -> None:
    config = make_config({PREFIX: made}, run={"bits": 2.25}, linear_quantization={"quant_method": "fp8"})
    again = CheckpointConfig.parse(json.loads(json.dumps(config.dump())))
    assert again == config
    assert again.dump() == config.dump()


def test_defaults_may_be_left_out() -> None:
    data = dumped()
    del data["run"], data["linear_quantization"]
    p = data["layers"]["model.layers.1.mlp.experts"]["projections"]["gate"]
    for key in ("component_axis", "order", "kept_experts", "kept_dtype", "lowrank_total"):
        del p[key]
    assert CheckpointConfig.parse(data) == CheckpointConfig.parse(dumped())


@pytest.mark.parametrize("version", [0, 4, "1", 1.0, True, None])
def test_a_wrong_version_is_reported_alone(version: Any) -> None:
    data = dumped(format_version=version, nonsense=1, block_size=7, layers="none")
    (fault,) = faults(data)
    assert f"format_version is {version!r}" in fault
    assert "reads 1 to 3" in fault


def test_an_older_version_has_no_later_keys() -> None:
    data = dumped()
    layer = data["layers"]["model.layers.1.mlp.experts"]
    assert data["format_version"] == 1
    assert "hidden_act" not in layer
    layer["hidden_act"] = "silu"
    (fault,) = faults(data)
    assert "hidden_act: is not of format_version 1" in fault
    assert CheckpointConfig.parse(data | {"format_version": 2}).dump() == dumped(format_version=2)
    layer["hidden_act"] = "gelu"
    assert any("hidden_act" in fault for fault in faults(data | {"format_version": 2}))


def test_experts_without_a_gate_came_with_version_3() -> None:
    made = build_form("natural", gated=False)
    data = json.loads(json.dumps(make_config({PREFIX: made}).dump()))
    assert data["format_version"] == 3
    assert made.layer.num_weights == 2 * 4 * 40 * 56
    assert CheckpointConfig.parse(data).dump() == data
    (fault,) = faults(data | {"format_version": 2})
    assert f"layers.{PREFIX}.hidden_act: is not of format_version 2" in fault


def test_a_missing_version_is_reported_alone() -> None:
    data = dumped(nonsense=1)
    del data["format_version"]
    (fault,) = faults(data)
    assert "format_version is None" in fault


@pytest.mark.parametrize(
    "path",
    [
        (),
        ("layers", PREFIX),
        ("layers", PREFIX, "projections", "gate_up"),
        ("layers", PREFIX, "projections", "gate_up", "basis"),
    ],
)
def test_unknown_keys_are_rejected(path: tuple[str, ...]) -> None:
    data = dumped()
    at = data
    for key in path:
        at = at[key]
    at["group_size"] = 128
    (fault,) = faults(data)
    assert fault.startswith(".".join([*path, "group_size"]) + ":")


BAD_VALUES: list[tuple[tuple[str, ...], Any]] = [
    (("quant_method",), "gptq"),
    (("block_size",), 64),
    (("block_size",), "16"),
    (("bpw",), -1.0),
    (("bpw",), "2.0"),
    (("bpw",), float("nan")),
    (("bpw",), float("inf")),
    (("layers",), []),
    (("linear_quantization",), "fp8"),
    (("tool_version",), 1),
    (("run",), None),
    (("layers", PREFIX, "num_experts"), 0),
    (("layers", PREFIX, "num_experts"), 4.0),
    (("layers", PREFIX, "hidden_size"), -1),
    (("layers", PREFIX, "hidden_size"), 2**31),
    (("layers", PREFIX, "intermediate_size"), True),
    (("layers", PREFIX, "projections"), None),
    (("layers", PREFIX, "projections", "down", "component_axis"), "left"),
    (("layers", PREFIX, "projections", "down", "order"), "sorted"),
    (("layers", PREFIX, "projections", "down", "code_rows"), -1),
    (("layers", PREFIX, "projections", "down", "code_rows"), 10**70),
    (("layers", PREFIX, "projections", "down", "kept_experts"), ["1"]),
    (("layers", PREFIX, "projections", "down", "kept_dtype"), "float32"),
    (("layers", PREFIX, "projections", "down", "lowrank_total"), -1),
    (("layers", PREFIX, "projections", "gate_up", "basis", "rank"), 0),
    (("layers", PREFIX, "projections", "gate_up", "basis", "bits"), 4),
]


def plant(data: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


@pytest.mark.parametrize(("path", "value"), BAD_VALUES)
def test_a_bad_value_is_named(path: tuple[str, ...], value: Any) -> None:
    data = dumped()
    plant(data, path, value)
    found = faults(data)
    assert all(fault.startswith(".".join(path)) for fault in found)
    if not isinstance(value, dict | list):
        assert any(repr(value) in fault for fault in found)


def test_all_faults_at_once() -> None:
    data = dumped()
    planted = [*BAD_VALUES[1:2], *BAD_VALUES[11:12], *BAD_VALUES[18:]]
    for path, value in planted:
        plant(data, path, value)
    data["surprise"] = 1
    found = faults(data)
    for path in [*(path for path, _ in planted), ("surprise",)]:
        assert any(fault.startswith(".".join(path)) for fault in found), path
    with pytest.raises(FormatError) as e:
        CheckpointConfig.parse(data)
    for fault in found:
        assert fault in str(e.value)


def test_a_long_list_of_faults_is_cut_in_the_message_only() -> None:
    error = FormatError("x", [f"fault {i}" for i in range(50)])
    assert len(error.faults) == 50
    assert "50 fault(s)" in str(error)
    assert "fault 19\n" in str(error)
    assert "fault 20" not in str(error)
    assert str(error).endswith("... and 30 more")


def rules(**projections: dict[str, Any]) -> list[str]:
    """Faults of a layer with 4 experts and these projections."""
    layer = {
        "num_experts": 4,
        "hidden_size": 8,
        "intermediate_size": 8,
        "projections": {name: {"code_rows": 0, **p} for name, p in projections.items()},
    }
    data = dumped(layers={PREFIX: layer})
    try:
        CheckpointConfig.parse(data)
    except FormatError as e:
        return e.faults
    return []


BASIS = {"rank": 4, "bits": 8}


@pytest.mark.parametrize(
    "names", [(), ("down",), ("gate_up",), ("gate", "down"), ("gate_up", "gate", "up", "down"), ("gate", "up")]
)
def test_projection_sets(names: tuple[str, ...]) -> None:
    (fault,) = rules(**{name: {} for name in names})
    assert str(sorted(names)) in fault
    assert "['down', 'gate_up'] or ['down', 'gate', 'up']" in fault


def test_an_unknown_projection_is_rejected() -> None:
    (fault, *_) = rules(gate_up={}, down={}, sideways={})
    assert "sideways" in fault


def test_gate_up_has_its_components_on_the_input_side() -> None:
    (fault,) = rules(gate_up={"component_axis": "output"}, down={})
    assert "gate_up cannot have its components on the output side" in fault


@pytest.mark.parametrize("order", ["shared", "expert"])
def test_no_order_on_bare_intermediate_channels(order: str) -> None:
    out = {"component_axis": "output", "order": order}
    into = {"component_axis": "input", "order": order}
    (fault,) = rules(gate=out, up=out, down=into)
    for name in ("gate", "up", "down"):
        assert f"{name}: order '{order}' on intermediate channels" in fault
    assert not rules(gate=out | {"basis": BASIS}, up=out | {"basis": BASIS}, down=into | {"basis": BASIS})
    assert not rules(gate=into, up=into, down=out)


@pytest.mark.parametrize("kept", [[1, 0], [1, 1], [-1], [4]])
def test_kept_experts_ascend_within_the_layer(kept: list[int]) -> None:
    (fault,) = rules(gate_up={"kept_experts": kept}, down={"kept_experts": kept})
    assert fault.count(f"kept_experts {kept} must ascend within 0..3") == 2
    assert not rules(gate_up={"kept_experts": [0, 3]}, down={})


def test_shapes_written_out() -> None:
    """SPEC.md's table applied by hand: E=4, H=40, I=56, G=16."""
    plans: dict[ProjectionName, Plan] = {
        "gate": Plan(basis=Basis(rank=33, bits=8), order="shared", bits=(2,), kept_experts=(1, 3)),
        "up": Plan(component_axis="output", bits=(3,), ranks=(2, 0, 0, 1)),
        "down": Plan(component_axis="output", basis=Basis(rank=20, bits=16), order="expert", bits=(1,)),
    }
    layer = build_layer(plans).layer
    i16, u8 = torch.int16, torch.uint8
    want = {
        "gate_codes": (i16, 2 * 3 * 2, 56),  # two of four experts, three blocks of 2 bits
        "gate_bits": (u8, 4, 3),
        "gate_component_scale": (HALF, 4, 33),
        "gate_feature_scale": (HALF, 4, 56),
        "gate_order": (u8, 33),
        "gate_basis": (torch.int8, 33, 40),
        "gate_basis_scale": (torch.float32, 33),
        "gate_kept": (torch.bfloat16, 2, 56, 40),
        "up_codes": (i16, 4 * 4 * 3, 40),
        "up_bits": (u8, 4, 4),
        "up_component_scale": (HALF, 4, 56),
        "up_feature_scale": (HALF, 4, 40),
        "up_lowrank_rank": (torch.int32, 4),
        "up_lowrank_in": (HALF, 3, 40),
        "up_lowrank_out": (HALF, 3, 56),
        "down_codes": (i16, 4 * 2, 56),
        "down_bits": (u8, 4, 2),
        "down_component_scale": (HALF, 4, 20),
        "down_feature_scale": (HALF, 4, 56),
        "down_order": (u8, 4, 20),
        "down_basis": (HALF, 20, 40),
    }
    assert {name: (spec.dtype, *spec.shape) for name, spec in layer.tensor_specs(16).items()} == want
    assert layer.num_weights == 3 * 4 * 40 * 56


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block_size", [16, 32])
def test_specs_describe_built_tensors(form: str, block_size: int) -> None:
    made = build_form(form, block_size=block_size)
    specs = made.layer.tensor_specs(block_size)
    assert specs == {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in made.tensors.items()}
    assert made.layer.nbytes(block_size) == sum(t.nbytes for t in made.tensors.values())


def test_all_in_bpw_counts_every_byte() -> None:
    parts = [build_form("extras"), build_form("shared_basis"), build_form("left", num_experts=2)]
    config = make_config({f"model.layers.{i}.mlp.experts": made for i, made in enumerate(parts)})
    size = sum(t.nbytes for made in parts for t in made.tensors.values())
    assert config.nbytes == size
    assert config.bpw == 8 * size / (3 * 40 * 56 * (4 + 4 + 2))


@pytest.mark.parametrize(
    ("components", "dtype"),
    [(1, torch.uint8), (256, torch.uint8), (257, torch.int16), (32768, torch.int16), (32769, torch.int32)],
)
def test_order_dtype_holds_the_last_component(components: int, dtype: torch.dtype) -> None:
    assert order_dtype(components) == dtype
    assert torch.iinfo(dtype).max >= components - 1


def test_parts_are_told_apart_by_suffix() -> None:
    """A tensor's name ends in exactly one `_{part}`, up to `basis` within `basis_scale` and the like."""
    for part in PARTS:
        assert [p for p in PARTS if f"gate_up_{part}".endswith(f"_{p}")] == [part]


def test_spec_prints_dtype_and_shape() -> None:
    assert str(TensorSpec(torch.int16, (3, 4))) == "int16[3, 4]"
    assert TensorSpec(torch.int16, (3, 4)).nbytes == 24


def test_the_largest_sizes_can_be_counted() -> None:
    """In floats, whose range ends: bytes and bits per weight of every schema that is accepted."""
    data = dumped()
    most = 2**31 - 1
    for at in (("num_experts",), ("hidden_size",), ("intermediate_size",), ("projections", "down", "code_rows")):
        plant(data, ("layers", PREFIX, *at), most)
    plant(data, ("layers", PREFIX, "projections", "gate_up", "basis", "rank"), most)
    assert CheckpointConfig.parse(data).all_in_bpw() > 0


def test_a_long_value_is_cut() -> None:
    data = dumped()
    plant(data, ("layers", PREFIX, "hidden_size"), "9" * 100_000)
    plant(data, ("layers", PREFIX, "x" * 100_000), 1)
    with pytest.raises(FormatError) as e:
        CheckpointConfig.parse(data)
    assert len(str(e.value)) < 3_000
