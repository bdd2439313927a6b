"""The Triton kernels of rounding, by the interpreter, against float64 loops that say what they should compute."""

import pytest
import torch
from torch import Tensor

from bitsmoe_kernels._triton import rounding as kernels
from kernel_cases import shuffled_grid
from rounding_cases import CASES, RoundingCase, check_alone, check_descent, check_feedback, check_scales

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("interpreter", "poisoned_memory"),
    # Columns beyond N, and what is made not to be a number.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SMALL = [
    pytest.param(name, marks=pytest.mark.nightly) if name == "more experts than threads" else name
    for name, (n, K, N, _) in CASES.items()
    if n * K * N < 6_000
]
"""Those that the interpreter takes in seconds. Experts are programs here: more than threads are nothing special."""


def feedback(case: RoundingCase, rough: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return kernels.round_with_feedback(case.F, case.U, case.half, case.power, case.c, rough)


def alone(case: RoundingCase, rough: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return kernels.round_alone(case.F, case.half, case.power, case.c, rough)


def descend(case: RoundingCase, codes: Tensor, a: Tensor) -> Tensor:
    gradient = (case.M.double() @ (case.F.double() - case.value(codes, a))).float()
    return kernels.descend(case.M, case.half, codes, a, case.c, gradient)[0]


@pytest.mark.parametrize("name", SMALL)
def test_feedback_hands_every_error_on(name: str) -> None:
    case = RoundingCase(*CASES[name])
    with shuffled_grid(0):
        check_feedback(case, *feedback(case))


@pytest.mark.parametrize("name", SMALL)
def test_alone_every_row_gets_its_nearest_levels(name: str) -> None:
    case = RoundingCase(*CASES[name])
    with shuffled_grid(0):
        check_alone(case, *alone(case))


@pytest.mark.parametrize("name", [*SMALL, "columns of two programs"])
def test_descent_gives_every_row_its_best_codes_in_turn(name: str) -> None:
    case = RoundingCase(*(CASES | {"columns of two programs": (1, 34, kernels.DESCENT_COLUMNS + 3, "N")})[name])
    codes, a, _, _ = alone(case, rough=True)
    with shuffled_grid(0):
        check_descent(case, codes, descend(case, codes, a), a)


@pytest.mark.parametrize("along", ["K", "N"])
@pytest.mark.parametrize("rough", [False, True])
def test_scales_are_those_of_alternating_least_squares(along: str, rough: bool) -> None:
    case = RoundingCase(3, 20, 200, along)
    check_scales(case, alone(case, rough)[1], rough)


@pytest.mark.parametrize("scale", [1e-18, *(pytest.param(s, marks=pytest.mark.nightly) for s in (1e-6, 1e4)), 1e18])
@pytest.mark.parametrize("along", ["K", "N"])
def test_codes_stay_within_their_widths_at_any_magnitude(scale: float, along: str) -> None:
    case = RoundingCase(2, 10, 20, along, scale)
    for codes, a, _, _ in (feedback(case), feedback(case, rough=True), alone(case)):
        assert bool((codes <= 2 * case.half).all())
        assert bool((descend(case, codes, a) <= 2 * case.half).all())
        assert torch.allclose(a, a.half().float(), rtol=0, atol=0, equal_nan=True)  # float16 holds them


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_makes_an_error_that_is_none(bad: float) -> None:
    """Callers compare errors, and refuse what is not finite; codes stay within their widths."""
    case = RoundingCase(2, 10, 20, "K")
    case.half[:] = 1.5
    case.F[1, 7, 3] = bad
    codes, _, _, error = feedback(case)
    assert error.isfinite().tolist() == [True, False]
    assert bool((codes <= 3).all())


def test_constant_rows_and_rows_of_nothing() -> None:
    case = RoundingCase(1, 4, 30, "K")
    case.half, case.power = torch.tensor([0.5, 1.5, 0.5, 127.5])[None, :, None], torch.ones(1, 4, 1)
    case.F[0, :2], case.F[0, 2:] = 0.25, 0.0
    case.c[:] = 1
    codes, a, _, _ = alone(case)
    assert torch.equal(case.value(codes, a)[0], case.F[0].double())
    nothing = RoundingCase(1, 4, 30, "K")
    nothing.c[:] = 0
    _, a, norms, _ = feedback(nothing)
    assert not bool(a.any())
    assert bool(norms.isfinite().all())
