"""The torch reference against SPEC.md's formulas in float64, with ugly routings."""

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import bitsmoe_kernels.reference as reference
from bitsmoe_kernels.format.schema import ProjectionName
from bitsmoe_kernels.reference import LayerWeights, ProjectionWeights, moe_forward
from bruteforce import array, assert_close, biases, expert_weights, matrices, moe, weights
from builders import FORMS, MadeLayer, Plan, build_form, build_layer, layers
from pretended_cuda import pretended_cuda

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def wrap(made: MadeLayer) -> LayerWeights:
    return LayerWeights(made.layer, made.block_size, made.tensors)


def brute(made: MadeLayer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return expert_weights(made.layer.model_dump(mode="json"), made.block_size, made.tensors)


def whole(made: MadeLayer, *call: torch.Tensor) -> np.ndarray:
    """What the layer should give."""
    bias = biases(made.layer.model_dump(mode="json"), made.tensors)
    return moe(brute(made), *call, hidden_act=made.layer.hidden_act, bias=bias)


def tokens(T: int, H: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(seed)).to(dtype)


ROUTINGS: dict[str, tuple[list[list[int]], int]] = {
    # name: (topk_ids, experts)
    "each its own": ([[0, 1], [2, 3], [1, 2], [3, 0]], 4),
    "one token": ([[2, 0]], 4),
    "all tokens to one expert": ([[3]] * 9, 4),
    "all experts for all tokens": ([[0, 1, 2, 3]] * 3, 4),
    "most experts empty": ([[1, 1], [1, 1]], 4),
    "the same expert twice for a token": ([[2, 2, 0], [0, 0, 0]], 4),
    "negative ids": ([[-1, 2], [-1, -1], [0, -5]], 4),
    "ids of no expert": ([[0, 4], [5, 3], [2**31 - 1, 1], [4, -1]], 4),
    "nobody is routed": ([[-1, -1]] * 2, 4),
    "only the last expert": ([[3, -1]] * 5, 4),
    "a single expert": ([[0]] * 3, 1),
}


def route(name: str, seed: int = 1) -> tuple[Tensor, Tensor, int]:
    ids, experts = ROUTINGS[name]
    topk_ids = torch.tensor(ids, dtype=torch.int32)
    # Weights of either sign, not normalised: the layer must take them as they are.
    topk_weights = torch.randn(topk_ids.shape, generator=torch.Generator().manual_seed(seed))
    return topk_weights, topk_ids, experts


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block_size", [16, 32])
def test_matrix_is_the_real_value_rounded_once(form: str, block_size: int) -> None:
    made = build_form(form, block_size=block_size)
    for name in made.layer.projections:
        stored = matrices(made.layer.model_dump(mode="json"), name, block_size, made.tensors)
        ours = ProjectionWeights(made.layer, name, block_size, made.tensors)
        for e in range(made.layer.num_experts):
            got = ours.matrix(e)
            if (order := made.layer.projections[name].order) != "none":
                rows = made.tensors[f"{name}_order"]
                got, unordered = torch.zeros_like(got), got
                for i, c in enumerate((rows if order == "shared" else rows[e]).tolist()):
                    got[c] = unordered[i]
            assert got.dtype == torch.float32
            assert torch.equal(got, torch.from_numpy(stored[e]).float())


def check_projection(made: MadeLayer, name: ProjectionName) -> None:
    ours = ProjectionWeights(made.layer, name, made.block_size, made.tensors)
    want = weights(made.layer.model_dump(mode="json"), name, made.block_size, made.tensors)
    x = tokens(5, want.shape[2])
    z = ours.project(x)
    assert z.shape == (5, ours.layer.components(name) if ours.spec.component_axis == "input" else want.shape[2])
    for e in range(made.layer.num_experts):
        w = ours.weight(e)
        assert w.dtype == torch.float32
        assert w.is_contiguous()
        assert_close(w, want[e])
        bias = array(made.tensors[f"{name}_shift"][e]) if ours.spec.bias else 0.0
        assert_close(ours.forward(e, x, z), array(x) @ want[e].T + bias)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block_size", [16, 32])
def test_projections_of_each_form(form: str, block_size: int) -> None:
    made = build_form(form, block_size=block_size)
    for name in made.layer.projections:
        check_projection(made, name)


@given(made=layers())
def test_projections_of_any_layer(made: MadeLayer) -> None:
    for name in made.layer.projections:
        check_projection(made, name)


@pytest.mark.parametrize("form", FORMS)
def test_expert_weights_are_gate_up_down(form: str) -> None:
    made = build_form(form)
    for e in range(4):
        for got, want in zip(wrap(made).expert_weights(e), brute(made), strict=True):
            assert_close(got, want[e])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_moe_forward(form: str, routing: str) -> None:
    topk_weights, topk_ids, experts = route(routing)
    made = build_form(form, num_experts=experts)
    x = tokens(len(topk_ids), 40)
    got = moe_forward(wrap(made), x, topk_weights, topk_ids)
    assert got.dtype == torch.float32
    assert_close(got, whole(made, x, topk_weights, topk_ids))


@given(made=layers(max_experts=3, max_side=40))
def test_moe_forward_of_any_layer(made: MadeLayer) -> None:
    E = made.layer.num_experts
    topk_ids = (torch.arange(10) % (E + 2)).reshape(5, 2) - 1
    topk_weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(0))
    x = tokens(5, made.layer.hidden_size)
    # Small layers of few bits and random bases can cancel: the bound is on the size of what is summed up.
    want = whole(made, x, topk_weights, topk_ids)
    assert_close(moe_forward(wrap(made), x, topk_weights, topk_ids), want, 3e-5, 2e-5)


