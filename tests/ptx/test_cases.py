"""The shared cases by what Triton compiles: every instruction executed, results within the interpreter's bounds.

Programs run in random orders. Every access is checked: bounds, alignment, races, copies that are not waited for.
"""

from typing import Any

import pytest
import torch

from kernel_cases import DTYPES
from moe_cases import CASES
from ptx_cases import check_on_machine, names
from ptx_machine.launch import AMPERE, HOPPER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def dtype_name(dtype: Any) -> str | None:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


def by_day(name: str, capability: int) -> torch.dtype:
    """By day a case takes one dtype on each of the two architectures, both in all: compiling takes most of the time."""
    return DTYPES[(list(CASES).index(name) + (capability == 90)) % 2]


SOME = ["all widths, blocks of 16", "8-bit basis", "gate and up apart", "compensators and kept experts", "biases",
        "tile 0 of 120", "tile 1 of 120", "tile 2 of 120"]  # fmt: skip
"""For an architecture whose instructions are those of sm_80."""


@pytest.mark.parametrize(
    ("capability", "name", "dtype"),
    [
        pytest.param(
            capability, name, dtype, marks=[] if dtype == by_day(name, capability) else [pytest.mark.nightly]
        )
        for capability in (80, 90, 120)
        for name in (names(capability) if capability < 120 else SOME)
        for dtype in DTYPES
    ],
    ids=dtype_name,
)  # fmt: skip
def test_case(capability: int, name: str, dtype: torch.dtype) -> None:
    ran = check_on_machine(name, capability, dtype, seed=list(CASES).index(name))
    assert {"scale", "gate_up", "down"} <= set(ran) or not CASES[name].ids


@pytest.mark.parametrize("name", ["2 bits, kwidth {}", "five tiles", "tile 1 of 80"])
@pytest.mark.parametrize(("capability", "rounding"), [(80, AMPERE), (90, HOPPER)])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_sums_that_round_toward_zero(name: str, capability: int, rounding: tuple[int, int], dtype: torch.dtype) -> None:
    """As matrix units add. Few components: more of them would go beyond these bounds with float16."""
    check_on_machine(name.format(4 if capability == 80 else 2), capability, dtype, rounding=rounding)


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("name", ["an expert twice for a token", "ragged tails", "two ranks of experts"])
def test_other_orders_of_programs(name: str, seed: int) -> None:
    check_on_machine(name, 80, by_day(name, 80), seed=seed)
