"""Loading a rank's shard, as vLLM's loaders drive it: any order, full tensors, names in either of two spellings."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError, FormatError
from bitsmoe_kernels.format.schema import Layer, Projection
from bitsmoe_kernels.format.validate import check_values
from bitsmoe_kernels.reference import LayerWeights, moe_forward
from bitsmoe_kernels.sharding import shard_layer
from bitsmoe_vllm.weight_loading import LayerLoader, dummy_tensors
from builders import FORMS, build_form
from pretended_cuda import pretended_cuda

G = 16
PREFIX = "model.layers.0.mlp.experts"


def loaded(layer: Layer, tensors: dict[str, Tensor], **shard: object) -> tuple[LayerLoader, torch.nn.Module]:
    loader, module = LayerLoader(PREFIX, layer, G, **shard), torch.nn.Module()  # type: ignore[arg-type]
    loader.register(module)
    names = list(loader.load_weights((name, tensors[name]) for name in sorted(tensors)))
    assert names == sorted(tensors)
    return loader, module


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shard", [{}, {"tp_rank": 1, "tp_size": 2}, {"experts": [3, 0]}])
def test_parameters_are_the_shard(form: str, shard: dict[str, object]) -> None:
    made = build_form(form, block_size=G)
    loader, module = loaded(made.layer, made.tensors, **shard)
    want_layer, want = shard_layer(made.layer, made.tensors, G, **shard)  # type: ignore[arg-type]
    assert loader.shard == want_layer
    assert loader.missing() == []
    got = dict(module.named_parameters())
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


def test_both_ways_vllm_hands_over_a_tensor() -> None:
    made = build_form("natural", block_size=G)
    loader, module = LayerLoader(PREFIX, made.layer, G), torch.nn.Module()
    loader.register(module)
    first, *rest = made.tensors
    parameter = module.get_parameter(first)
    parameter.weight_loader(parameter, made.tensors[first])  # type: ignore[operator]
    assert list(loader.load_weights((f"routed_experts.{n}", made.tensors[n]) for n in rest)) == rest
    assert loader.shard == made.layer


def test_missing_tensors_are_all_named() -> None:
    made = build_form("shared_basis", block_size=G)
    loader = LayerLoader(PREFIX, made.layer, G)
    loader.register(torch.nn.Module())
    absent = {"gate_up_basis", "down_bits"}
    list(loader.load_weights((n, t) for n, t in made.tensors.items() if n not in absent))
    assert loader.shard is None
    faults = loader.missing()
    assert len(faults) == 2
    for name in absent:
        assert any(f"{PREFIX}.{name} is missing" in f for f in faults)


def test_unknown_tensor() -> None:
    made = build_form("natural", block_size=G)
    loader = LayerLoader(PREFIX, made.layer, G)
    with pytest.raises(BitsmoeError, match=rf"{PREFIX}\.0\.gate_proj\.weight, which"):
        list(loader.load_weights([("0.gate_proj.weight", torch.zeros(1))]))


def test_a_parameter_of_the_router_beside_the_experts() -> None:
    """vLLM's RoutedExperts shares it with the router (Laguna)."""
    made = build_form("natural", block_size=G)
    module = torch.nn.Module()
    module.e_score_correction_bias = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    bias = module.e_score_correction_bias
    loader = LayerLoader(PREFIX, made.layer, G)
    loader.register(module)
    tensors = {**made.tensors, "e_score_correction_bias": torch.arange(4.0)}
    assert set(loader.load_weights(tensors.items())) == tensors.keys()
    assert not loader.missing()
    assert bias.tolist() == [0, 1, 2, 3]


def test_wrong_shapes_and_dtypes_are_all_named() -> None:
    made = build_form("natural", block_size=G)
    tensors = dict(made.tensors)
    tensors["down_codes"] = tensors["down_codes"][:-1]
    tensors["gate_up_component_scale"] = tensors["gate_up_component_scale"].float()
    with pytest.raises(FormatError) as caught:
        loaded(made.layer, tensors)
    assert len(caught.value.faults) == 2
    assert "down_codes is int16" in str(caught.value)
    assert "gate_up_component_scale is float32" in str(caught.value)


