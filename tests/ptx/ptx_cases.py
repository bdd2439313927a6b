"""The shared cases on the machine."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from unittest.mock import patch

import numpy as np
import torch

from bitsmoe_kernels.backends.launch_config import PREFILL, TILES, Tile, kwidth_of
from kernel_cases import NAMES, check
from moe_cases import CASES
from ptx_machine.launch import Compiler, Machine, substituted
from tensor_core import MatrixUnit


def pipelined(capability: int) -> Tile:
    """A tile of the kernels that bring codes to shared memory."""
    return next(tile for tile in TILES[capability][PREFILL] if not tile.direct)


@cache
def compiler(capability: int) -> Compiler:
    """One for all tests: what a case compiled, others use."""
    return Compiler(capability)


def names(capability: int) -> list[str]:
    """Cases of an architecture. Of two that differ in `kwidth` alone, the one with that of the architecture."""
    other = f", kwidth {6 - kwidth_of(capability)}"
    twin = f", kwidth {kwidth_of(capability)}"
    return [name for name in NAMES if not (name.endswith(other) and name.replace(other, twin) in NAMES)]


def check_on_machine(
    name: str,
    capability: int,
    dtype: torch.dtype,
    edit: Callable[[str, str], str] | None = None,
    claimed: dict[str, tuple[str, ...]] | None = None,
    rounding: MatrixUnit | None = None,
    seed: int = 0,
    tile: Tile | None = None,
) -> list[str]:
    """Run a case as a GPU of that architecture would, and hold it to its bounds; names of the kernels that ran.

    tile: instead of the case's, or of the table's.
    """
    machine = Machine(compiler(capability), np.random.default_rng(seed), rounding)
    if edit:
        machine.edit = edit
    machine.claimed = claimed or {}
    case = replace(CASES[name], kwidth=kwidth_of(capability), tile=tile or CASES[name].tile)
    with substituted(machine), patch.dict(CASES, {name: case}):
        check(name, dtype)
    return machine.launched
