"""Rounding by kernels beside rounding by torch, and which of them runs where."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitsmoe_kernels import _triton
from bitsmoe_kernels._cpu import library
from bitsmoe_kernels._cpu import rounding as compiled
from bitsmoe_kernels._triton import rounding as triton_kernels
from bitsmoe_kernels.errors import BitsmoeError
from builders import REPO
from offline_quant.config import QuantizeConfig
from offline_quant.linalg import add_damping, factorize
from offline_quant.pipeline.quantize import quantize_model
from offline_quant.rounding import packing
from offline_quant.rounding.backends import select
from offline_quant.rounding.backends.base import RoundingBackend
from offline_quant.rounding.backends.cpu_kernels import CpuRounding
from offline_quant.rounding.backends.torch_reference import TorchRounding
from offline_quant.rounding.backends.triton_kernels import TritonRounding
from offline_quant.rounding.error_feedback import RoundingMode, quantize
from offline_quant.rounding.grid import Quantized
from pretended_cuda import pretended_cuda

needs_library = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))
KERNELS = [pytest.param(CpuRounding, marks=needs_library), pytest.param(TritonRounding, marks=pytest.mark.slow)]
SHAPES = [(1, 1, 1), (2, 1, 9), (2, 33, 49)]
MODES = {
    "feedback": RoundingMode(0),
    "guessed scales": RoundingMode.pilot(),
    "rows alone": RoundingMode(0, feedback=False),
    "refined": RoundingMode(2),
    "rows alone, refined": RoundingMode(1, feedback=False),
}

pytestmark = pytest.mark.usefixtures("interpreter")


def problem(n: int, K: int, N: int, along: str) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(K)
    x = torch.randn(n, 4 * K + 4, K, generator=g) @ torch.randn(n, K, K, generator=g)
    widths = torch.randint(0, 6, (n, K if along == "K" else N), generator=g, dtype=torch.uint8)
    return torch.randn(n, K, N, generator=g), x.mT @ x / x.shape[1], widths


@pytest.fixture
def by(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Quantized]:
    """`quantize` by a backend."""

    def run(backend: type[RoundingBackend], *arguments: Any) -> Quantized:
        with monkeypatch.context() as patch:
            patch.setattr(select, "backend_of", lambda tensor: backend())
            return quantize(*arguments)

    return run


@pytest.mark.parametrize("along", ["K", "N"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("backend", "shape"),
    [
        *(pytest.param(CpuRounding, s, marks=needs_library) for s in (*SHAPES, (3, 70, 1), (3, 100, 130))),
        *(pytest.param(TritonRounding, s, marks=pytest.mark.slow) for s in SHAPES),
        pytest.param(TritonRounding, (1, 70, 1), marks=pytest.mark.nightly),
    ],
)
def test_kernels_round_as_torch_does(
    by: Callable[..., Quantized], backend: type[RoundingBackend], shape: tuple[int, int, int], mode: str, along: str
) -> None:
    """Sums in another order move a value that lies on a boundary, and then what follows in its column."""
    F, M, widths = problem(*shape, along)
    found = by(backend, F, M, widths, along, MODES[mode])
    expected = by(TorchRounding, F, M, widths, along, MODES[mode])
    # What is refitted may fall to the other side of a boundary of float16.
    assert torch.allclose(found.c, expected.c, rtol=2e-3 if MODES[mode].refine else 0, atol=0)
    assert torch.allclose(found.error, expected.error, rtol=0.02)
    assert float((found.codes != expected.codes).float().mean()) < 0.02
    assert (found.lost is None) == (expected.lost is None)
    metric = add_damping(M).double()
    left = (F - found.dequantize(widths[:, :, None] if along == "K" else widths[:, None])).double()
    # One column may be nearly exact, and its error is then the rounding of what it is computed from.
    assert torch.allclose(found.error.double(), (left * (metric @ left)).sum((1, 2)), rtol=2e-3)


@pytest.mark.parametrize("backend", [*KERNELS, TorchRounding])
def test_moments_that_are_not_finite_are_refused(by: Callable[..., Quantized], backend: type[RoundingBackend]) -> None:
    F, M, widths = problem(2, 20, 10, "K")
    M[1, 3, 3] = float("nan")
    with pytest.raises(BitsmoeError, match="not finite"):
        by(backend, F, M, widths, "K")


@needs_library
def test_the_compiled_kernels_run_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    names = ("round_with_feedback", "scale_system", "scaled_levels", "refit_columns_", "descend", "round_alone")
    for name in (*names, "pack_codes"):
        function = getattr(compiled, name)
        monkeypatch.setattr(compiled, name, lambda *a, n=name, f=function, **k: ran.append(n) or f(*a, **k))
    F, M, widths = problem(2, 20, 10, "K")
    quantize(F, M, widths, "K", RoundingMode(1))
    quantize(F, M, widths, "K", RoundingMode(0, feedback=False))
    packing.pack_codes(torch.zeros(16, 3, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8), 16)
    assert ran == [*names, "pack_codes"]


@needs_library
def test_scales_are_refitted_where_float32_has_no_cholesky_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scales as by the factor, up to rounding."""
    F, M, widths = problem(2, 40, 30, "K")
    expected = quantize(F, M, widths, "K", RoundingMode(1))
    factorized = torch.linalg.cholesky_ex
    solved = []

    def fails(x: Tensor) -> tuple[Tensor, Tensor]:
        root, info = factorized(x)
        solved.append(len(x))
        return root * torch.nan, info + 1

    factor = factorize(M)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails)
    found = quantize(F, M, widths, "K", RoundingMode(1), factor)
    assert solved == [2]
    assert torch.allclose(found.error, expected.error, rtol=1e-2)