# One rounding to the dtype at the end: half a unit in the last place, relative.
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}


@pytest.mark.parametrize("dtype", HALF_ULP)
@pytest.mark.parametrize("weight_dtype", HALF_ULP)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_dtypes(dtype: torch.dtype, weight_dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    made = build_form("extras")
    topk_weights, topk_ids, _ = route("each its own")
    x, topk_weights = tokens(4, 40, dtype=dtype), topk_weights.to(weight_dtype)
    got = moe_forward(wrap(made), x, topk_weights, topk_ids.to(ids_dtype))
    assert got.dtype == dtype
    want = whole(made, x, topk_weights, topk_ids)
    error = np.abs(array(got) - want)
    assert (error <= HALF_ULP[dtype] * np.abs(want) + 1e-5 * np.abs(want).max()).all()


def test_no_tokens() -> None:
    made = build_form("shared_basis")
    got = moe_forward(wrap(made), torch.empty(0, 40), torch.empty(0, 2), torch.empty(0, 2, dtype=torch.int32))
    assert got.shape == (0, 40)


def test_columns_of_a_wider_tensor_as_input() -> None:
    made = build_form("shared_basis")
    topk_weights, topk_ids, _ = route("each its own")
    wide = tokens(4, 80)
    x = wide[:, ::2]
    assert_close(moe_forward(wrap(made), x, topk_weights, topk_ids), whole(made, x, topk_weights, topk_ids))


@pytest.mark.parametrize(
    "expert_map", [[0, 1, 2, 3], [-1, 0, -1, 1], [3, 2, 1, 0], [-1, -1, -1, -1], [4, 0, 2**31 - 1, 1], [0, 1]]
)
@pytest.mark.parametrize("form", ["natural", "paper", "extras"])
def test_expert_map(form: str, expert_map: list[int]) -> None:
    made = build_form(form)
    local = torch.tensor(expert_map, dtype=torch.int32)
    for routing in ("each its own", "negative ids", "ids of no expert", "the same expert twice for a token"):
        topk_weights, topk_ids, _ = route(routing)
        x = tokens(len(topk_ids), 40)
        got = moe_forward(wrap(made), x, topk_weights, topk_ids, local)
        assert_close(got, whole(made, x, topk_weights, topk_ids, local))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e38])
def test_a_poisoned_token_spoils_itself_only(form: str, poison: float) -> None:
    made = build_form(form)
    topk_ids = torch.tensor([[0, 1], [1, 2], [0, 1], [2, 3]])
    topk_weights = torch.rand(4, 2, generator=torch.Generator().manual_seed(0))
    x = tokens(4, 40)
    clean = moe_forward(wrap(made), x, topk_weights, topk_ids)
    x[1, 7] = poison
    got = moe_forward(wrap(made), x, topk_weights, topk_ids)
    others = [0, 2, 3]
    assert torch.equal(got[others], clean[others])
    if form != "zero" and not np.isfinite(poison):
        assert not got[1].isfinite().all()


def test_a_poisoned_routing_weight_without_an_expert_has_no_effect() -> None:
    made = build_form("natural")
    topk_ids = torch.tensor([[0, -1], [-1, 2], [4, 1], [3, 2**32 + 1], [2**62, 2**31], [2**63 - 1, -(2**63)]])
    nan, inf = float("nan"), float("inf")
    topk_weights = torch.tensor([[0.5, nan], [inf, 0.25], [nan, 1], [1, inf], [inf, nan], [nan, inf]])
    x = tokens(6, 40)
    x[4:] = nan
    got = moe_forward(wrap(made), x, topk_weights, topk_ids)
    clean = torch.nan_to_num(topk_weights, 0, 0)
    assert torch.equal(got, moe_forward(wrap(made), x, clean, topk_ids.clamp(-1, 4)))
    assert got[:4].isfinite().all()
    assert not got[4:].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mapped", [False, True])
