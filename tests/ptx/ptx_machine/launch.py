"""Kernels as the project launches them: compiled to PTX for an architecture, and executed by the machine.

Triton itself decides what a launch compiles: which pointers and sizes are multiples of 16, which numbers are 1.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from bitsmoe_kernels.backends import triton_launch
from ptx_machine.control import Code, Launch
from ptx_machine.memory import GlobalMemory

TOGETHER = 16
"""Most programs side by side."""
HOPPER, AMPERE = (16, 2), (8, 1)
"""Rounding of matrix units: products added at once, bits kept beyond the 24 of the largest."""


@dataclass(frozen=True)
class Compiled:
    """PTX of one variant of a kernel, and the bytes of shared memory of its programs."""

    text: str
    shared: int


class Compiler:
    """Variants of kernels for one architecture, each compiled once.

    Attributes:
        capability: such as 90.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self._target = GPUTarget("cuda", capability, 32)
        self._backend = CUDABackend(self._target)
        self._compiled: dict[tuple[Any, str], Compiled] = {}

    def compile(self, kernel: JITFunction, args: Any, options: Any) -> tuple[Compiled, list[Any]]:
        """What a launch runs, and the arguments that it passes: those that are no constants."""
        bind = create_function_from_signature(kernel.signature, kernel.params, self._backend)
        bound, specialization, rest = bind(*args, **options)
        chosen, signature, constants, attributes = kernel._pack_args(
            self._backend, dict(options), bound, specialization, rest
        )
        key = (kernel, compute_cache_key({}, specialization, rest))
        if key not in self._compiled:
            source = ASTSource(kernel, signature, constants, attributes)
            self._compiled[key] = self._ptx(source, chosen.__dict__)
        passed = [bound[name] for name, kind in signature.items() if kind != "constexpr"]
        return self._compiled[key], passed

    def _ptx(self, source: ASTSource, options: dict[str, Any]) -> Compiled:
        with _without_assembler():
            made = triton_compile(source, target=self._target, options=options)
        return Compiled(made.asm["ptx"], made.metadata.shared)


@contextmanager
def _without_assembler() -> Iterator[None]:
    """Triton ends with PTX: what the assembler makes of it is not looked at."""

    def stages(_: Any = None, stages: Any = None, *__: Any) -> Any:
        if stages is None:
            return "ptx only", "ptx only"
        stages["cubin"] = lambda text, _: text.encode()
        return None

    with knobs.runtime.scope():
        knobs.runtime.add_stages_inspection_hook = stages
        yield


@dataclass
class Machine:
    """Runs what `triton_launch` launches.

    Attributes:
        compiler: for the wanted architecture.
        random: decides in what order programs run.
        rounding: of matrix products, see `fragments.product`; None: IEEE.
        edit: changes the PTX of a kernel, given its name.
        launched: names of the kernels that ran.
    """

    compiler: Compiler
    random: np.random.Generator
    rounding: tuple[int, int] | None = None
    edit: Callable[[str, str], str] = lambda name, text: text
    launched: list[str] = field(default_factory=list)

    def launch(self, name: str, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """As `triton_launch._launch`."""
        compiled, passed = self.compiler.compile(kernel, args, options)
        names = [p for p in inspect.signature(kernel.fn).parameters]
        memory = GlobalMemory()
        given = []
        for at, one in enumerate(passed):
            given.append(memory.put(f"{name}'s {at}", one) if isinstance(one, torch.Tensor) else int(one))
        assert names
        code = decoded(self.edit(name, compiled.text))
        # Triton passes two pointers more, to memory that these kernels do not ask for.
        assert len(code.kernel.parameters) == len(given) + 2
        self.launched.append(name)
        run = Launch(memory, self.random, self.rounding)
        run.run(code, (*grid, 1, 1)[:3], [*given, 0, 0], compiled.shared, TOGETHER)


_DECODED: dict[str, Code] = {}


def decoded(text: str) -> Code:
    """A kernel's code, decoded once for the same text."""
    if text not in _DECODED:
        _DECODED[text] = Code(text)
    return _DECODED[text]


@contextmanager
def substituted(machine: Machine) -> Iterator[Machine]:
    """Launches of `triton_launch` go to the machine, as on a GPU of its architecture."""
    device = triton_launch.Device(machine.compiler.capability, True)
    with (
        patch.object(triton_launch, "_launch", machine.launch),
        patch.object(triton_launch.Device, "of", classmethod(lambda cls, x: device)),
    ):
        yield machine
