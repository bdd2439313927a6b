"""The shared cases by what Triton compiles: every instruction executed, results within the interpreter's bounds.

Programs run in random orders. Every access is checked: bounds, alignment, races, copies that are not waited for.
"""

from typing import Any

import pytest
import torch

from kernel_cases import DTYPES
from moe_cases import CASES, LARGE
from ptx_cases import check_on_machine, names, pipelined
from tensor_core import AMPERE, HOPPER, MatrixUnit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def dtype_name(dtype: Any) -> str | None:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


def dtype_by_day(name: str, capability: int) -> torch.dtype:
    """A case takes one dtype on sm_80 and the other one on sm_90: compiling takes most of the time."""
    return DTYPES[(list(CASES).index(name) + (capability == 90)) % 2]


OTHERS = [
    "all widths, blocks of 16", "8-bit basis", "gate and up apart", "compensators and kept experts", "biases",
    "no gate",
]  # fmt: skip
"""Cases for architectures whose instructions are those of sm_80, besides their tiles."""


def cases(capability: int) -> list[str]:
    """What an architecture runs: all on two of them, some and their own tiles on the others."""
    every = names(capability)
    own = f" of {capability}"
    return every if capability in (80, 90) else [n for n in every if n in OTHERS or (is_tile(n) and n.endswith(own))]


def is_tile(name: str) -> bool:
    return name.startswith("tile ")


def by_day(name: str, capability: int) -> bool:
    """Tiles are by day on the architecture that they are for."""
    if is_tile(name):
        return name.endswith(f" of {capability}")
    return capability == 90 or (capability == 80 and name not in LARGE)


@pytest.mark.parametrize(
    ("capability", "name", "dtype"),
    [
        pytest.param(
            capability,
            name,
            dtype,
            marks=[] if by_day(name, capability) and dtype == dtype_by_day(name, capability) else [pytest.mark.nightly],
        )
        for capability in (80, 90, 100, 120)
        for name in cases(capability)
        for dtype in DTYPES
    ],
    ids=dtype_name,
)
def test_case(capability: int, name: str, dtype: torch.dtype) -> None:
    """With the tile that the table has for so few tokens."""
    ran = check_on_machine(name, capability, dtype, seed=list(CASES).index(name))
    assert {"scale", "gate_up", "down"} <= set(ran) or not CASES[name].ids


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        pytest.param(
            capability,
            name,
            marks=[]
            if list(CASES).index(name) % 3 == (capability == 90) and name not in LARGE
            else [pytest.mark.nightly],
        )
        for capability in (80, 90)
        for name in names(capability)
        if CASES[name].tile is None and name not in LARGE
    ],
)
def test_case_for_many_tokens(capability: int, name: str) -> None:
    """With a tile of the kernels that bring codes to shared memory. By day each architecture takes a sixth."""
    check_on_machine(name, capability, dtype_by_day(name, capability), tile=pipelined(capability))


@pytest.mark.parametrize("name", ["2 bits, kwidth {}", "five tiles"])
@pytest.mark.parametrize(("capability", "kwidth", "rounding"), [(80, 4, AMPERE), (90, 2, HOPPER)])
def test_sums_that_round_toward_zero(name: str, capability: int, kwidth: int, rounding: MatrixUnit) -> None:
    """As matrix units add. Few components: with many of them float16 would go beyond these bounds."""
    name = name.format(kwidth)
    for tile in (None, pipelined(capability)):
        check_on_machine(name, capability, dtype_by_day(name, capability), rounding=rounding, tile=tile)


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("name", ["an expert twice for a token", "ragged tails", "two ranks of experts"])
def test_other_orders_of_programs(name: str, seed: int) -> None:
    check_on_machine(name, 80, dtype_by_day(name, 80), seed=seed)
