"""PTX text to instructions.

Only what Triton writes is understood: one entry function, one array of shared memory, registers declared by class.
"""

import re
from dataclasses import dataclass, field

from ptx_machine.faults import UnknownInstructionError


@dataclass(frozen=True)
class Register:
    """A register by its name; names of an inner scope are made unique."""

    name: str


@dataclass(frozen=True)
class Constant:
    """A number in the text: an integer, or the bits of a float32 or float64."""

    bits: int


@dataclass(frozen=True)
class Symbol:
    """A parameter, the shared array, or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]: base a register or a symbol, offset in bytes."""

    base: Register | Symbol
    offset: int


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}."""

    parts: tuple["Operand", ...]


Operand = Register | Constant | Symbol | Address | Vector


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: its name with all modifiers, parted at the dots.
        operands: in the text's order.
        guard: register of its predicate, if it has one, and whether the predicate is negated.
        text: as written.
        place: line of the kernel's source, as Triton notes it.
    """

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None
    text: str
    place: str


@dataclass
class Kernel:
    """A parsed entry function.

    Attributes:
        name: of the function.
        parameters: their names, in order.
        threads: of a program, as the text requires.
        registers: class of each register: `pred`, `b8`, `b16`, `b32` or `b64`.
        code: instructions, in order.
        labels: label to the place in `code` that it stands before.
        shared: name of the shared array.
    """

    name: str
    parameters: list[str]
    threads: int
    registers: dict[str, str] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: str = ""


_CLASSES = {"pred": "pred", "8": "b8", "16": "b16", "32": "b32", "64": "b64"}


def parse(text: str) -> Kernel:
    """The one kernel of a PTX module."""
    text = re.split(r"\n\s*\.section", text)[0]
    shared = re.search(r"\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[", text)
    entry = re.search(r"\.entry\s+([\w$]+)\((.*?)\)(.*?)\n\{", text, re.DOTALL)
    if entry is None:
        raise UnknownInstructionError("no entry function")
    threads = re.search(r"\.reqntid\s+(\d+)", entry[3])
    if threads is None:
        raise UnknownInstructionError("the number of threads is not given")
    kernel = Kernel(entry[1], re.findall(r"([\w$]+)\s*(?:,|$)", entry[2].strip()), int(threads[1]))
    kernel.shared = shared[1] if shared else ""
    _Body(kernel).read(text[entry.end() :])
    return kernel


class _Body:
    """The text between a kernel's outer braces."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes: list[dict[str, str]] = [{}]
        self.opened = 0
        self.place = ""

    def read(self, text: str) -> None:
        statement, at = "", 0
        for line in text.splitlines():
            code, _, comment = line.partition("//")
            code = code.strip()
            if code.startswith((".loc ", ".loc\t")):
                self.place = comment.strip()
            elif statement or code:
                statement = f"{statement} {code}".strip()
                at = self._take(statement)
                statement = statement[at:].strip()
            if not self.scopes:
                return
        raise UnknownInstructionError(f"the text ends within {statement!r}")

    def _take(self, text: str) -> int:
        """Handle the whole statements that a text begins with: how many characters they are."""
        at = 0
        while rest := text[at:]:
            if not (found := re.match(r"\s*(?:([\w$]+):|(\{)(?=\s*(?:\.reg|$))|(\})(?=\s*$)|([^;]+);)", rest)):
                break
            label, opens, closes, statement = found.groups()
            if label:
                self.kernel.labels[label] = len(self.kernel.code)
            elif opens:
                self.opened += 1
                self.scopes.append({})
            elif closes:
                self.scopes.pop()
            elif statement.strip().startswith("."):
                self._directive(statement.strip())
            else:
                self._instruction(statement.strip())
            at += found.end()
        return at

    def _directive(self, text: str) -> None:
        if text.startswith(".pragma"):
            return
        found = re.fullmatch(r"\.reg\s+\.([a-z]+)(\d*)\s+(.*)", text)
        if found is None:
            raise UnknownInstructionError(text)
        kind = _CLASSES[found[1] if found[1] == "pred" else found[2]]
        for name in re.split(r"\s*,\s*", found[3]):
            many = re.fullmatch(r"(.+)<(\d+)>", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                inner = one if len(self.scopes) == 1 else f"{one}@{self.opened}"
                self.scopes[-1][one] = inner
                self.kernel.registers[inner] = kind

    def _register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return Register(scope[name])
        return Register(name) if re.fullmatch(r"%[\w.]+", name) else None

    def _instruction(self, text: str) -> None:
        found = re.fullmatch(r"(?:@(!?)(\S+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL)
        if found is None:
            raise UnknownInstructionError(text)
        negated, guard, opcode, operands = found.groups()
        predicate = None
        if guard:
            register = self._register(guard)
            if register is None:
                raise UnknownInstructionError(text)
            predicate = (register, bool(negated))
        parts = tuple(self._operand(one, text) for one in _parted(operands))
        self.kernel.code.append(Instruction(tuple(opcode.split(".")), parts, predicate, text, self.place))

    def _operand(self, text: str, whole: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(one, whole) for one in _parted(text[1:-1])))
        if text.startswith("["):
            base, _, offset = text[1:-1].partition("+")
            origin = self._operand(base.strip(), whole)
            if not isinstance(origin, Register | Symbol):
                raise UnknownInstructionError(whole)
            return Address(origin, int(offset or "0", 0))
        if found := re.fullmatch(r"0[fd]([0-9A-Fa-f]+)", text):
            return Constant(int(found[1], 16))
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
            return Constant(int(text.rstrip("U"), 0))
        if register := self._register(text):
            return register
        if re.fullmatch(r"[\w$]+", text):
            return Symbol(text)
        raise UnknownInstructionError(whole)


def _parted(text: str) -> list[str]:
    """Operands, parted at commas that no bracket holds."""
    parts, depth, last = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            parts.append(text[last:at].strip())
            last = at + 1
    return [*parts, text[last:].strip()] if text.strip() else []
