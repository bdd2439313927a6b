"""The compiled rounding against float64 loops that say what it should compute, and against itself."""

import pytest
import torch
from torch import Tensor

from bitsmoe_kernels._cpu import library
from bitsmoe_kernels._cpu import rounding as compiled
from bitsmoe_kernels.format import packing
from rounding_cases import CASES, STEP, RoundingCase, check_alone, check_descent, check_feedback, check_scales

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))


class Problem(RoundingCase):
    """A case and the compiled kernels."""

    def feedback(self, rough: bool = False, isa: str | None = None, threads: int = 0) -> compiled.Rounded:
        return compiled.round_with_feedback(self.F, self.U, self.half, self.power, self.c, rough, isa, threads)

    def alone(self, rough: bool = False, isa: str | None = None, threads: int = 0) -> compiled.Rounded:
        return compiled.round_alone(self.F, self.half, self.power, self.c, rough, isa, threads)

    def descend(self, found: compiled.Rounded, isa: str | None = None, threads: int = 0) -> tuple[Tensor, Tensor]:
        gradient = (self.M.double() @ (self.F.double() - self.value(found.codes, found.a))).float()
        return compiled.descend(self.F, self.M, self.half, found.codes, found.a, self.c, gradient, isa, threads)

    def refit(
        self, found: compiled.Rounded, isa: str | None = None, threads: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The system for row scales, its right side, levels times a, new column scales and M (F - F^)."""
        MF = self.M @ self.F
        system, right = compiled.scale_system(self.M, MF, self.half, found.codes, self.c, isa, threads)
        A = compiled.scaled_levels(self.half, found.codes, found.a, isa, threads)
        gradient = self.M @ A
        c = compiled.refit_columns_(gradient, MF, self.half, found.codes, found.a, self.c, isa, threads)
        return system.tril(), right, A, c, gradient


def equal(first: tuple[Tensor | None, ...], second: tuple[Tensor | None, ...]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rough", [False, True])
def test_bits_depend_neither_on_the_instruction_set_nor_on_threads(case: str, rough: bool) -> None:
    problem = Problem(*CASES[case])
    feedback, alone = problem.feedback(rough), problem.alone(rough)
    moved, refitted = problem.descend(feedback), problem.refit(feedback)
    for isa, threads in [*((isa, 1) for isa in library.usable()), (None, 2), (None, 5)]:
        assert equal(problem.feedback(rough, isa, threads), feedback), (isa, threads)
        assert equal(problem.alone(rough, isa, threads), alone), (isa, threads)
        assert equal(problem.descend(feedback, isa, threads), moved), (isa, threads)
        assert equal(problem.refit(feedback, isa, threads), refitted), (isa, threads)


@pytest.mark.parametrize("case", CASES)
def test_feedback_hands_every_error_on(case: str) -> None:
    problem = Problem(*CASES[case])
    codes, a, norms, error, _ = problem.feedback()
    assert error is not None
    check_feedback(problem, codes, a, norms, error)


@pytest.mark.parametrize("case", CASES)
def test_alone_every_row_gets_its_nearest_levels(case: str) -> None:
    problem = Problem(*CASES[case])
    codes, a, norms, _, left = problem.alone()
    assert left is not None
    check_alone(problem, codes, a, norms, left)


@pytest.mark.parametrize("along", ["K", "N"])
@pytest.mark.parametrize("rough", [False, True])
def test_scales_are_those_of_alternating_least_squares(along: str, rough: bool) -> None:
    problem = Problem(3, 20, 200, along)
    check_scales(problem, problem.alone(rough).a, rough)


@pytest.mark.parametrize("bits", range(1, 6))
def test_a_representable_row_comes_back_exactly(bits: int) -> None:
    g = torch.Generator().manual_seed(bits)
    half = (2**bits - 1) / 2
    level = ((torch.randn(1, 3, 700, generator=g) / STEP[bits] + half).round() - half).clamp(-half, half)
    c = torch.rand(1, 700, generator=g).half().float() + 0.5
    scale = torch.tensor([[0.125, 1.0, 3.5]])  # exact in float16
    F = level * scale[:, :, None] * c[:, None]
    levels, power = torch.full((1, 3, 1), half), torch.full((1, 3, 1), STEP[bits] ** -2)
    found = compiled.round_alone(F, levels, power, c, rough=False)
    assert torch.equal(found.a, scale)
    assert torch.equal(found.codes, (level + half).to(torch.uint8))
    assert found.left is not None
    assert not bool(found.left.any())


@pytest.mark.parametrize("case", CASES)
def test_descent_gives_every_row_its_best_codes_in_turn(case: str) -> None:
    problem = Problem(*CASES[case])
    first = problem.alone(rough=True)
    codes, error = problem.descend(first)
    check_descent(problem, first.codes, codes, first.a)
    assert torch.allclose(error.double(), problem.error(codes, first.a), rtol=1e-3, atol=1e-6)
    assert bool((error.double() <= 1.0001 * problem.error(first.codes, first.a)).all())


@pytest.mark.parametrize("case", CASES)
def test_scales_are_refitted_by_least_squares(case: str) -> None:
    """The row scales' normal equations against those of all entries at once; column scales by their ratios.

    M F is given in float32, so sums may be off by rounding of its terms, which can cancel.
    """
    problem = Problem(*CASES[case])
    found = problem.alone()
    system, right, A, c, gradient = problem.refit(found)
    level, M, F = found.codes.double() - problem.half.double(), problem.M.double(), problem.F.double()
    scaled = level * problem.c.double()[:, None]
    expected = (M * (scaled @ scaled.mT)).tril()
    assert torch.allclose(system.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    terms = M.abs() @ F.abs()
    off = (right.double() - (scaled * (M @ F)).sum(-1)).abs()
    assert bool((off <= 2e-6 * (scaled.abs() * terms).sum(-1) + 1e-9).all())
    assert torch.equal(A, (level.float() * found.a[:, :, None]))
    products = A.double() * (M @ F)
    power = (A.double() * (M @ A.double())).sum(1)
    best = torch.where(power > 0, products.sum(1) / power.clamp(min=1e-30), problem.c.double())
    slack = 2e-6 * (A.double().abs() * terms).sum(1) / power.clamp(min=1e-30) + 1e-3 * best.abs() + 2.0**-24
    assert bool(((c.double() - best).abs() <= slack).all())
    assert torch.equal(c, c.half().float())
    left = M @ (F - A.double() * c.double()[:, None])
    assert torch.allclose(gradient.double(), left, atol=1e-4 * float((M @ F).abs().max()) + 1e-9)


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e4, 1e18])
@pytest.mark.parametrize("along", ["K", "N"])
def test_codes_stay_within_their_widths_at_any_magnitude(scale: float, along: str) -> None:
    problem = Problem(2, 40, 50, along, scale)
    for found in (problem.feedback(), problem.feedback(rough=True), problem.alone()):
        assert bool((found.codes <= 2 * problem.half).all())
        assert bool((problem.descend(found)[0] <= 2 * problem.half).all())
        assert torch.allclose(found.a, found.a.half().float(), rtol=0, atol=0, equal_nan=True)  # float16 holds them


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_makes_an_error_that_is_none(bad: float) -> None:
    """Callers compare errors, and refuse what is not finite; codes stay within their widths."""
    problem = Problem(2, 40, 50, "K")
    problem.half[:] = 1.5
    problem.F[1, 7, 3] = bad
    found = problem.feedback()
    assert found.error is not None
    assert found.error.isfinite().tolist() == [True, False]
    assert bool((found.codes <= 3).all())


def test_constant_rows_and_rows_of_nothing() -> None:
    problem = Problem(1, 4, 30, "K")
    problem.half, problem.power = torch.tensor([0.5, 1.5, 0.5, 127.5])[None, :, None], torch.ones(1, 4, 1)
    problem.F[0, :2], problem.F[0, 2:] = 0.25, 0.0
    problem.c[:] = 1
    found = problem.alone()
    assert torch.equal(problem.value(found.codes, found.a)[0], problem.F[0].double())
    nothing = Problem(1, 4, 30, "K")
    nothing.c[:] = 0
    found = nothing.feedback()
    assert not bool(found.a.any())
    assert bool(found.norms.isfinite().all())


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("C", [1, 16, 40, 96])
@pytest.mark.parametrize("F", [1, 63, 64, 130])
def test_packed_codes_are_those_of_the_format(block_size: int, C: int, F: int) -> None:
    g = torch.Generator().manual_seed(C + F)
    bits = torch.randint(0, 9, (-(-C // block_size),), generator=g, dtype=torch.uint8)
    top = torch.exp2(bits.repeat_interleave(block_size)[:C, None].float())
    codes = (torch.rand(C, F, generator=g) * top).to(torch.uint8)
    found = compiled.pack_codes(codes, bits, block_size)
    expected = packing.pack_codes(codes, bits, block_size)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert torch.equal(compiled.pack_codes(codes.T.contiguous().T, bits, block_size), expected)


def test_codes_that_do_not_fit_are_refused_as_by_the_format() -> None:
    codes = torch.zeros(40, 70, dtype=torch.uint8)
    codes[3], codes[37, 69] = 200, 4  # the first block has 0 bits, and what stands there does not count
    for pack in (compiled.pack_codes, packing.pack_codes):
        with pytest.raises(ValueError, match="block 2: code 4 does not fit 2 bits"):
            pack(codes, torch.tensor([0, 1, 2], dtype=torch.uint8), 16)
        with pytest.raises(ValueError, match="40 components in blocks of 16"):
            pack(codes, torch.tensor([0, 1], dtype=torch.uint8), 16)
