"""A rank's part of a layer is a valid layer, and the parts of all ranks add up to the whole one."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.schema import Layer, TensorSpec
from bitsmoe_kernels.format.validate import check_values
from bitsmoe_kernels.reference import LayerWeights, moe_forward
from bitsmoe_kernels.sharding import ParallelSizes, check_tensor_parallel, parallel_sizes, shard_channels, shard_layer
from bruteforce import Array, assert_close, biases, expert_weights, moe
from builders import FORMS, REPO, MadeLayer, Plan, build_form, build_layer, layers
from pretended_cuda import pretended_cuda
from tools.parallel_sizes import published_table

SIZES = [(16, 56), (16, 80), (16, 7), (32, 56), (32, 96)]
"""Block size and intermediate size: partial last blocks, whole ones, a single partial one."""


def shard(
    made: MadeLayer, tp_rank: int = 0, tp_size: int = 1, experts: Sequence[int] | None = None
) -> tuple[Layer, dict[str, Tensor]]:
    """`shard_layer`, with every promise about its result checked."""
    layer, tensors = shard_layer(made.layer, made.tensors, made.block_size, tp_rank, tp_size, experts)
    specs = layer.tensor_specs(made.block_size)
    assert {n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in tensors.items()} == specs
    assert all(t.is_contiguous() for t in tensors.values())
    assert check_values("shard", layer, made.block_size, tensors) == []
    # model_copy skips validation: the shard's schema must stand on its own.
    assert Layer.model_validate(layer.model_dump(mode="json")) == layer
    return layer, tensors


def whole(made: MadeLayer, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Array:
    layer = made.layer.model_dump(mode="json")
    weights, bias = expert_weights(layer, made.block_size, made.tensors), biases(layer, made.tensors)
    return moe(weights, x, topk_weights, topk_ids, hidden_act=made.layer.hidden_act, bias=bias)


def inputs(made: MadeLayer, T: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens for all experts, one of them twice, and one slot for none."""
    gen = torch.Generator().manual_seed(0)
    E = made.layer.num_experts
    topk_ids = torch.arange(T * 3).reshape(T, 3) % E
    topk_ids[1, 2] = topk_ids[1, 0]
    topk_ids[T - 1, 1] = -1
    return torch.randn(T, made.layer.hidden_size, generator=gen), torch.rand(T, 3, generator=gen), topk_ids


def expert_map(experts: Sequence[int], total: int) -> Tensor:
    local = torch.full((total,), -1, dtype=torch.int32)
    local[list(experts)] = torch.arange(len(experts), dtype=torch.int32)
    return local


def check_sum(made: MadeLayer, tp_size: int, expert_sets: Sequence[Sequence[int]] | None = None) -> None:
    """The sum over all ranks of tensor and expert parallelism against the whole layer."""
    x, topk_weights, topk_ids = inputs(made)
    total = torch.zeros_like(x)
    sets: Sequence[Sequence[int] | None] = expert_sets or [None]
    for rank in range(tp_size):
        for experts in sets:
            layer, tensors = shard(made, rank, tp_size, experts)
            local = None if experts is None else expert_map(experts, made.layer.num_experts)
            total += moe_forward(LayerWeights(layer, made.block_size, tensors), x, topk_weights, topk_ids, local)
    assert_close(total, whole(made, x, topk_weights, topk_ids), 2e-5, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("block_size", "intermediate_size"), SIZES)
