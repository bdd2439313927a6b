"""Follow a warp through machine code: which instructions it executes, and how often.

Integers, addresses and predicates are computed, as far as they follow from the arguments and from tensors of integers.
Everything else is unknown. A branch whose condition is unknown is not taken; so code that it might skip counts, and a
loop ends. If there is one such branch onwards, it can be taken instead: the two ways tell what the skipped code costs.
Threads that part are followed one after the other, those furthest behind first.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.kernels.machine_code import MATRIX, instructions

LANES = 32
MASK = 0xFFFFFFFF
MOST_STEPS = 100_000
MOST_TURNS = 8
"""After so many meetings a branch onwards whose condition is unknown is taken: it may be the only way out of a loop."""
FIRST_ADDRESS = 33
"""Tensors lie 2 to the power of this apart, the first of them at once this address."""
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Value = tuple[Ints, Bools]
"""Of each thread: a number of 32 bits, without sign, and whether it is known. A predicate: 0 or 1."""
PARAMETERS = {80: 0x160, 90: 0x210, 100: 0x380, 120: 0x380}
"""Where a kernel's arguments begin in constant memory."""
GRID = {80: 0xC, 90: 0xC, 100: 0x370, 120: 0x370}
"""Where the grid's size is."""
_TRUE: Bools = np.ones(LANES, bool)
_FALSE: Bools = np.zeros(LANES, bool)


class WalkError(Exception):
    """The code has a form that cannot be followed."""


def _constant(value: int) -> Value:
    return np.full(LANES, value & MASK, np.int64), _TRUE


_ZERO = _constant(0)
_UNKNOWN: Value = (_ZERO[0], _FALSE)


def _signed(v: Ints) -> Ints:
    return np.where(v >> 31 & 1, v - (1 << 32), v)


@dataclass(frozen=True)
class _Instruction:
    """guard: predicate and whether it is negated. name, parts: `IMAD`, (`WIDE`, `U32`), also where `UIMAD` is meant."""

    opcode: str
    guard: tuple[str, bool] | None
    name: str
    parts: tuple[str, ...]
    operands: tuple[str, ...]


_UNIFORM = re.compile(r"U(?=IADD3|IMAD|ISETP|LEA|MOV|SHF|SEL|LOP3|PLOP3|SGXT|VIMNMX|PRMT|POPC)")


def _parse(text: str) -> _Instruction:
    guard = None
    if found := re.match(r"@(!?)(U?P[T\d]+)\s+", text):
        guard, text = (found[2], bool(found[1])), text[found.end() :]
    opcode, _, rest = re.sub(r"\s+(&|\?).*", "", text).partition(" ")
    plain = _UNIFORM.sub("", opcode, count=1) if opcode.startswith("U") else opcode
    name, *parts = plain.split(".")
    operands = tuple(re.sub(r"\.reuse", "", o.strip()) for o in rest.split(",")) if rest.strip() else ()
    return _Instruction(opcode, guard, name, tuple(parts), operands)


