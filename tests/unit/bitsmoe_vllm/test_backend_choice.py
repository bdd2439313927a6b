"""Which path the plugin takes for a layer, and what it hands to it: the CUDA path's Python, on a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bitsmoe_kernels._cpu import library
from bitsmoe_kernels.backends.triton_moe import kernel_key, moe_kernels_op
from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.layout.pack import KernelLayer, to_kernel_layout
from bitsmoe_kernels.reference import LayerWeights, moe_forward
from builders import MadeLayer, build_form
from vllm_layer import SIZES, call, loaded, log_of, on_gpu


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the method says, formatted."""
    return log_of(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("capability", "kwidth"), [(80, 4), (90, 2), (120, 4)])
@pytest.mark.parametrize("form", ["natural", "shared_basis", "extras"])
def test_kernels_get_their_layout_and_nothing_else(
    form: str, capability: int, kwidth: int, dtype: torch.dtype, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[KernelLayer, Any]] = []

    def record(layer: KernelLayer, x: Any, weights: Any, ids: Any, expert_map: Any) -> torch.Tensor:
        calls.append((layer, expert_map))
        return torch.full_like(x, 7)

    import bitsmoe_kernels.backends.triton_launch

    monkeypatch.setattr(bitsmoe_kernels.backends.triton_launch, "moe_forward", record)
    on_gpu(monkeypatch, capability)
    made = build_form(form, **SIZES)
    method, module = loaded(made, dtype, monkeypatch)
    *_, y = call(method, module, dtype)
    assert torch.equal(y, torch.full_like(y, 7))
    ((layer, expert_map),) = calls
    assert expert_map is None
    expected = to_kernel_layout(LayerWeights(made.layer, made.block_size, made.tensors), dtype, kwidth)
    assert layer.static() == expected.static()
    assert layer.static()["kwidth"] == kwidth
    assert {k: v.tolist() for k, v in layer.tensors().items()} == {k: v.tolist() for k, v in expected.tensors().items()}
    # The file's layout is gone, so that weights are in memory once.
    assert {name.removeprefix("kernel_") for name, _ in module.named_parameters()} == set(expected.tensors())
    assert logged == [
        f"bitsmoe: routed experts are computed by Triton kernels: mixed-bit grouped GEMM for sm_{capability}, "
        f"{str(dtype).removeprefix('torch.')}"
    ]


@pytest.mark.parametrize(
    ("form", "dtype", "reason"),
    [
        ("natural", torch.float32, "activations are float32"),
        ("paper", torch.bfloat16, "components on the output side"),
    ],
)
def test_what_kernels_cannot_do_runs_on_torch_and_says_so(
    form: str, dtype: torch.dtype, reason: str, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(monkeypatch, 90)
    made = build_form(form, **SIZES)
    method, module = loaded(made, dtype, monkeypatch)
    x, weights, ids, y = call(method, module, dtype)
    expected = moe_forward(LayerWeights(made.layer, made.block_size, made.tensors), x, weights, ids)
    assert torch.equal(y, expected)
    (said,) = logged
    assert said.startswith("WARNING ")
    assert "REFERENCE path" in said
    assert reason in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["natural", "shared_basis", "extras"])
