"""Which backend computes a layer, and what is said of it."""

import pytest
import torch

from bitsmoe_kernels._cpu import library
from bitsmoe_kernels.backends import select as select_module
from bitsmoe_kernels.backends.base import Backend, Target
from bitsmoe_kernels.backends.cpu_moe import CpuMoE
from bitsmoe_kernels.backends.select import BACKENDS, select
from bitsmoe_kernels.backends.torch_reference import TorchReference
from bitsmoe_kernels.backends.triton_moe import TritonMoE
from bitsmoe_kernels.errors import BitsmoeError
from builders import FORMS, build_form

CPU = Target("cpu", None, torch.bfloat16)
H100 = Target("cuda", 90, torch.bfloat16)

REFUSED = {
    "left": "gate or up has components on the output side",
    "paper": "its down projection has components on the output side",
    "apart": "its down projection has components on the output side",
}
"""The forms that the kernels cannot compute, and why."""


REFERENCE = "bitsmoe: routed experts are computed by the torch reference path, on the CPU"


class ForCPUs(TritonMoE):
    """A backend that refuses what the Triton kernels refuse, made for CPUs."""

    name = "vector kernels"
    device_type = "cpu"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU kernels can be used, whatever this machine is."""
    monkeypatch.setattr(library, "why_not", lambda: None)
    monkeypatch.setattr(library, "best", lambda: "avx2")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("target", "kernels", "words"), [(H100, TritonMoE, "for sm_90, bfloat16"), (CPU, CpuMoE, "by AVX2, bfloat16")]
)
def test_the_kernels_are_used_where_they_can_be(target: Target, kernels: type[Backend], words: str, form: str) -> None:
    choice = select(build_form(form).layer, target)
    reason = REFUSED.get(form)
    assert isinstance(choice.backend, TorchReference if reason else kernels)
    assert choice.loud == bool(reason)
    assert (reason or words) in choice.message


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (Target("cuda", 90, torch.float32), "activations are float32, not float16 or bfloat16"),
        (Target("cuda", 75, torch.float16), "compute capability 7.5 is below 8.0"),
        (Target("cuda", None, torch.float16), "there is no CUDA device"),
        (Target("xpu", None, torch.float16), "there is no CUDA device"),
    ],
)
def test_a_slow_backend_on_an_accelerator_is_said_loudly(target: Target, reason: str) -> None:
    choice = select(build_form("natural").layer, target)
    assert isinstance(choice.backend, TorchReference)
    assert choice.loud
    assert choice.message == (
        "bitsmoe: routed experts are computed by the torch REFERENCE path: right, but very slow. "
        f"Triton kernels cannot be used: {reason}. Do not judge speed by this."
    )


def test_without_triton_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert TritonMoE().why_not(build_form("natural").layer, H100) == "triton is not installed"


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_cpu_nothing_is_said_of_gpus(dtype: torch.dtype) -> None:
    choice = select(build_form("natural").layer, Target("cpu", None, dtype))
    assert isinstance(choice.backend, CpuMoE)
    assert (choice.loud, choice.refusals) == (False, ())
    assert choice.message == (
        "bitsmoe: routed experts are computed by CPU kernels: mixed-bit dot products by AVX2, "
        f"{choice.target.dtype_name}"
    )


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("form", "dtype", "reason"),
    [
        ("paper", torch.bfloat16, "its down projection has components on the output side (--basis paper)"),
        ("left", torch.float32, "gate or up has components on the output side"),
        ("natural", torch.float64, "activations are float64, not float32, float16 or bfloat16"),
    ],
)
def test_what_the_cpu_kernels_refuse_the_reference_computes_loudly(form: str, dtype: torch.dtype, reason: str) -> None:
    choice = select(build_form(form).layer, Target("cpu", None, dtype))
    assert isinstance(choice.backend, TorchReference)
    assert choice.loud
    assert choice.message.startswith(f"{REFERENCE}. CPU kernels cannot be used: {reason}")
    assert choice.message.endswith("Do not judge speed by this.")


def test_without_a_library_the_reference_computes_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "why_not", lambda: "they were not compiled")
    choice = select(build_form("natural").layer, CPU)
    assert isinstance(choice.backend, TorchReference)
    assert choice.loud
    assert choice.message == (
        f"{REFERENCE}. CPU kernels cannot be used: they were not compiled. Do not judge speed by this."
    )


@pytest.mark.usefixtures("compiled")
def test_a_gpu_hears_nothing_of_the_cpu_kernels() -> None:
    assert "CPU" not in select(build_form("natural").layer, H100).message


def test_a_refusal_of_a_backend_for_cpus_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_module, "BACKENDS", (ForCPUs(), TorchReference()))
    choice = select(build_form("natural").layer, CPU)
    assert choice.loud
    assert choice.message.endswith(
        "on the CPU. vector kernels cannot be used: there is no CUDA device. Do not judge speed by this."
    )


def test_a_fast_backend_says_who_refused_and_warns_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(TritonMoE):
        name = "vector kernels"

        def why_not(self, layer: object, target: Target) -> str:
            return "it is the wrong day"

    monkeypatch.setattr(select_module, "BACKENDS", (Refusing(), *BACKENDS))
    choice = select(build_form("natural").layer, H100)
    assert isinstance(choice.backend, TritonMoE)
    assert not choice.loud
    assert choice.message.endswith("for sm_90, bfloat16. vector kernels cannot be used: it is the wrong day")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", [CPU, H100, Target("xpu", None, torch.float64)])
def test_the_last_backend_refuses_nothing(form: str, target: Target) -> None:
    assert BACKENDS[-1].why_not(build_form(form).layer, target) is None


def test_where_none_can_all_reasons_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_module, "BACKENDS", (ForCPUs(), TritonMoE()))
    with pytest.raises(BitsmoeError) as caught:
        select(build_form("natural").layer, CPU)
    assert str(caught.value).splitlines() == [
        "no backend can compute the routed experts:",
        "  - vector kernels cannot be used: there is no CUDA device",
        "  - Triton kernels cannot be used: there is no CUDA device",
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_prepared_has_names_of_its_own_or_is_the_files(backend: Backend) -> None:
    from bitsmoe_kernels.reference import LayerWeights

    made = build_form("shared_basis")
    stored = dict(made.tensors)
    prepared = backend.prepare(LayerWeights(made.layer, made.block_size, stored), H100)
    assert all(stored.get(name, tensor) is tensor for name, tensor in prepared.tensors.items())
    assert all(torch.equal(stored[name], tensor) for name, tensor in made.tensors.items())