def test_the_expert_of_any_id(dtype: torch.dtype, mapped: bool) -> None:
    """Of 3 experts here and 5 in all, against a table."""
    end = torch.iinfo(dtype)
    places = [2, -1, 0, 3, 1] if mapped else [0, 1, 2]
    ids = [0, 1, 2, 3, 4, 5, 6, -1, -2, 255, 256, 2**31 - 1, -(2**31), end.min, end.max, end.max // 2]
    want = [places[i] if 0 <= i < len(places) and 0 <= places[i] < 3 else -1 for i in ids]
    expert_map = torch.tensor(places, dtype=dtype) if mapped else None
    got = reference.expert_of_slots(torch.tensor([ids, ids[::-1]], dtype=dtype), 3, expert_map)
    assert got.dtype == torch.int64
    assert got.tolist() == [want, want[::-1]]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_on_a_gpu_is_computed_there(form: str) -> None:
    made = build_form(form)
    topk_weights, topk_ids, _ = route("ids of no expert")
    given = [tokens(len(topk_ids), 40), topk_weights, topk_ids, torch.tensor([2, -1, 0, 1], dtype=torch.int32)]
    expected, expected_weights = moe_forward(wrap(made), *given), wrap(made).expert_weights(1)
    with pretended_cuda():
        there = LayerWeights(made.layer, made.block_size, {name: t.cuda() for name, t in made.tensors.items()})
        got, got_weights = moe_forward(there, *(v.cuda() for v in given)), there.expert_weights(1)
        assert got.is_cuda
        assert torch.equal(got.cpu(), expected)
        for w, want in zip(got_weights, expected_weights, strict=True):
            assert w.is_cuda
            assert torch.equal(w.cpu(), want)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_are_left_alone(form: str) -> None:
    made = build_form(form)
    topk_weights, topk_ids, _ = route("negative ids")
    x = tokens(3, 40)
    given_tensors = [x, topk_weights, topk_ids, *made.tensors.values()]
    before = [t.clone() for t in given_tensors]
    moe_forward(wrap(made), x, topk_weights, topk_ids)
    assert all(torch.equal(a, b) for a, b in zip(given_tensors, before, strict=True))


def test_scales_of_blocks_without_bits_have_no_effect() -> None:
    made = build_layer({"gate_up": Plan(bits=(0, 2)), "down": Plan(bits=(0, 3))})
    want = brute(made)
    for name in made.layer.projections:
        bits = made.tensors[f"{name}_bits"]
        C = made.layer.components(name)
        absent = bits.repeat_interleave(16, 1)[:, :C] == 0
        assert absent.any()
        made.tensors[f"{name}_component_scale"][absent] = 60000.0
    for e in range(4):
        for got, wanted in zip(wrap(made).expert_weights(e), want, strict=True):
            assert_close(got, wanted[e])


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Addresses of the codes the reference unpacks."""
    seen: list[int] = []
    unpack = reference.unpack_codes

    def spy(words: Tensor, bits: Tensor, components: int, block_size: int) -> Tensor:
        seen.append(words.data_ptr())
        return unpack(words, bits, components, block_size)

    monkeypatch.setattr(reference, "unpack_codes", spy)
    return seen


@pytest.mark.parametrize(("form", "matrices_per_expert"), [("natural", 2), ("shared_basis", 2), ("paper", 3)])
def test_only_activated_experts_are_dequantized(unpacked: list[int], form: str, matrices_per_expert: int) -> None:
    made = build_form(form, num_experts=6)
    made.tensors["down_component_scale"][[0, 2, 5]] = float("nan")
    topk_ids = torch.tensor([[1, 4], [4, 3], [-1, 1], [4, 4]])
    got = moe_forward(wrap(made), tokens(4, 40), torch.ones(4, 2), topk_ids)
    assert got.isfinite().all()
    assert len(unpacked) == matrices_per_expert * 3
    assert len(set(unpacked)) == len(unpacked)


def test_experts_elsewhere_are_not_dequantized(unpacked: list[int]) -> None:
    made = build_form("natural", num_experts=2)
    expert_map = torch.tensor([-1, 0, -1, 1, -1])
    moe_forward(wrap(made), tokens(3, 40), torch.ones(3, 2), torch.tensor([[0, 2], [3, 4], [3, 0]]), expert_map)
    assert len(unpacked) == 2


def test_kept_experts_are_not_unpacked(unpacked: list[int]) -> None:
    made = build_form("extras")  # expert 3 is kept in both projections
    moe_forward(wrap(made), tokens(2, 40), torch.ones(2, 1), torch.tensor([[3], [3]]))
    assert unpacked == []