def test_on_a_cpu_its_kernels_run_and_are_reported(
    form: str, dtype: torch.dtype, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build_form(form, **SIZES)
    method, module = loaded(made, dtype, monkeypatch)
    x, weights, ids, y = call(method, module, dtype)
    # One block of bytes, and nothing of the file's layout beside it.
    ((name, block),) = module.named_parameters()
    assert name == "cpu_layer"
    assert torch.equal(y, library.forward(block, x, weights, ids))
    assert logged == [
        "bitsmoe: routed experts are computed by CPU kernels: mixed-bit dot products by "
        f"{library.TITLES[library.best()]}, {str(dtype).removeprefix('torch.')}"
    ]


def test_ranks_on_cpus_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made, parts = build_form("shared_basis", **SIZES), []
    for expert_map in (torch.tensor([1, -1, 0, -1]), torch.tensor([-1, 0, -1, 1])):
        method, module = loaded(made, torch.float32, monkeypatch, expert_map=expert_map.int())
        x, weights, ids, y = call(method, module, torch.float32)
        parts.append(y)
    want = moe_forward(LayerWeights(made.layer, made.block_size, made.tensors), x, weights, ids)
    torch.testing.assert_close(parts[0] + parts[1], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "missing", "reason"),
    [
        ("paper", False, "its down projection has components on the output side (--basis paper)"),
        ("natural", True, "they were not compiled when bitsmoe-vllm was installed"),
    ],
)
def test_what_cpu_kernels_cannot_do_the_reference_does_and_says_so(
    form: str, missing: bool, reason: str, logged: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if missing:
        monkeypatch.setattr(library, "PATH", tmp_path / "absent.so")
        monkeypatch.delenv("BITSMOE_CPU_LIBRARY", raising=False)
        monkeypatch.setattr(library, "why_not", library.why_not.__wrapped__)
    made = build_form(form, **SIZES)
    method, module = loaded(made, torch.float32, monkeypatch)
    x, weights, ids, y = call(method, module, torch.float32)
    assert torch.equal(y, moe_forward(LayerWeights(made.layer, made.block_size, made.tensors), x, weights, ids))
    (said,) = logged
    assert said.startswith(
        "WARNING bitsmoe: routed experts are computed by the torch reference path, on the CPU. CPU kernels cannot be "
        f"used: {reason}"
    )
    assert said.endswith("Do not judge speed by this.")


@pytest.mark.parametrize("way", ["parameters", "module"])
@pytest.mark.parametrize("capability", [None, 90])
def test_vllms_reload_writes_new_weights_into_the_same_memory(
    way: str, capability: int | None, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `reload_weights` does it, and a server that wakes from sleep of level 2. CUDA graphs hold addresses."""
    from vllm.model_executor.model_loader import reload

    if capability is not None:
        on_gpu(monkeypatch, capability)
    made, dtype = build_form("extras", **SIZES), torch.bfloat16
    other = {n: t * 2 if n.endswith("feature_scale") else t for n, t in made.tensors.items()}
    method, module = loaded(made, dtype, monkeypatch, before_loading=reload.record_metadata_for_reloading)
    _, want = loaded(MadeLayer(made.layer, made.block_size, other, {}), dtype, monkeypatch)
    addresses = {name: p.data_ptr() for name, p in module.named_parameters()}
    assert any(not torch.equal(p, want.get_parameter(n)) for n, p in module.named_parameters())

    module.quant_method = method
    reload.initialize_layerwise_reload(module)
    if way == "module":
        list(module.load_weights(other.items()))
    else:
        parameters = dict(module.named_parameters())
        for name, tensor in other.items():
            parameters[name].weight_loader(parameters[name], tensor)
    reload.finalize_layerwise_reload(module, None)

    assert {name: p.data_ptr() for name, p in module.named_parameters()} == addresses
    assert all(torch.equal(p, want.get_parameter(n)) for n, p in module.named_parameters())
    method.process_weights_after_loading(module)  # some callers do it themselves: nothing is left to do


def test_a_reload_of_other_bit_widths_is_refused(logged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bits in the whole layer, but not in the first rank's part of it."""
    made = build_form("natural", **SIZES)
    method, module = loaded(made, torch.float32, monkeypatch, tp_size=2)
    tensors = dict(made.tensors)
    bits = tensors["down_bits"] = tensors["down_bits"].clone()
    expert = int(((bits[:, 0] > 0) & (bits[:, 1] < 8)).nonzero()[0])
    bits[expert, 0] -= 1
    bits[expert, 1] += 1
    before = {name: p.clone() for name, p in module.named_parameters()}
    with pytest.raises(BitsmoeError, match=r"experts: the weights to be loaded have other bit-widths .* server anew"):
        list(method.loader.load_weights(tensors.items()))
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_the_fake_of_the_kernel_op_has_the_real_ones_shape() -> None:
    """torch.compile traces with it."""
    made = build_form("natural", **SIZES)
    layer = to_kernel_layout(LayerWeights(made.layer, made.block_size, made.tensors), torch.bfloat16, 2)
    with torch.device("meta"):
        x = torch.empty(3, SIZES["hidden_size"], dtype=torch.bfloat16)
        ids, weights = torch.empty(3, 2, dtype=torch.int32), torch.empty(3, 2)
    y = moe_kernels_op(x, weights, ids, None, [t.to("meta") for t in layer.tensors().values()], kernel_key(layer))
    assert (y.shape, y.dtype, y.is_contiguous()) == (x.shape, x.dtype, True)
