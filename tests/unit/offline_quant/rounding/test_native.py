"""Rounding by the compiled kernels beside rounding by torch, and which of the two runs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitsmoe_kernels._cpu import library
from bitsmoe_kernels._cpu import rounding as compiled
from bitsmoe_kernels.errors import BitsmoeError
from builders import REPO
from offline_quant.config import QuantizeConfig
from offline_quant.linalg import add_damping, factorize
from offline_quant.pipeline.quantize import quantize_model
from offline_quant.rounding import native
from offline_quant.rounding.error_feedback import Quantized, RoundingMode, quantize

needs_library = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))
MODES = {
    "feedback": RoundingMode(0),
    "guessed scales": RoundingMode.pilot(),
    "rows alone": RoundingMode(0, feedback=False),
    "refined": RoundingMode(2),
    "rows alone, refined": RoundingMode(1, feedback=False),
}


def problem(n: int, K: int, N: int, along: str) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(K)
    x = torch.randn(n, 4 * K + 4, K, generator=g) @ torch.randn(n, K, K, generator=g)
    widths = torch.randint(0, 6, (n, K if along == "K" else N), generator=g, dtype=torch.uint8)
    return torch.randn(n, K, N, generator=g), x.mT @ x / x.shape[1], widths


def by_torch(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Quantized:
    with monkeypatch.context() as patch:
        patch.setattr(native, "runs_on", lambda tensor: False)
        return quantize(*arguments)  # type: ignore[arg-type]


@needs_library
@pytest.mark.parametrize("along", ["K", "N"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 9), (3, 70, 1), (2, 33, 49), (3, 100, 130)])
def test_both_paths_round_alike(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], mode: str, along: str
) -> None:
    """Sums in another order move a value that lies on a boundary, and then what follows in its column."""
    F, M, widths = problem(*shape, along)
    found = quantize(F, M, widths, along, MODES[mode])
    expected = by_torch(monkeypatch, F, M, widths, along, MODES[mode])
    # What is refitted may fall to the other side of a boundary of float16.
    assert torch.allclose(found.c, expected.c, rtol=2e-3 if MODES[mode].refine else 0, atol=0)
    assert torch.allclose(found.error, expected.error, rtol=0.02)
    assert float((found.codes != expected.codes).float().mean()) < 0.02
    assert (found.lost is None) == (expected.lost is None)
    metric = add_damping(M).double()
    left = (F - found.dequantize(widths[:, :, None] if along == "K" else widths[:, None])).double()
    # One column may be nearly exact, and its error is then the rounding of what it is computed from.
    assert torch.allclose(found.error.double(), (left * (metric @ left)).sum((1, 2)), rtol=2e-3)


@needs_library
def test_moments_that_are_not_finite_are_refused() -> None:
    F, M, widths = problem(2, 20, 10, "K")
    M[1, 3, 3] = float("nan")
    with pytest.raises(BitsmoeError, match="not finite"):
        quantize(F, M, widths, "K")


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
    native.pack_codes(torch.zeros(16, 3, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8), 16)
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


def test_without_the_library_torch_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    F, M, widths = problem(2, 20, 10, "K")
    expected = by_torch(monkeypatch, F, M, widths, "K")
    monkeypatch.setattr(library, "why_not", lambda: "they were not compiled")
    monkeypatch.setattr(library, "load", lambda: pytest.fail("the library was used"))
    assert torch.equal(quantize(F, M, widths, "K").codes, expected.codes)
    words = native.pack_codes(torch.ones(16, 3, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8), 16)
    assert words.tolist() == [[-1, -1, -1]]


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
