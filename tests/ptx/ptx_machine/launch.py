"""Kernels as the project launches them: compiled to PTX for an architecture, and executed by the machine.

Triton itself decides what a launch compiles: which pointers and sizes are multiples of 16, which numbers are 1.
"""

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
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from bitsmoe_kernels.backends import triton_launch
from ptx_machine.control import Code, Launch
from ptx_machine.memory import GlobalMemory
from tensor_core import MatrixUnit

TOGETHER = 16
"""Most programs side by side."""
AMPERE, HOPPER = (8, 1), (16, 2)
"""Rounding of matrix units, as was measured on them: products added at once, bits kept beyond 24 of the largest."""


@dataclass(frozen=True)
class Compiled:
    """PTX of one variant of a kernel, and the bytes of shared memory of its programs."""

    text: str
    shared: int


class Compiler:
    """Variants of kernels for one architecture. Triton keeps them on disk too.

    Attributes:
        capability: such as 90.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self._target = GPUTarget("cuda", capability, 32)
        self._backend = CUDABackend(self._target)
        self._compiled: dict[Any, Compiled] = {}

    def compile(self, kernel: JITFunction, args: Any, options: Any, claimed: tuple[str, ...]) -> tuple[Compiled, Any]:
        """What a launch runs, and the arguments that it passes: those that are no constants.

        claimed: parameters that are said to be multiples of 16 whether or not they are.
        """
        bind = create_function_from_signature(kernel.signature, kernel.params, self._backend)
        bound, specialization, rest = bind(*args, **options)
        chosen, signature, constants, attributes = kernel._pack_args(
            self._backend, dict(options), bound, specialization, rest
        )
        attributes |= {(list(signature).index(name),): [["tt.divisibility", 16]] for name in claimed}
        key = (kernel, claimed, compute_cache_key({}, specialization, rest))
        if key not in self._compiled:
            source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
            with _without_assembler():
                made = triton_compile(source, target=self._target, options=chosen.__dict__)
            self._compiled[key] = Compiled(made.asm["ptx"], made.metadata.shared)
        return self._compiled[key], [bound[name] for name, kind in signature.items() if kind != "constexpr"]


@contextmanager
def _without_assembler() -> Iterator[None]:
    """Triton ends with PTX: what the assembler makes of it is not looked at."""

    def stages(_: Any = None, stages: Any = None, *__: Any) -> Any:
        if stages is None:  # what tells these from others in Triton's cache
            return "PTX only", "PTX only"
        stages["cubin"] = lambda text, _: text.encode()
        return None

    with knobs.runtime.scope():
        knobs.runtime.add_stages_inspection_hook = stages
        yield


def _as_it_is(name: str, text: str) -> str:
    return text


@dataclass
class Machine:
    """Runs what `triton_launch` launches.

    Attributes:
        compiler: for the wanted architecture.
        random: decides in what order programs run.
        rounding: of matrix products, see `fragments.product`; None: IEEE.
        edit: changes the PTX of a kernel, given its name.
        claimed: parameters of each kernel that are said to be multiples of 16.
        launched: names of the kernels that ran.
    """

    compiler: Compiler
    random: np.random.Generator
    rounding: MatrixUnit | None = None
    edit: Callable[[str, str], str] = _as_it_is
    claimed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    launched: list[str] = field(default_factory=list)

    def launch(self, name: str, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """As `triton_launch._launch`."""
        compiled, passed = self.compiler.compile(kernel, args, options, self.claimed.get(name, ()))
        memory = GlobalMemory()
        given = [
            memory.put(f"argument {i} of {name}", v) if isinstance(v, torch.Tensor) else int(v)
            for i, v in enumerate(passed)
        ]
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
    """Launches of `triton_launch` go to the machine, as if x lay on a GPU of its architecture."""
    device = triton_launch.Device(machine.compiler.capability, True)
    with (
        patch.object(triton_launch, "_launch", machine.launch),
        patch.object(triton_launch.Device, "of", classmethod(lambda cls, x: device)),
    ):
        yield machine
