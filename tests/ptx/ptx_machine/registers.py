"""The register file of some programs, and operands in it.

A register is an array over the threads of all programs that run side by side. Its bits are kept as an unsigned integer
of its class, and seen through views as a signed one or a float. Constants are registers of one element that no
instruction writes: so every operand is an index.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ptx_machine.faults import UnknownInstructionError
from ptx_machine.parser import Address, Constant, Instruction, Operand, Register, Symbol, Vector

if TYPE_CHECKING:
    from ptx_machine.control import Programs

Array = NDArray[Any]
Mask = Any
"""Threads that take part: bool [threads], or True for all."""
Step = Callable[["Programs", Mask], None]
"""An instruction, decoded."""

SIZES = {"b8": 1, "b16": 2, "b32": 4, "b64": 8}
"""Bytes of a register's class."""
UNSIGNED: dict[str, Any] = {"pred": np.bool_, "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
_SIGNED: dict[str, Any] = {"pred": np.bool_, "b8": np.int8, "b16": np.int16, "b32": np.int32, "b64": np.int64}
_FLOAT: dict[str, Any] = {"pred": np.bool_, "b8": np.uint8, "b16": np.float16, "b32": np.float32, "b64": np.float64}
_POISON = {"pred": 0, "b8": 0xAD, "b16": 0x7EAD, "b32": 0x7FEEDEA0, "b64": 0x7FFEEDED7FEEDEA0}
"""What a register holds before it is written: NaN, or an address of nothing."""
SPECIAL = ("%tid.x", *(f"%{name}.{axis}" for name in ("ctaid", "nctaid") for axis in "xyz"))


def type_class(kind: str) -> str:
    """Class of registers that a type such as `f32` takes."""
    digits = kind.lstrip("usbf")
    if kind[0] not in "usbf" or f"b{digits}" not in SIZES:
        raise UnknownInstructionError(f"type {kind}")
    return f"b{digits}"


class Slots:
    """Places of a kernel's registers and constants in the file.

    Attributes:
        classes: class of each place.
        values: bits of the constants, by place.
    """

    def __init__(self, declared: dict[str, str], shared: str, parameters: list[str]) -> None:
        self._places: dict[str, int] = {}
        self._constants: dict[tuple[int, str], int] = {}
        self.classes: list[str] = []
        self.values: dict[int, int] = {}
        self.parameters = {name: i for i, name in enumerate(parameters)}
        self._shared = shared
        for name, kind in {**declared, **dict.fromkeys(SPECIAL, "b32")}.items():
            self._places[name] = len(self.classes)
            self.classes.append(kind)

    def place(self, name: str) -> int:
        """Of a register by its name."""
        return self._places[name]

    def constant(self, bits: int, kind: str) -> int:
        """A place that holds a number in a class."""
        key = (bits, kind)
        if key not in self._constants:
            self._constants[key] = len(self.classes)
            self.values[len(self.classes)] = bits
            self.classes.append(kind)
        return self._constants[key]

    def read(self, operand: Operand, kind: str, i: Instruction) -> int:
        """An operand that is read as a class."""
        if isinstance(operand, Constant):
            return self.constant(operand.bits, kind)
        if isinstance(operand, Symbol) and operand.name == self._shared:
            return self.constant(0, kind)
        if not isinstance(operand, Register) or operand.name not in self._places:
            raise UnknownInstructionError(f"operand {operand} of {i.text}")
        place = self._places[operand.name]
        if self.classes[place] != kind:
            raise UnknownInstructionError(f"{operand.name} is no {kind}: {i.text}")
        return place

    def read_any(self, operand: Operand, i: Instruction) -> tuple[int, str]:
        """A register that is read in its own class: its place and class."""
        if not isinstance(operand, Register) or operand.name not in self._places:
            raise UnknownInstructionError(f"operand {operand} of {i.text}")
        place = self._places[operand.name]
        return place, self.classes[place]

    def written(self, operand: Operand, kind: str, i: Instruction) -> int:
        """A register that is written."""
        if not isinstance(operand, Register) or operand.name in SPECIAL:
            raise UnknownInstructionError(f"{i.text} writes to {operand}")
        return self.read(operand, kind, i)

    def parts(self, operand: Operand) -> tuple[Operand, ...]:
        """Of a vector, or the operand alone."""
        return operand.parts if isinstance(operand, Vector) else (operand,)

    def address(self, operand: Operand, kind: str, i: Instruction) -> tuple[int, int]:
        """Base register, as a class, and offset in bytes."""
        if not isinstance(operand, Address):
            raise UnknownInstructionError(f"no address in {i.text}")
        return self.read(operand.base, kind, i), operand.offset


class File:
    """Values of all places for a number of threads.

    Attributes:
        u, s, f: arrays of each place: unsigned, signed, float; of constants numbers.
    """

    def __init__(self, slots: Slots, threads: int) -> None:
        self.u: list[Any] = [None] * len(slots.classes)
        self.s, self.f = list(self.u), list(self.u)
        for kind, unsigned in UNSIGNED.items():
            places = [at for at, one in enumerate(slots.classes) if one == kind and at not in slots.values]
            rows = np.full((len(places), threads), _POISON[kind], unsigned)
            for at, u, s, f in zip(places, rows, rows.view(_SIGNED[kind]), rows.view(_FLOAT[kind]), strict=True):
                self.u[at], self.s[at], self.f[at] = u, s, f
        for at, bits in slots.values.items():
            kind = slots.classes[at]
            number = UNSIGNED[kind](bits & ((1 << 8 * SIZES.get(kind, 1)) - 1))
            self.u[at], self.s[at], self.f[at] = number, number.view(_SIGNED[kind]), number.view(_FLOAT[kind])


def put(target: Array, value: Any, mask: Mask) -> None:
    """Write a register, of the threads that take part."""
    if mask is True:
        target[...] = value
    else:
        np.copyto(target, value, where=mask, casting="same_kind")


def over(value: Any, threads: int) -> Array:
    """A register's array, or a constant for every thread."""
    return value if isinstance(value, np.ndarray) else np.full(threads, value)