def test_wrong_values() -> None:
    made = build_form("natural", block_size=G)
    tensors = dict(made.tensors)
    tensors["down_bits"] = tensors["down_bits"].clone()
    tensors["down_bits"][0, 0] ^= 1
    with pytest.raises(FormatError, match="down_bits: block bits sum to"):
        loaded(made.layer, tensors)


@pytest.mark.parametrize("form", FORMS)
def test_dummy_tensors_are_valid(form: str) -> None:
    layer = build_form(form, block_size=G).layer
    tensors = dummy_tensors(layer, G)
    specs = layer.tensor_specs(G)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {
        n: (s.dtype, s.shape) for n, s in specs.items()
    }
    assert check_values(PREFIX, layer, G, tensors) == []
    x = torch.ones(3, layer.hidden_size)
    ids = torch.tensor([[0, 1], [2, 3], [3, 0]])
    y = moe_forward(LayerWeights(layer, G, tensors), x, torch.full((3, 2), 0.5), ids)
    assert y.isfinite().all()


def test_dummy_widths_are_mixed() -> None:
    E, C, F = 3, 20 * G, 40
    projection = Projection(code_rows=E * 20 * 2 + 7)
    layer = Layer(num_experts=E, hidden_size=C, intermediate_size=F // 2, projections={
        "gate_up": projection, "down": Projection(code_rows=0)
    })  # fmt: skip
    tensors = dummy_tensors(layer, G)
    assert check_values(PREFIX, layer, G, tensors) == []
    assert set(range(5)) <= set(tensors["gate_up_bits"].flatten().tolist())
    assert int(tensors["gate_up_bits"].sum()) == projection.code_rows
    assert not tensors["down_bits"].any()


def test_parameters_outlive_the_file(tmp_path: Path) -> None:
    """What the loader keeps does not point into the mapped checkpoint, whole layer or not."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    made = build_form("natural", block_size=G)
    save_file(made.tensors, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        mapped = {name: file.get_tensor(name) for name in made.tensors}
    _, module = loaded(made.layer, mapped)
    places = {t.data_ptr() for t in mapped.values()}
    assert all(p.numel() and p.data_ptr() not in places for p in module.parameters())


@pytest.mark.slow
def test_tensors_may_arrive_on_the_gpu() -> None:
    """As fastsafetensors and instanttensor hand them over."""
    made = build_form("extras", block_size=G)
    _, want = loaded(made.layer, made.tensors, tp_rank=1, tp_size=2)
    with pretended_cuda():
        there = {name: tensor.to("cuda") for name, tensor in made.tensors.items()}
        assert {t.device.type for t in there.values()} == {"cuda"}
        _, got = loaded(made.layer, there, tp_rank=1, tp_size=2)
    for name, parameter in want.named_parameters():
        assert torch.equal(got.get_parameter(name), parameter)


def test_a_model_is_not_kept_alive_by_the_loaders_that_vllm_keeps() -> None:
    made = build_form("natural", block_size=G)
    _, module = loaded(made.layer, made.tensors)
    loaders = [p.weight_loader for p in module.parameters()]  # type: ignore[attr-defined]
    alive = weakref.ref(module)
    del module
    assert alive() is None
    assert loaders


def test_a_second_set_of_tensors_goes_where_it_is_told() -> None:
    made = build_form("natural", block_size=G)
    loader, module = loaded(made.layer, made.tensors)
    replaced: list[tuple[Layer, dict[str, Tensor]]] = []
    loader.reload_into(lambda layer, tensors: replaced.append((layer, tensors)))
    before = {name: p.clone() for name, p in module.named_parameters()}
    other = {n: t * 2 if n.endswith("feature_scale") else t for n, t in made.tensors.items()}
    *most, last = other
    list(loader.load_weights((n, other[n]) for n in most))
    assert loader.missing() == [f"tensor {PREFIX}.{last} is missing (expected {loader.specs[last]})"]
    list(loader.load_weights([(last, other[last])]))
    assert loader.missing() == []
    ((layer, tensors),) = replaced
    assert layer == made.layer
    assert all(torch.equal(tensors[n], other[n]) for n in other)
    assert all(torch.equal(module.get_parameter(n), before[n]) for n in before)