def test_all_tensor_parallel_sizes(form: str, block_size: int, intermediate_size: int) -> None:
    made = build_form(form, block_size=block_size, intermediate_size=intermediate_size)
    for tp_size in range(1, -(-intermediate_size // block_size) + 1):
        check_sum(made, tp_size)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "expert_sets",
    [
        [[0, 1], [2, 3]],
        [[0], [1], [2], [3]],
        [[3, 1], [2, 0]],  # any local order
        [[1], [0, 2, 3]],
    ],
)
def test_expert_parallelism(form: str, expert_sets: list[list[int]]) -> None:
    check_sum(build_form(form), 1, expert_sets)


@pytest.mark.parametrize("form", FORMS)
def test_tensor_and_expert_parallelism_together(form: str) -> None:
    check_sum(build_form(form), 3, [[2, 0], [1, 3]])


@pytest.mark.slow
@given(made=layers(max_experts=3, max_side=50), tp=st.integers(1, 4), split=st.integers(0, 3))
def test_any_layer(made: MadeLayer, tp: int, split: int) -> None:
    E = made.layer.num_experts
    tp_size = min(tp, -(-made.layer.intermediate_size // made.block_size))
    expert_sets = [s for s in (list(range(split, E)), list(range(min(split, E)))) if s]
    check_sum(made, tp_size, expert_sets)


@pytest.mark.parametrize("form", FORMS)
def test_one_rank_gets_everything_as_it_is(form: str) -> None:
    made = build_form(form)
    layer, tensors = shard(made)
    assert layer == made.layer
    assert tensors.keys() == made.tensors.keys()
    assert all(torch.equal(tensors[name], made.tensors[name]) for name in tensors)


@pytest.mark.parametrize("form", FORMS)
def test_expert_subset_holds_those_experts(form: str) -> None:
    made = build_form(form)
    layer, tensors = shard(made, experts=[3, 0])
    ours = LayerWeights(layer, 16, tensors)
    for local, expert in enumerate([3, 0]):
        both = zip(
            ours.expert_weights(local), LayerWeights(made.layer, 16, made.tensors).expert_weights(expert), strict=True
        )
        assert all(torch.equal(a, b) for a, b in both)


@pytest.mark.parametrize("form", ["natural", "shared_basis", "apart", "extras"])
@pytest.mark.parametrize("tp_size", [2, 3])
def test_a_rank_holds_slices_of_the_weights(form: str, tp_size: int) -> None:
    made = build_form(form)
    full = LayerWeights(made.layer, 16, made.tensors)
    for rank in range(tp_size):
        layer, tensors = shard(made, rank, tp_size)
        channels = shard_channels(56, 16, rank, tp_size)
        ours = LayerWeights(layer, 16, tensors)
        for e in range(4):
            gate, up, down = full.expert_weights(e)
            for got, want in zip(
                ours.expert_weights(e), (gate[channels], up[channels], down[:, channels]), strict=True
            ):
                # Not torch.equal: with a basis the sums may run in another order.
                torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", [(0, 1, None), (1, 2, None), (0, 1, (3, 0)), (1, 3, (2, 1))])
def test_a_layer_on_a_gpu_is_split_there(form: str, part: tuple[int, int, Sequence[int] | None]) -> None:
    """Loaders may hand over tensors of the device."""
    made = build_form(form)
    layer, tensors = shard(made, *part)
    with pretended_cuda():
        there = {name: t.cuda() for name, t in made.tensors.items()}
        got_layer, got = shard_layer(made.layer, there, made.block_size, *part)
        assert got_layer == layer
        assert all(t.is_cuda for t in got.values())
        assert got.keys() == tensors.keys()
        assert all(torch.equal(got[name].cpu(), t) for name, t in tensors.items())


@pytest.mark.parametrize(("block_size", "intermediate_size"), SIZES)
def test_channels_are_dealt_block_by_block(block_size: int, intermediate_size: int) -> None:
    blocks = -(-intermediate_size // block_size)
    for tp_size in range(1, blocks + 1):
        ranks = [shard_channels(intermediate_size, block_size, r, tp_size).tolist() for r in range(tp_size)]
        assert sorted(c for rank in ranks for c in rank) == list(range(intermediate_size))
        assert all(rank == sorted(rank) and rank for rank in ranks)
        counts = [len({c // block_size for c in rank}) for rank in ranks]
        assert sum(counts) == blocks
        assert max(counts) - min(counts) <= 1


def test_codes_are_split_and_not_repeated() -> None:
    """What a natural layer stores for its channels is dealt out: the ranks' codes add up to the whole."""
    made = build_layer({"gate_up": Plan(), "down": Plan()}, intermediate_size=160)
    for tp_size in (2, 3, 7):
        parts = [shard(made, rank, tp_size)[1] for rank in range(tp_size)]
        for name in ("gate_up_codes", "down_codes"):
            assert sum(p[name].nbytes for p in parts) == made.tensors[name].nbytes


def test_the_whole_layer_is_left_alone() -> None:
    made = build_form("extras")
    before = {name: t.clone() for name, t in made.tensors.items()}
    _, tensors = shard(made, 1, 2, [2, 3])
    for t in tensors.values():
        t.zero_()
    assert made.tensors.keys() == before.keys()
    assert all(torch.equal(made.tensors[name], t) for name, t in before.items())


@pytest.mark.parametrize(("block_size", "intermediate_size"), SIZES)
def test_sizes_that_do_not_fit_name_those_that_do(block_size: int, intermediate_size: int) -> None:
    made = build_form("natural", block_size=block_size, intermediate_size=intermediate_size)
    blocks = -(-intermediate_size // block_size)
    for tp_size in range(1, blocks + 1):
        check_tensor_parallel(made.layer, block_size, tp_size, "here")
    with pytest.raises(BitsmoeError) as e:
        check_tensor_parallel(made.layer, block_size, blocks + 1, "here")
    assert str(e.value).startswith("here: ")
    for said in (f"tensor parallel size {blocks + 1}", f"intermediate_size {intermediate_size}", f"1 to {blocks}"):
        assert said in str(e.value)
    with pytest.raises(BitsmoeError, match=f"1 to {blocks}"):
        shard_layer(made.layer, made.tensors, block_size, 0, blocks + 1)


@pytest.mark.parametrize(
    ("intermediate_size", "block_size", "num_experts", "config", "sizes"),
    [
        (768, 16, 128, {"num_attention_heads": 32}, [1, 2, 4, 8, 16, 32]),
        (768, 32, 128, {"num_attention_heads": 48}, [1, 2, 3, 4, 6, 8, 12, 16, 24]),  # 24 blocks
        (40, 32, 4, {"num_attention_heads": 4}, [1, 2]),  # a partial block counts
        (256, 16, 3, {"num_attention_heads": 8}, [1, 2]),  # fewer experts than blocks; 3 does not divide 256
        (24, 32, 4, {"num_attention_heads": 8}, [1]),
        (64, 16, 8, {}, [1, 2, 4]),
        (768, 32, 16, {"num_key_value_heads": 4}, [1, 2, 4, 8, 12, 16]),  # heads are repeated for 8, not split in 3
        (768, 32, 16, {"num_key_value_heads": 4, "kv_lora_rank": 512}, [1, 2, 3, 4, 6, 8, 12, 16]),
        (768, 32, 16, {"vocab_size": 32_000}, [1, 2, 4, 8, 16]),
        (768, 32, 16, {"vocab_size": 150}, [1, 2, 3, 4, 6, 8, 12, 16]),  # padded to 192
        (768, 32, 16, {"shared_expert_intermediate_size": 100}, [1, 2, 4]),
        (768, 32, 16, {"n_shared_experts": 2, "moe_intermediate_size": 9}, [1, 2, 3, 6]),
        (768, 32, 16, {"linear_num_key_heads": 4, "linear_num_value_heads": 6}, [1, 2]),
        (768, 32, 4, {"intermediate_size": 50, "num_hidden_layers": 3}, [1, 2]),  # one of them dense
        (768, 32, 4, {"intermediate_size": 50, "num_hidden_layers": 2}, [1, 2, 3, 4]),
    ],
)
def test_tensor_parallel_sizes(
    intermediate_size: int, block_size: int, num_experts: int, config: dict[str, int], sizes: list[int]
) -> None:
    assert list(parallel_sizes(num_experts, intermediate_size, 2, block_size, config).tensor) == sizes


def test_experts_are_dealt_out_over_tensor_and_data_parallel_ranks() -> None:
    """Experts of 40 channels do not split in four, but there are eight of them."""
    config = {"num_attention_heads": 8, "num_hidden_layers": 3}
    assert parallel_sizes(8, 40, 3, 32, config) == ParallelSizes((1, 2), (1, 2, 4, 8), expert_ranks=8, stages=3)
    assert parallel_sizes(8, 40, 3, 32, config, data_parallel=2) == ParallelSizes((1,), (1, 2, 4), 8, 3)
    assert parallel_sizes(8, 40, 3, 32, config, data_parallel=16) == ParallelSizes((), (), 8, 3)


def test_the_docs_show_the_sizes_of_published_models() -> None:
    assert published_table() in (REPO / "docs" / "serving.md").read_text(encoding="utf-8")
