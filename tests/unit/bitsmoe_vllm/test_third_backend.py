"""The recipe docs/developing/backend.md, followed to the letter: another backend is one new file and one entry."""

import difflib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from bitsmoe_kernels._cpu import library
from bitsmoe_kernels.backends import select
from bitsmoe_kernels.reference import LayerWeights, moe_forward
from bitsmoe_vllm.moe_method import local_experts
from builders import FORMS, REPO, build_form
from vllm_layer import SIZES, call, loaded, log_of, on_gpu

FILE, LINE = re.findall(r"```python\n(.*?)```", (REPO / "docs/developing/backend.md").read_text(encoding="utf-8"), re.S)
"""The code of the recipe: the new file, and the line of `select.py`."""


def title_of_best() -> str:
    return library.TITLES[library.best()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The new file, imported."""
    path = tmp_path_factory.mktemp("backends") / "plain_matrices.py"
    path.write_text(FILE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[path.stem]


@pytest.fixture
def registered(plain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The new class, its line in the list of backends."""
    before = inspect.getsource(select)
    after = re.sub(r"(?m)^BACKENDS: .*\n", LINE, before)
    changed = [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line.startswith(("+", "-"))]
    assert [line[0] for line in changed] == ["-", "+"]
    names: dict[str, Any] = {"__name__": "select_with_the_line", "PlainMatrices": plain.PlainMatrices}
    monkeypatch.setitem(sys.modules, "select_with_the_line", ModuleType("select_with_the_line"))
    exec(after, names)
    monkeypatch.setattr(select, "BACKENDS", names["BACKENDS"])
    return plain.PlainMatrices


@pytest.mark.parametrize("form", FORMS)
def test_vllm_computes_a_layer_with_it(form: str, registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = log_of(monkeypatch)
    made = build_form(form, **SIZES)
    method, module = loaded(made, torch.float32, monkeypatch)
    assert logged == ["bitsmoe: routed experts are computed by plain matrices, dequantized once"]
    assert [name for name, _ in module.named_parameters()] == ["plain_gate_up", "plain_down"]
    x, weights, ids, y = call(method, module, torch.float32)
    want = moe_forward(LayerWeights(made.layer, made.block_size, made.tensors), x, weights, ids)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)


def test_the_ranks_of_expert_parallelism_add_up(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, parts = build_form("shared_basis", **SIZES), []
    for expert_map in (torch.tensor([1, -1, 0, -1]), torch.tensor([-1, 0, -1, 1])):
        method, module = loaded(made, torch.float32, monkeypatch, expert_map=expert_map.int())
        assert len(module.plain_down) == len(local_experts(expert_map) or ()) == 2
        x, weights, ids, y = call(method, module, torch.float32)
        parts.append(y)
    want = moe_forward(LayerWeights(made.layer, made.block_size, made.tensors), x, weights, ids)
    torch.testing.assert_close(parts[0] + parts[1], want, rtol=1e-4, atol=1e-5)


def test_what_it_refuses_the_next_one_computes(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = log_of(monkeypatch)
    made = build_form("natural", **SIZES)
    method, module = loaded(made, torch.bfloat16, monkeypatch)
    x, weights, ids, y = call(method, module, torch.bfloat16)
    want = moe_forward(LayerWeights(made.layer, made.block_size, made.tensors), x, weights, ids)
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.01)
    assert logged == [
        f"bitsmoe: routed experts are computed by CPU kernels: mixed-bit dot products by {title_of_best()}, bfloat16. "
        "plain matrices cannot be used: activations are bfloat16, not float32"
    ]


def test_where_none_but_the_reference_is_left_both_reasons_are_said(
    registered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = log_of(monkeypatch)
    monkeypatch.setattr(library, "why_not", lambda: "they were not compiled")
    made = build_form("natural", **SIZES)
    method, module = loaded(made, torch.bfloat16, monkeypatch)
    x, weights, ids, y = call(method, module, torch.bfloat16)
    assert torch.equal(y, moe_forward(LayerWeights(made.layer, made.block_size, made.tensors), x, weights, ids))
    assert logged == [
        "WARNING bitsmoe: routed experts are computed by the torch reference path, on the CPU. plain matrices cannot "
        "be used: activations are bfloat16, not float32. CPU kernels cannot be used: they were not compiled. Do not "
        "judge speed by this."
    ]


def test_the_kernels_stay_first_on_a_gpu(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = log_of(monkeypatch)
    on_gpu(monkeypatch, 90)
    loaded(build_form("natural", **SIZES), torch.bfloat16, monkeypatch)
    assert logged == [
        "bitsmoe: routed experts are computed by Triton kernels: mixed-bit grouped GEMM for sm_90, bfloat16"
    ]


def test_it_takes_reloaded_weights(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build_form("natural", **SIZES)
    method, module = loaded(made, torch.float32, monkeypatch)
    address, before = module.plain_down.data_ptr(), module.plain_down.clone()
    other = {n: t * 2 if n == "down_feature_scale" else t for n, t in made.tensors.items()}
    list(method.loader.load_weights(other.items()))
    assert module.plain_down.data_ptr() == address
    torch.testing.assert_close(module.plain_down.data, 2 * before)


@pytest.mark.parametrize("third", [False, True])
def test_a_layer_compiles_without_a_graph_break(
    third: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if third:
        request.getfixturevalue("registered")
    method, module = loaded(build_form("natural", **SIZES), torch.float32, monkeypatch)
    x, weights, ids, want = call(method, module, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *call: method.apply(module, *call), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weights, ids), want)
