"""The custom op: the same numbers as the reference, a fake that agrees with it, and no graph break."""

import pytest
import torch
from torch import Tensor

from bitsmoe_kernels.backends.torch_reference import layout_key, moe_forward_op
from bitsmoe_kernels.reference import LayerWeights, moe_forward
from builders import FORMS, MadeLayer, build_form


def arguments(
    made: MadeLayer, T: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, list[Tensor], str]:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(T, made.layer.hidden_size, generator=gen).to(dtype)
    topk_ids = torch.randint(0, made.layer.num_experts, (T, 2), generator=gen, dtype=torch.int32)
    tensors = [made.tensors[name] for name in made.layer.tensor_specs(made.block_size)]
    key = layout_key(made.layer, made.block_size)
    return x, torch.rand(T, 2, generator=gen), topk_ids, None, tensors, key


def direct(made: MadeLayer, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, local: Tensor | None) -> Tensor:
    return moe_forward(LayerWeights(made.layer, made.block_size, made.tensors), x, topk_weights, topk_ids, local)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block_size", [16, 32])
def test_same_as_the_reference(form: str, block_size: int) -> None:
    made = build_form(form, block_size=block_size)
    args = arguments(made)
    assert torch.equal(moe_forward_op(*args), direct(made, *args[:4]))


def test_with_an_expert_map() -> None:
    made = build_form("natural")
    x, topk_weights, topk_ids, _, tensors, key = arguments(made)
    local = torch.tensor([2, -1, -1, 0], dtype=torch.int32)
    got = moe_forward_op(x, topk_weights, topk_ids, local, tensors, key)
    assert torch.equal(got, direct(made, x, topk_weights, topk_ids, local))


def test_ids_of_no_expert_are_skipped() -> None:
    made = build_form("natural")
    x, topk_weights, topk_ids, _, tensors, key = arguments(made)
    topk_ids[1], topk_ids[3, 0] = 2**31 - 1, 4
    topk_weights[1] = float("nan")
    got = moe_forward_op(x, topk_weights, topk_ids, None, tensors, key)
    assert torch.equal(got, direct(made, x, topk_weights, topk_ids.clamp(max=4), None))
    assert got.isfinite().all()
    assert got.any(1).tolist() == [True, False, True, True, True]
    # Beyond the map's end too.
    local = torch.tensor([2, -1], dtype=torch.int32)
    got = moe_forward_op(x, topk_weights, torch.where(topk_ids < 2, topk_ids, -1), local, tensors, key)
    assert torch.equal(moe_forward_op(x, topk_weights, topk_ids, local, tensors, key), got)


def test_layers_are_told_apart_by_their_layout() -> None:
    forms = [build_form(form, block_size=g) for form in FORMS for g in (16, 32)]
    keys = [layout_key(made.layer, made.block_size) for made in forms]
    assert len(set(keys)) == len(keys)
    for made, key in zip(forms, keys, strict=True):
        x, topk_weights, topk_ids, _, tensors, _ = arguments(made)
        got = moe_forward_op(x, topk_weights, topk_ids, None, tensors, key)
        assert torch.equal(got, direct(made, x, topk_weights, topk_ids, None))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["natural", "paper", "extras"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck(form: str, dtype: torch.dtype) -> None:
    x, topk_weights, topk_ids, _, tensors, key = arguments(build_form(form), dtype=dtype)
    local = torch.tensor([1, 0, -1, 2], dtype=torch.int32)
    torch.library.opcheck(moe_forward_op, (x, topk_weights, topk_ids, None, tensors, key))
    torch.library.opcheck(moe_forward_op, (x, topk_weights, topk_ids, local, tensors, key))


def test_opcheck_of_strided_and_empty_inputs() -> None:
    made = build_form("natural")
    x, topk_weights, topk_ids, _, tensors, key = arguments(made)
    strided = torch.randn(40, 5).T
    torch.library.opcheck(moe_forward_op, (strided, topk_weights, topk_ids, None, tensors, key))
    torch.library.opcheck(moe_forward_op, (x[:0], topk_weights[:0], topk_ids[:0], None, tensors, key))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(backend: str) -> None:
    made = build_form("shared_basis")

    def model(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, local: Tensor | None, t: list[Tensor]) -> Tensor:
        return moe_forward_op(x * 2, topk_weights.softmax(-1), topk_ids, local, t, key) + x

    key = layout_key(made.layer, made.block_size)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    # One graph serves other routings and token counts.
    for T in (5, 1, 9):
        args = arguments(made, T)[:5]
        torch.testing.assert_close(compiled(*args), model(*args), rtol=1e-5, atol=1e-6)