def test_without_the_library_torch_rounds(by: Callable[..., Quantized], monkeypatch: pytest.MonkeyPatch) -> None:
    F, M, widths = problem(2, 20, 10, "K")
    expected = by(TorchRounding, F, M, widths, "K")
    monkeypatch.setattr(library, "why_not", lambda: "they were not compiled")
    monkeypatch.setattr(library, "load", lambda: pytest.fail("the library was used"))
    assert torch.equal(quantize(F, M, widths, "K").codes, expected.codes)
    assert type(select.backend_of(F)) is TorchRounding
    words = packing.pack_codes(torch.ones(16, 3, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8), 16)
    assert words.tolist() == [[-1, -1, -1]]


@pytest.mark.slow
def test_a_gpu_rounds_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few launches for a block of rows, on the device that holds the factors, whichever is the current one."""
    launched, given = [], problem(2, 70, 24, "K")

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        launched.append((kernel.__name__, torch.cuda.current_device()))
        held = [x.held if isinstance(x, Tensor) else x for x in arguments]  # type: ignore[attr-defined]
        kernel[grid](*held, **options)

    monkeypatch.setattr(triton_kernels, "_launch", launch)
    expected = {mode: quantize(*given, "K", MODES[mode]) for mode in ("refined", "rows alone")}
    with pretended_cuda() as operations:
        there = [t.to("cuda") for t in given]
        for mode, host in expected.items():
            before = operations()
            with torch.cuda.device(1):
                found = quantize(*there, "K", MODES[mode])
            assert operations() - before < 7 * 70  # torch alone: 141 for a row
            assert torch.allclose(found.error.cpu(), host.error, rtol=0.02)
    names = ["feedback_kernel"] * 3 + ["descent_kernel"] * 3 * 2 + ["alone_kernel"]
    assert launched == [(name, 0) for name in names]


def test_a_device_without_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select.why_no_kernels(torch.device("cuda")) is None
    monkeypatch.setattr(_triton, "why_not", lambda: "triton is not installed")
    assert select.why_no_kernels(torch.device("cuda")) == "without the Triton kernels: triton is not installed"
    assert select.why_no_kernels(torch.device("mps")) == "on mps, for which there are no kernels"
    assert type(select.backend_of(torch.empty(1, device="meta"))) is TorchRounding


@pytest.mark.slow
def test_a_missing_library_is_named_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library, "why_not", lambda: "they were not compiled")
    (tmp_path / "calib.txt").write_text("one two three four five " * 50)
    config = QuantizeConfig(bits=2.5, calib=str(tmp_path / "calib.txt"), calib_samples=1, calib_length=8)
    quantize_model(str(REPO / "examples" / "tiny_moe"), tmp_path / "out", config, plan_only=True)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("without the CPU kernels: they were not compiled") == 1
