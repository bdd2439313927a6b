"""Every rule of SPEC.md, section 7, broken on purpose."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch import Tensor

from bitsmoe_kernels.format.schema import Basis, ProjectionName, TensorSpec
from bitsmoe_kernels.format.validate import check_bits, check_headers, check_values
from builders import FORMS, MadeLayer, Plan, build_form, build_layer, layers, make_config

A, B = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"


def everything() -> MadeLayer:
    """A layer with all parts, a partial last block on both projections, three experts of which one is kept."""
    plans: dict[ProjectionName, Plan] = {
        "gate_up": Plan(basis=Basis(rank=37, bits=8), order="expert", bits=(1, 3), kept_experts=(1,), ranks=(2, 0, 1)),
        "down": Plan(bits=(2, 4), kept_experts=(1,), ranks=(1, 0, 1)),
    }
    return build_layer(plans, num_experts=3)


def headers(made: dict[str, MadeLayer]) -> dict[str, TensorSpec]:
    specs = {f"{p}.{n}": TensorSpec(t.dtype, tuple(t.shape)) for p, m in made.items() for n, t in m.tensors.items()}
    return specs | {"model.embed_tokens.weight": TensorSpec(torch.bfloat16, (10, 40))}


@pytest.mark.slow
@given(made=layers())
def test_built_layers_have_no_faults(made: MadeLayer) -> None:
    assert check_headers(make_config({A: made}), headers({A: made})) == []
    assert check_values(A, made.layer, made.block_size, made.tensors) == []


@pytest.mark.parametrize("form", FORMS)
def test_each_missing_tensor_is_named(form: str) -> None:
    made = {A: build_form(form)}
    config = make_config(made)
    for name, spec in config.tensor_specs().items():
        found = headers(made)
        del found[name]
        assert check_headers(config, found) == [f"tensor {name} is missing (expected {spec})"]


@pytest.mark.parametrize("form", FORMS)
def test_each_wrong_dtype_and_shape_is_named(form: str) -> None:
    made = {A: build_form(form)}
    config = make_config(made)
    for name, spec in config.tensor_specs().items():
        wrong_shapes = [(*spec.shape[:-1], spec.shape[-1] + 1), (*spec.shape, 1), spec.shape[:-1]]
        for wrong in [TensorSpec(torch.float64, spec.shape), *(TensorSpec(spec.dtype, s) for s in wrong_shapes)]:
            (fault,) = check_headers(config, headers(made) | {name: wrong})
            assert fault == f"tensor {name} is {wrong}, but the schema says {spec}"


def test_parts_outside_the_schema_are_named() -> None:
    made = {A: build_form("natural")}
    spec = TensorSpec(torch.float16, (1,))
    extra = {f"{A}.gate_up_basis": spec, f"{A}.gate_codes": spec, f"{A}.down_lowrank_in": spec}
    others = {"model.layers.0.mlp.gate.weight": spec, f"{B}.gate_up_codes": spec, "model.norm.weight": spec}
    found = check_headers(make_config(made), headers(made) | extra | others)
    assert found == [f"tensor {name} is not part of the schema" for name in sorted(extra)]


@pytest.mark.parametrize("off", [-0.001, 0.00001])
def test_bpw_must_be_all_in(off: float) -> None:
    made = {A: build_form("natural")}
    config = make_config(made)
    (fault,) = check_headers(config.model_copy(update={"bpw": config.bpw + off}), headers(made))
    assert f"bpw is {config.bpw + off}, but the tensors take {config.bpw:.6f}" in fault


def test_all_header_faults_at_once() -> None:
    made = {A: build_form("natural"), B: build_form("left")}
    config = make_config(made)
    found = headers(made)
    del found[f"{A}.down_bits"], found[f"{B}.up_order"]
    found[f"{A}.gate_up_codes"] = TensorSpec(torch.int32, found[f"{A}.gate_up_codes"].shape)
    found[f"{B}.down_basis"] = TensorSpec(torch.int8, (3, 3))
    found[f"{B}.gate_kept"] = TensorSpec(torch.bfloat16, (1, 56, 40))
    faults = check_headers(config.model_copy(update={"bpw": 1.0}), found)
    assert len(faults) == 6
    text = "\n".join(faults)
    for name in ("0.mlp.experts.down_bits", "0.mlp.experts.gate_up_codes", "1.mlp.experts.up_order"):
        assert name in text
    for name in ("1.mlp.experts.down_basis", "1.mlp.experts.gate_kept", "bpw is 1.0"):
        assert name in text


# Each breaks one rule in the tensors of `everything()` and names the sentence that must result.
Breaker = Callable[[dict[str, Tensor]], str]


def too_many_bits(t: dict[str, Tensor]) -> str:
    # The sum stays as it is: only the width itself gives it away. Blocks of expert 2 take what they need.
    bits = t["down_bits"]
    total = int(bits.sum())
    bits[0], bits[2] = 0, 0
    bits[0, 0] = total
    assert total > 8
    return f"down_bits: block 0 of expert 0 says {total} bits; at most 8 exist"


def bits_do_not_sum(t: dict[str, Tensor]) -> str:
    t["gate_up_bits"][2, 0] += 1
    total = int(t["gate_up_bits"].sum())
    return f"gate_up_bits: block bits sum to {total}, but gate_up_codes has {total - 1} rows"


def kept_expert_with_bits(t: dict[str, Tensor]) -> str:
    t["down_bits"][1, 0] = 1
    t["down_bits"][0, 0] -= 1
    return "down_bits: expert 1 is kept at 16 bits, but its block bits are not zero"


def order_with_a_repetition(t: dict[str, Tensor]) -> str:
    t["gate_up_order"][2, 0] = t["gate_up_order"][2, 1]
    return "gate_up_order: not a permutation of 0..36 for expert(s) [2]"


def order_out_of_range(t: dict[str, Tensor]) -> str:
    for e in (0, 1):
        order = t["gate_up_order"][e]
        order[order.long().argmax()] = 37
    return "gate_up_order: not a permutation of 0..36 for expert(s) [0, 1]"


def negative_rank(t: dict[str, Tensor]) -> str:
    t["gate_up_lowrank_rank"][:] = torch.tensor([4, 0, -1])
    return "gate_up_lowrank_rank: ranks [4, 0, -1] must be >= 0 and sum to 3"


def ranks_do_not_sum(t: dict[str, Tensor]) -> str:
    t["down_lowrank_rank"][0] += 1
    return "down_lowrank_rank: ranks [2, 0, 1] must be >= 0 and sum to 2"


def kept_expert_with_rank(t: dict[str, Tensor]) -> str:
    t["down_lowrank_rank"][:] = torch.tensor([0, 1, 1])
    return "down_lowrank_rank: expert 1 is kept at 16 bits, but its rank is not zero"


def bits_beyond_the_last_component(t: dict[str, Tensor]) -> str:
    # 56 = 3 blocks of 16 and one of 8; the last word of the last expert belongs to the partial block.
    t["down_codes"][-1, 5] |= 1 << 8
    return "down_codes: words of the last, partial block have bits set beyond component 7"


def sign_bit_beyond_the_last_component(t: dict[str, Tensor]) -> str:
    t["down_codes"][-1, 0] |= -(2**15)
    return "down_codes: words of the last, partial block have bits set beyond component 7"


def not_finite(part: str, value: float) -> Breaker:
    def breaker(t: dict[str, Tensor]) -> str:
        t[part].view(-1)[-1] = value
        return f"{part}: 1 of {t[part].numel()} values are not finite"

    return breaker


BREAKERS: dict[str, Breaker] = {
    f.__name__: f
    for f in (
        too_many_bits,
        bits_do_not_sum,
        kept_expert_with_bits,
        order_with_a_repetition,
        order_out_of_range,
        negative_rank,
        ranks_do_not_sum,
        kept_expert_with_rank,
        bits_beyond_the_last_component,
        sign_bit_beyond_the_last_component,
    )
} | {
    f"{part}={value}": not_finite(part, value)
    for part in (
        "gate_up_component_scale",
        "gate_up_feature_scale",
        "gate_up_basis_scale",
        "gate_up_kept",
        "down_lowrank_in",
        "down_lowrank_out",
    )
    for value in (float("nan"), float("-inf"))
}


@pytest.mark.parametrize("name", BREAKERS)
def test_each_fault_is_found(name: str) -> None:
    made = everything()
    assert check_values(A, made.layer, 16, made.tensors) == []
    wanted = f"{A}.{BREAKERS[name](made.tensors)}"
    assert check_values(A, made.layer, 16, made.tensors) == [wanted]


def test_faults_of_a_16_bit_basis_and_a_shared_order() -> None:
    made = build_layer({"gate_up": Plan(basis=Basis(rank=300, bits=16), order="shared"), "down": Plan()})
    made.tensors["gate_up_basis"][0, :2] = torch.tensor([float("nan"), float("inf")])
    made.tensors["gate_up_order"][7] = -1  # int16, since 300 indices do not fit a byte
    assert check_values(A, made.layer, 16, made.tensors) == [
        f"{A}.gate_up_basis: 2 of 12000 values are not finite",
        f"{A}.gate_up_order: not a permutation of 0..299",
    ]


def test_all_value_faults_at_once() -> None:
    made = everything()
    wanted = {
        f"{A}.{BREAKERS[name](made.tensors)}"
        for name in (
            "bits_do_not_sum",
            "kept_expert_with_bits",
            "order_out_of_range",
            "negative_rank",
            "kept_expert_with_rank",
            "gate_up_basis_scale=nan",
            "down_lowrank_out=-inf",
        )
    }
    assert set(check_values(A, made.layer, 16, made.tensors)) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_flipped_bit_of_the_block_bits_is_found(form: str) -> None:
    made = build_form(form)
    for name in made.layer.projections:
        bits = made.tensors[f"{name}_bits"]
        for expert in range(bits.shape[0]):
            for block in range(bits.shape[1]):
                for bit in range(8):
                    bits[expert, block] ^= 1 << bit
                    faults = check_values(A, made.layer, 16, made.tensors)
                    assert any(f.startswith(f"{A}.{name}_bits: ") for f in faults)
                    only = {n: made.tensors[f"{n}_bits"] for n in made.layer.projections}
                    assert check_bits(A, made.layer, only) == faults
                    bits[expert, block] ^= 1 << bit
    assert check_values(A, made.layer, 16, made.tensors) == []


def test_partial_blocks_of_every_expert_are_looked_at() -> None:
    made = build_layer({"gate_up": Plan(bits=(1, 2)), "down": Plan(bits=(3,))}, block_size=32)
    ends = made.tensors["gate_up_bits"].sum(1).cumsum(0)
    for end in ends.tolist():
        made.tensors["gate_up_codes"][end - 1, 3] ^= 1 << 8
        (fault,) = check_values(A, made.layer, 32, made.tensors)
        assert "beyond component 7" in fault
        made.tensors["gate_up_codes"][end - 1, 3] ^= 1 << 8
    # A word of a full block may hold anything.
    made.tensors["gate_up_codes"][0, 3] ^= 1 << 8
    assert check_values(A, made.layer, 32, made.tensors) == []


def test_a_last_block_without_bits_has_no_words_to_check() -> None:
    made = build_layer({"gate_up": Plan(bits=(8,)), "down": Plan(bits=(8,))})
    for name in made.layer.projections:
        bits, codes = made.tensors[f"{name}_bits"], made.tensors[f"{name}_codes"]
        ends = bits.sum(1).cumsum(0)
        keep = torch.ones(len(codes), dtype=torch.bool)
        for end in ends.tolist():
            keep[end - 8 : end] = False
        bits[:, -1] = 0
        made.tensors[f"{name}_codes"] = codes[keep]
    projections = {
        n: p.model_copy(update={"code_rows": len(made.tensors[f"{n}_codes"])})
        for n, p in made.layer.projections.items()
    }
    made = replace(made, layer=made.layer.model_copy(update={"projections": projections}))
    made.tensors["down_codes"].fill_(-1)
    assert check_values(A, made.layer, 16, made.tensors) == []