class Walk:
    """A warp on its way.

    Attributes:
        executed: instructions by opcode, with modifiers.
    """

    def __init__(
        self,
        lines: Sequence[str],
        capability: int,
        parameters: Sequence[int],
        arguments: Sequence["int | NDArray[np.generic] | None"],
        program: Sequence[int],
        grid: Sequence[int],
        warp: int = 0,
        skip: bool = False,
    ) -> None:
        """
        Args:
            lines: of the disassembly.
            capability: such as 90.
            parameters: bytes of each of the kernel's parameters.
            arguments: of its first parameters: numbers, tensors of integers, None: a tensor of what does not matter.
            program, grid: its place, and the launch's sizes.
            warp: of the program.
            skip: take the one branch onwards whose condition is unknown.
        """
        self._skip = skip
        code, labels = instructions(lines)
        self._code, self._labels = [_parse(text) for text in code], labels
        self._registers: dict[str, Value] = {}
        self._predicates: dict[str, Value] = {}
        self._bank: dict[int, int] = {}
        self._tensors: dict[int, bytes] = {}
        capability = max(c for c in PARAMETERS if c <= capability)
        at = PARAMETERS[capability]
        for i, size in enumerate(parameters):
            at += -at % size
            given = arguments[i] if i < len(arguments) else 0
            if isinstance(given, np.ndarray):
                self._tensors[i + 1] = given.tobytes()
            value = int(given) if isinstance(given, int | np.integer) else i + 1 << FIRST_ADDRESS
            for word in range(size // 4):
                self._bank[at + 4 * word] = value >> 32 * word & MASK
            at += size
        for axis in range(3):
            self._bank[GRID[capability] + 4 * axis] = grid[axis] if axis < len(grid) else 1
        self._special = {f"SR_CTAID.{n}": program[i] if i < len(program) else 0 for i, n in enumerate("XYZ")}
        self._thread = (np.arange(LANES, dtype=np.int64) + LANES * warp, _TRUE)
        self.executed: Counter[str] = Counter()

    # Operands

    def _predicate(self, name: str) -> Value:
        if name.startswith("!"):
            value, known = self._predicate(name[1:])
            return 1 - value, known
        if name in ("PT", "UPT"):
            return _constant(1)
        return self._predicates.get(name, _UNKNOWN)

    def _register(self, name: str) -> Value:
        if name in ("RZ", "URZ", "SRZ"):
            return _ZERO
        return self._registers.get(name, _UNKNOWN)

    def _read(self, text: str) -> Value:
        if text.startswith("-"):
            value, known = self._read(text[1:])
            return -value & MASK, known
        if text.startswith("~"):
            value, known = self._read(text[1:])
            return value ^ MASK, known
        if re.fullmatch(r"U?R(Z|\d+)", text) or text == "SRZ":
            return self._register(text)
        if re.fullmatch(r"0x[0-9a-f]+", text):
            return _constant(int(text, 16))
        if found := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", text):
            at = int(found[1], 16)
            return _constant(self._bank[at]) if at in self._bank else _UNKNOWN
        return _UNKNOWN

    def _next(self, text: str) -> str:
        """The upper half of a pair, by the name of the lower one."""
        if found := re.fullmatch(r"(U?R)(\d+)", text):
            return f"{found[1]}{int(found[2]) + 1}"
        if found := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", text):
            return f"c[0x0][{int(found[1], 16) + 4:#x}]"
        return "RZ"

    def _pair(self, text: str) -> Value:
        """Of 64 bits, without sign in the sense of Python's shifts of int64."""
        sign = text.startswith("-")
        text = text.lstrip("-").removesuffix(".64")
        (low, known), (high, known_too) = self._read(text), self._read(self._next(text))
        value = low | high << 32
        return -value if sign else value, known & known_too

    def _write(self, name: str, value: Value, w: Bools) -> None:
        if name in ("RZ", "URZ"):
            return
        old = self._register(name)
        self._registers[name] = np.where(w, value[0] & MASK, old[0]), np.where(w, value[1], old[1])

    def _write_pair(self, name: str, value: Value, w: Bools) -> None:
        self._write(name, (value[0] & MASK, value[1]), w)
        self._write(self._next(name), (value[0] >> 32 & MASK, value[1]), w)

    def _write_predicate(self, name: str, value: Value, w: Bools) -> None:
        if name not in ("PT", "UPT"):
            old = self._predicates.get(name, _UNKNOWN)
            self._predicates[name] = np.where(w, value[0], old[0]), np.where(w, value[1], old[1])

    # The way

    def run(self) -> "Walk":
        """To the end.

        Raises:
            WalkError: it does not end, or more than one branch is to be taken.
        """
        ready: dict[int, Bools] = {0: _TRUE}
        steps, unsure = 0, Counter[int]()
        while ready:
            at = min(ready)
            w = ready.pop(at)
            i = self._code[at]
            steps += 1
            if steps > MOST_STEPS:
                raise WalkError(f"no end after {MOST_STEPS} instructions, at {i.opcode}")
            if i.name != "NOP":
                self.executed[i.opcode] += 1
            takes, known = w, _TRUE
            if i.guard is not None:
                value, known = self._predicate(i.guard[0])
                takes = w & known & ((value == 0) if i.guard[1] else (value != 0))
            if i.name in ("BRA", "CALL", "EXIT") and not known.all() and self._onwards(i, at):
                unsure[at] += 1
                if self._skip and len(unsure) > 1:
                    raise WalkError(f"not the only branch that may skip something: {i.opcode}, instruction {at}")
                if self._skip or unsure[at] > MOST_TURNS:
                    takes = takes | (w & ~known)
            stays = w
            # A call that never returns is a jump.
            if i.name == "BRA" or (i.name == "CALL" and "NOINC" in i.parts):
                if any(re.fullmatch(r"!?UP[T\d]+", o) for o in i.operands[:-1]):
                    value, sure = self._predicate(i.operands[0])
                    takes = takes & sure & (value != 0)
                target = self._labels[i.operands[-1].strip("`()")]
                stays = w & ~takes
                if takes.any():
                    ready[target] = ready.get(target, _FALSE) | takes
            elif i.name in ("EXIT", "RET"):
                stays = w & ~takes
            else:
                self._step(i, takes)
                if (w & ~known).any():
                    self._forget(i, w & ~known)
            if stays.any():
                if at + 1 >= len(self._code):
                    raise WalkError("threads run beyond the last instruction")
                ready[at + 1] = ready.get(at + 1, _FALSE) | stays
        return self

    def _onwards(self, i: _Instruction, at: int) -> bool:
        """Whether a branch leads on, or out."""
        return i.name == "EXIT" or self._labels.get(i.operands[-1].strip("`()"), 0) > at

    def _step(self, i: _Instruction, w: Bools) -> None:
        done = _OPERATIONS.get(i.name)
        if done is None or not done(self, i, w):
            self._forget(i, w)

    def _forget(self, i: _Instruction, w: Bools) -> None:
        """Results of which nothing is known. The widest results take four registers."""
        if not i.operands or i.name in _NO_RESULT:
            return
        first = i.operands[0]
        if re.fullmatch(r"U?P[T\d]+", first):
            for o in i.operands[:2]:
                if re.fullmatch(r"U?P\d+", o):
                    self._write_predicate(o, _UNKNOWN, w)
            first = next((o for o in i.operands if re.fullmatch(r"U?R\d+", o)), "RZ") if i.name != "ISETP" else "RZ"
        size = 1
        if (i.parts and i.parts[-1] == "128") or "M88" in i.parts or i.name.startswith(("HMMA", "IMMA")):
            size = 4
        elif {"64", "WIDE"} & set(i.parts) or i.name == "CS2R":
            size = 2
        for _ in range(size):
            if re.fullmatch(r"U?R\d+", first):
                self._write(first, _UNKNOWN, w)
            first = self._next(first)


_NO_RESULT = {"STG", "STS", "STSM", "BAR", "BSSY", "BSYNC", "CCTL", "DEPBAR", "LDGDEPBAR", "LDGSTS", "MEMBAR", "ERRBAR",
              "CGAERRBAR", "WARPSYNC", "RED", "NOP", "WARPGROUP"}  # fmt: skip
Operation = Callable[[Walk, _Instruction, Bools], bool]
_PREDICATE = re.compile(r"!?U?P[T\d]+")


def _results(i: _Instruction) -> tuple[str, list[str], list[str]]:
    """A result, its further results (predicates), and what it is made of."""
    first, *rest = i.operands
    carries = []
    while rest and re.fullmatch(r"U?P[T\d]+", rest[0]):
        carries.append(rest.pop(0))
    return first, carries, rest


def _all(values: Sequence[Value]) -> Bools:
    known = _TRUE
    for _, one in values:
        known = known & one
    return known


def _move(walk: Walk, i: _Instruction, w: Bools) -> bool:
    if "64" in i.parts:
        walk._write_pair(i.operands[0], walk._pair(i.operands[1]), w)
    else:
        walk._write(i.operands[0], walk._read(i.operands[1]), w)
    return True


def _special(walk: Walk, i: _Instruction, w: Bools) -> bool:
    name = i.operands[1]
    if name == "SRZ":
        walk._write_pair(i.operands[0], _ZERO, w)
    elif name == "SR_TID.X":
        walk._write(i.operands[0], walk._thread, w)
    elif name in walk._special:
        walk._write(i.operands[0], _constant(walk._special[name]), w)
    else:
        return False
    return True


def _load_constant(walk: Walk, i: _Instruction, w: Bools) -> bool:
    words = int(i.parts[0]) // 32 if i.parts and i.parts[0].isdigit() else 1
    to, source = i.operands[0], i.operands[1]
    for _ in range(words):
        walk._write(to, walk._read(source), w)
        to, source = walk._next(to), walk._next(source)
    return True


def _add(walk: Walk, i: _Instruction, w: Bools) -> bool:
    to, carries, rest = _results(i)
    if "64" in i.parts:
        pairs = [walk._pair(o) for o in rest if not _PREDICATE.fullmatch(o)]
        walk._write_pair(to, (sum(v for v, _ in pairs), _all(pairs)), w)  # type: ignore[arg-type]
        return not [c for c in carries if c not in ("PT", "UPT")]
    given = [walk._read(o) for o in rest if not _PREDICATE.fullmatch(o)]
    if "X" in i.parts:
        given += [walk._predicate(o) for o in rest if _PREDICATE.fullmatch(o)]
    total, known = sum(v for v, _ in given), _all(given)
    # Of two carries each is 0 or 1: their sum goes into the first one and what is left into the second.
    left = np.asarray(total) >> 32
    # A negated number carries as its complement and one more.
    for o in rest:
        if o.startswith("-") and not _PREDICATE.fullmatch(o):
            left = left + (walk._read(o)[0] == 0)
    for c in carries:
        one = np.minimum(left, 1)
        walk._write_predicate(c, (one, known), w)
        left = left - one
    walk._write(to, (np.asarray(total), known), w)
    return True


def _multiply(walk: Walk, i: _Instruction, w: Bools) -> bool:
    if "MOV" in i.parts:
        walk._write(i.operands[0], walk._read(i.operands[-1]), w)
        return True
    to, carries, rest = _results(i)
    extra = [walk._predicate(o) for o in rest if _PREDICATE.fullmatch(o)]
    rest = [o for o in rest if not _PREDICATE.fullmatch(o)]
    a, b = walk._read(rest[0]), walk._read(rest[1])
    if carries:
        return False
    if "WIDE" in i.parts or "HI" in i.parts:
        c = walk._pair(rest[2]) if re.fullmatch(r"-?U?R\d+(\.64)?|c\[.*", rest[2]) else walk._read(rest[2])
        x, y = (a[0], b[0]) if "U32" in i.parts else (_signed(a[0]), _signed(b[0]))
        known = a[1] & b[1] & c[1]
        exact = [int(p) * int(q) + int(r) for p, q, r in zip(x, y, c[0], strict=True)]
        if "HI" in i.parts:
            walk._write(to, (np.array([e >> 32 & MASK for e in exact], np.int64), known), w)
        else:
            wrapped = [(e + (1 << 63)) % (1 << 64) - (1 << 63) for e in exact]
            walk._write_pair(to, (np.array(wrapped, np.int64), known), w)
        return True
    c = walk._read(rest[2])
    product = _signed(a[0]) * _signed(b[0])
    total = product + c[0] + sum(v for v, _ in extra if "X" in i.parts)
    walk._write(to, (total & MASK, a[1] & b[1] & c[1] & _all(extra)), w)
    return True


def _scaled(walk: Walk, i: _Instruction, w: Bools) -> bool:
    to, carries, rest = _results(i)
    extra = [walk._predicate(o) for o in rest if _PREDICATE.fullmatch(o)]
    rest = [o for o in rest if not _PREDICATE.fullmatch(o)]
    shift = int(rest[-1], 16)
    a, b = walk._read(rest[0]), walk._read(rest[1])
    known = a[1] & b[1] & _all(extra)
    if "HI" in i.parts:
        if "SX32" in i.parts:
            moved = _signed(a[0]) >> (32 - shift)
        else:
            c = walk._read(rest[2]) if len(rest) == 4 else _ZERO
            known = known & c[1]
            moved = (c[0] << shift | a[0] >> (32 - shift)) & MASK
    else:
        moved = a[0] << shift & MASK
    total = (moved & MASK) + b[0] + (extra[0][0] if "X" in i.parts and extra else 0)
    for c_name in carries[:1]:
        walk._write_predicate(c_name, (total >> 32, known), w)
    walk._write(to, (total & MASK, known), w)
    return True


def _shift(walk: Walk, i: _Instruction, w: Bools) -> bool:
    to, low, by, high = i.operands
    a, s, c = walk._read(low), walk._read(by), walk._read(high)
    known = a[1] & s[1] & c[1]
    if (s[0][known] > 63).any():
        return False
    n = np.minimum(s[0], 63)
    whole = a[0] | c[0] << 32
    if "L" in i.parts:
        out = whole << n
    elif {"S32", "S64"} & set(i.parts):
        out = whole >> n
    else:
        out = (whole.astype(np.uint64) >> n.astype(np.uint64)).astype(np.int64)
    if "HI" in i.parts:
        out = out >> 32
    walk._write(to, (out & MASK, known), w)
    return True


def _table(inputs: Sequence[Value], table: int, bits: int) -> Value:
    """A function of three by its table, and where it is known: of what is known it may not depend on the rest."""
    full = (1 << bits) - 1
    out = np.zeros(LANES, np.int64)
    for row in range(8):
        if table >> row & 1:
            term = np.full(LANES, full, np.int64)
            for n, (v, _) in enumerate(inputs):
                term &= v if row >> (2 - n) & 1 else v ^ full
            out |= term
    known = _all(inputs)
    for n in range(3):
        # Where the others decide alone, this one need not be known.
        others = [v for m, v in enumerate(inputs) if m != n]
        zero = _table_fixed(inputs, table, full, n, 0)
        one = _table_fixed(inputs, table, full, n, full)
        known = known | (_all(others) & (zero == one))
    return out, known


def _table_fixed(inputs: Sequence[Value], table: int, full: int, n: int, value: int) -> Ints:
    out = np.zeros(LANES, np.int64)
    for row in range(8):
        if table >> row & 1:
            term = np.full(LANES, full, np.int64)
            for m, (v, _) in enumerate(inputs):
                v = np.full(LANES, value, np.int64) if m == n else v
                term &= v if row >> (2 - m) & 1 else v ^ full
            out |= term
    return out


def _logic(walk: Walk, i: _Instruction, w: Bools) -> bool:
    operands = list(i.operands)
    flag = operands.pop(0) if re.fullmatch(r"U?P[T\d]+", operands[0]) else None
    to, a, b, c, table, *_ = operands
    value = _table([walk._read(o) for o in (a, b, c)], int(table, 16), 32)
    walk._write(to, value, w)
    if flag:
        walk._write_predicate(flag, ((value[0] != 0).astype(np.int64), value[1]), w)
    return True


def _predicate_logic(walk: Walk, i: _Instruction, w: Bools) -> bool:
    first, second, a, b, c, table, other = i.operands
    inputs = [walk._predicate(o) for o in (a, b, c)]
    values = [_table(inputs, int(t, 16), 1) for t in (table, other)]
    for name, value in zip((first, second), values, strict=True):
        walk._write_predicate(name, value, w)
    return True


def _compare(walk: Walk, i: _Instruction, w: Bools) -> bool:
    kind, parts = i.parts[0], i.parts
    first, second, a_name, b_name, with_name, *more = i.operands
    wide = "U64" in parts or "S64" in parts
    a, b = (walk._pair(a_name), walk._pair(b_name)) if wide else (walk._read(a_name), walk._read(b_name))
    x, y = a[0], b[0]
    if wide and "U64" in parts:
        x, y = x.astype(np.uint64), y.astype(np.uint64)
    elif not wide and "U32" not in parts:
        x, y = _signed(x), _signed(y)
    known = a[1] & b[1]
    lower = walk._predicate(more[0]) if "EX" in parts else None
    equal = x == y
    found = {"LT": x < y, "GT": x > y, "GE": x > y, "LE": x < y, "EQ": equal, "NE": ~equal, "T": _TRUE, "F": _FALSE}[
        kind
    ]
    if lower is not None:
        known = known & lower[1]
        under = lower[0] != 0
        found = equal & under if kind == "EQ" else found | (equal & under) if kind != "NE" else ~equal | under
    elif kind in ("GE", "LE"):
        found = found | equal
    other = walk._predicate(with_name)

    def combined(value: Bools) -> Value:
        v, o = value.astype(np.int64), other[0]
        if "AND" in parts:
            sure = (known & other[1]) | (known & (v == 0)) | (other[1] & (o == 0))
            return np.where((known & (v == 0)) | (other[1] & (o == 0)), 0, v & o), sure
        if "OR" in parts:
            sure = (known & other[1]) | (known & (v == 1)) | (other[1] & (o == 1))
            return np.where((known & (v == 1)) | (other[1] & (o == 1)), 1, v | o), sure
        return v ^ o, known & other[1]

    one, two = combined(found), combined(~found)
    walk._write_predicate(first, one, w)
    walk._write_predicate(second, two, w)
    return True


def _select(walk: Walk, i: _Instruction, w: Bools) -> bool:
    to, a_name, b_name, p_name = i.operands
    a, b, p = walk._read(a_name), walk._read(b_name), walk._predicate(p_name)
    walk._write(to, (np.where(p[0] != 0, a[0], b[0]), p[1] & np.where(p[0] != 0, a[1], b[1])), w)
    return True


def _least(walk: Walk, i: _Instruction, w: Bools) -> bool:
    to, *names = [o for o in i.operands if not _PREDICATE.fullmatch(o)]
    p = walk._predicate(i.operands[-1])
    given = [walk._read(o) for o in names]
    if i.name == "VIADDMNMX":
        given = [(given[0][0] + given[1][0] & MASK, given[0][1] & given[1][1]), given[2]]
    a, b = (v if "U32" in i.parts else _signed(v) for v, _ in given)
    walk._write(to, (np.where(p[0] != 0, np.minimum(a, b), np.maximum(a, b)) & MASK, _all(given) & p[1]), w)
    return True


def _bytes(walk: Walk, i: _Instruction, w: Bools) -> bool:
    to, a_name, choice, b_name = i.operands
    a, s, b = walk._read(a_name), walk._read(choice), walk._read(b_name)
    out = np.zeros(LANES, np.int64)
    for n in range(4):
        which = s[0] >> 4 * n & 7
        out |= np.where(which < 4, a[0] >> 8 * which, b[0] >> 8 * (which & 3)) >> 0 << 8 * n & (0xFF << 8 * n)
    walk._write(to, (out, a[1] & s[1] & b[1]), w)
    return not (s[0] & 0x8888).any()


def _extend(walk: Walk, i: _Instruction, w: Bools) -> bool:
    to, a_name, by = i.operands
    a, bits = walk._read(a_name), int(by, 16)
    v = a[0] & ((1 << bits) - 1)
    if "U32" not in i.parts:
        v = np.where(v >> (bits - 1) & 1, v - (1 << bits), v) & MASK
    walk._write(to, (v, a[1]), w)
    return True


def _absolute(walk: Walk, i: _Instruction, w: Bools) -> bool:
    a = walk._read(i.operands[1])
    walk._write(i.operands[0], (np.abs(_signed(a[0])), a[1]), w)
    return True


def _ones(walk: Walk, i: _Instruction, w: Bools) -> bool:
    a = walk._read(i.operands[1])
    walk._write(i.operands[0], (np.array([int(v).bit_count() for v in a[0]], np.int64), a[1]), w)
    return True


def _bits_of(v: NDArray[np.float32]) -> Ints:
    return v.view(np.uint32).astype(np.int64)


def _to_float(walk: Walk, i: _Instruction, w: Bools) -> bool:
    """For divisions of integers: rounded up where the code asks for it."""
    if i.parts not in (("RP",), ("U32", "RP")):
        return False
    a = walk._read(i.operands[1])
    v = a[0].astype(np.float32)
    v = np.where(v.astype(np.float64) < a[0], np.nextafter(v, np.float32(np.inf)), v)
    walk._write(i.operands[0], (_bits_of(v), a[1]), w)
    return True


def _reciprocal(walk: Walk, i: _Instruction, w: Bools) -> bool:
    if i.parts != ("RCP",):
        return False
    a = walk._read(i.operands[1])
    with np.errstate(all="ignore"):
        v = np.float32(1) / a[0].astype(np.uint32).view(np.float32)
    walk._write(i.operands[0], (_bits_of(v), a[1]), w)
    return True


def _to_int(walk: Walk, i: _Instruction, w: Bools) -> bool:
    if not {"U32", "TRUNC"} <= set(i.parts):
        return False
    a = walk._read(i.operands[1])
    with np.errstate(all="ignore"):
        v = np.nan_to_num(a[0].astype(np.uint32).view(np.float32)).astype(np.float64)
    walk._write(i.operands[0], (np.clip(v, 0, MASK).astype(np.int64), a[1]), w)
    return True


def _load(walk: Walk, i: _Instruction, w: Bools) -> bool:
    where = re.search(r"\[(U?R\d+)(?:\.64|\.U32)?(?:\+(UR\d+))?(?:\+(-?0x[0-9a-f]+))?\]$", i.operands[-1])
    if where is None or {"U8", "S8", "U16", "S16"} & set(i.parts):
        return False
    base = walk._pair(where[1])
    at, known = base[0] + int(where[3] or "0", 16), base[1]
    if where[2]:
        more = walk._pair(where[2])
        at, known = at + more[0], known & more[1]
    to = i.operands[0]
    for word in range({"64": 2, "128": 4}.get(i.parts[-1] if i.parts else "", 1)):
        out, sure = np.zeros(LANES, np.int64), np.zeros(LANES, bool)
        for lane in np.flatnonzero(known & w):
            tensor, place = divmod(int(at[lane]) + 4 * word, 1 << FIRST_ADDRESS)
            held = walk._tensors.get(tensor, b"")
            if place + 4 <= len(held):
                out[lane], sure[lane] = int.from_bytes(held[place : place + 4], "little"), True
        walk._write(to, (out, sure), w)
        to = walk._next(to)
    return True


def _shuffle(walk: Walk, i: _Instruction, w: Bools) -> bool:
    flag, to, name, by, _ = i.operands
    if flag != "PT" or not w.all():
        return False
    a, n = walk._read(name), walk._read(by)
    lane = np.arange(LANES)
    if "BFLY" in i.parts:
        source = lane ^ n[0]
    elif "IDX" in i.parts:
        source = n[0]
    elif "UP" in i.parts:
        source = np.where(lane >= n[0], lane - n[0], lane)
    else:
        return False
    source = source % LANES
    walk._write(to, (a[0][source], a[1][source] & n[1]), w)
    return True


def _reduced(walk: Walk, i: _Instruction, w: Bools) -> bool:
    a = walk._read(i.operands[1])
    if "SUM" not in i.parts or not w.all() or not a[1].all():
        return False
    walk._write(i.operands[0], _constant(int(a[0].sum())), w)
    return True


def _to_uniform(walk: Walk, i: _Instruction, w: Bools) -> bool:
    walk._write(i.operands[0], walk._read(i.operands[1]), w)
    return True


_OPERATIONS: Mapping[str, Operation] = {
    "MOV": _move, "S2R": _special, "S2UR": _special, "CS2R": _special, "LDC": _load_constant, "ULDC": _load_constant,
    "LDCU": _load_constant, "IADD3": _add, "VIADD": _add, "IADD": _add, "IMAD": _multiply, "LEA": _scaled,
    "SHF": _shift, "LOP3": _logic, "PLOP3": _predicate_logic, "ISETP": _compare, "SEL": _select, "VIMNMX": _least,
    "IMNMX": _least, "VIADDMNMX": _least, "PRMT": _bytes, "SGXT": _extend, "IABS": _absolute, "POPC": _ones,
    "I2F": _to_float, "MUFU": _reciprocal, "F2I": _to_int, "LDG": _load, "R2UR": _to_uniform,
    "SHFL": _shuffle, "REDUX": _reduced,
}  # fmt: skip


def products(executed: Counter[str]) -> int:
    """Multiplications with additions of a warp's matrix instructions."""
    total = 0
    for opcode, times in executed.items():
        if found := re.match(r"HMMA\.16(8)(16|8)\.", opcode):
            total += times * 16 * 8 * int(found[2])
        elif found := re.match(r"HGMMA\.64x(\d+)x(\d+)\.", opcode):
            # Of four warps together.
            total += times * 16 * int(found[1]) * int(found[2])
        elif opcode.startswith(tuple(MATRIX)):
            raise WalkError(f"{opcode}: nothing is known of its size")
    return total


def followed(
    kernel: Any,
    lines: Sequence[str],
    source: Any,
    capability: int,
    given: Mapping[str, "int | NDArray[np.generic]"],
    program: Sequence[int],
    grid: Sequence[int],
    skip: bool = False,
) -> Counter[str]:
    """What a warp of a compiled kernel executes.

    Args:
        kernel: as `machine_code.compiled` makes it.
        lines: its disassembly.
        source: its function.
        capability: such as 90.
        given: arguments by name, those that decide about the way.
        program, grid, skip: see `Walk`.
    """
    sizes = [8 if t.endswith("64") else 4 for t in re.findall(r"\.param\s+\.(\w+)", kernel.asm["ptx"])]
    names = [p.name for p in source.params if not p.is_constexpr]
    return Walk(lines, capability, sizes, [given.get(n) for n in names], program, grid, skip=skip).run().executed
