"""Control flow: blocks of instructions, branches, barriers, and the order in which programs run.

Some programs run side by side, one numpy operation for an instruction of all their threads. Where threads part, those
furthest behind run first, until they meet again. Groups of programs take turns at barriers and atomic operations.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx_machine import matrix, moves, scalar
from ptx_machine.faults import PtxError, UnknownInstructionError
from ptx_machine.matrix import Products
from ptx_machine.memory import Copies, GlobalMemory, SharedMemory
from ptx_machine.ordering import Order
from ptx_machine.parser import Constant, Instruction, Kernel, Symbol, parse
from ptx_machine.registers import SPECIAL, Array, File, Mask, Slots, Step
from tensor_core import MatrixUnit

_CONTROL = {("bra",), ("bra", "uni"), ("ret",), ("bar", "sync")}


@dataclass
class _Block:
    """Instructions that run one after another.

    Attributes:
        steps, texts: what they do, and they themselves.
        ends: the branch, barrier or return at the end, if there is one.
        yields: whether other programs may run behind it.
    """

    steps: list[Step] = field(default_factory=list)
    texts: list[Instruction] = field(default_factory=list)
    ends: Instruction | None = None
    guard: tuple[int, bool] | None = None
    target: int = -1
    yields: bool = False


class Code:
    """A kernel, decoded once.

    Attributes:
        kernel: as parsed.
        slots: places of its registers.
        blocks: of its instructions.
        grain: bytes of shared memory that are told apart.
    """

    def __init__(self, text: str) -> None:
        self.kernel: Kernel = parse(text)
        self.slots = Slots(self.kernel.registers, self.kernel.shared, self.kernel.parameters)
        self.grain = min([4, *(moves.grain(i) for i in self.kernel.code)])
        self.blocks: list[_Block] = []
        starts = self._starts()
        self._number = {at: n for n, at in enumerate(starts)}
        for first, last in zip(starts, [*starts[1:], len(self.kernel.code)], strict=True):
            self.blocks.append(self._block(self.kernel.code[first:last]))

    def _starts(self) -> list[int]:
        code = self.kernel.code
        targets = {i.operands[0].name for i in code if i.opcode[0] == "bra" and isinstance(i.operands[0], Symbol)}
        labels = {at for name, at in self.kernel.labels.items() if name in targets}
        behind = {at + 1 for at, i in enumerate(code) if i.opcode in _CONTROL or i.opcode[0] == "atom"}
        return sorted(at for at in {0} | labels | behind if at < len(code))

    def _block(self, code: Sequence[Instruction]) -> _Block:
        block = _Block()
        for i in code:
            guard = None if i.guard is None else (self.slots.read(i.guard[0], "pred", i), i.guard[1])
            if i.opcode in _CONTROL:
                block.ends, block.guard = i, guard
                if i.opcode[0] == "bra" and isinstance(i.operands[0], Symbol):
                    block.target = self._number[self.kernel.labels[i.operands[0].name]]
                if i.opcode == ("bar", "sync") and (guard or i.operands != (Constant(0),)):
                    raise UnknownInstructionError(i.text)
                continue
            step = scalar.decode(i, self.slots) or moves.decode(i, self.slots) or matrix.decode(i, self.slots)
            if step is None:
                raise UnknownInstructionError(i.text)
            block.steps.append(step if guard is None else _guarded(step, *guard))
            block.texts.append(i)
            block.yields |= i.opcode[0] == "atom"
        return block


def _guarded(step: Step, predicate: int, negated: bool) -> Step:
    def guarded(p: Any, w: Mask) -> None:
        takes_part = ~p.u[predicate] if negated else p.u[predicate]
        if w is not True:
            takes_part = takes_part & w
        if takes_part.all():
            step(p, True)
        elif takes_part.any():
            step(p, takes_part)

    return guarded


class Programs:
    """Some programs of a launch, side by side.

    Attributes:
        programs, threads: their numbers; threads of all of them.
        index: of each thread's program among these.
        program, lane: of each thread: its program in the grid, its number in it.
        u, s, f: registers, see `registers.File`.
        memory, shared, copies, products: memories and what is on its way.
        order, random, rounding: of the launch.
        tick: counts barriers and fences; met, warp_met, fenced: when each thread's program, warp and it itself had its
            last one.
    """

    def __init__(self, code: Code, grid: Sequence[int], chosen: Sequence[int], arguments: Sequence[int], shared: int,
                 launch: "Launch") -> None:  # fmt: skip
        self._code = code
        each = code.kernel.threads
        self.programs, self.threads = len(chosen), len(chosen) * each
        self.index = np.repeat(np.arange(len(chosen)), each)
        self.program = np.repeat(np.asarray(chosen, np.int32), each)
        self.lane = np.tile(np.arange(each, dtype=np.int32), len(chosen))
        file = File(code.slots, self.threads)
        self.u, self.s, self.f = file.u, file.s, file.f
        place = self.program
        for axis, size in zip("xyz", grid, strict=True):
            self._special(f"%ctaid.{axis}", place % size)
            self._special(f"%nctaid.{axis}", size)
            place = place // size
        self._special(SPECIAL[0], self.lane)
        self.arguments = arguments
        self.memory, self.order, self.random = launch.memory, launch.order, launch.random
        self.rounding = launch.rounding
        self.tick = 0
        self.met, self.warp_met, self.fenced = np.zeros((3, self.threads), np.int32)
        self.shared = SharedMemory(self, shared, code.grain)
        self.copies, self.products = Copies(self), Products(self)
        self._all = np.arange(self.threads)
        self._live = np.ones(self.threads, bool)
        self._waiting: dict[int, Array] = {}

    def _special(self, name: str, value: Any) -> None:
        self.u[self._code.slots.place(name)][...] = value

    def who(self, mask: Mask) -> Array:
        """Indices of the threads that take part."""
        return self._all if mask is True else np.flatnonzero(mask)

    def run(self) -> Iterator[None]:
        """Run to the end; stops wherever other programs may run in between."""
        ready: dict[int, Array] = {0: self._live.copy()}
        while ready:
            at = min(ready)
            mask = ready.pop(at)
            block = self._code.blocks[at]
            self._execute(block, True if mask.all() else mask)
            barrier = self._leave(at, block, mask, ready)
            if barrier or block.yields:
                yield

    def _execute(self, block: _Block, w: Mask) -> None:
        n = 0
        try:
            for step in block.steps:
                step(self, w)
                n += 1
        except (PtxError, UnknownInstructionError) as fault:
            i = block.texts[n]
            kind = type(fault)
            raise kind(f"{self._code.kernel.name}: {fault}\n  at {i.text}\n  of {i.place}") from fault

    def _leave(self, at: int, block: _Block, mask: Array, ready: dict[int, Array]) -> bool:
        """Where the threads of a block go; whether a barrier was met."""

        def go(target: int, some: Array) -> None:
            if some.any():
                ready[target] = ready[target] | some if target in ready else some

        def takes() -> Array:
            if block.guard is None:
                return mask
            predicate, negated = block.guard
            return mask & (~self.u[predicate] if negated else self.u[predicate])

        kind = block.ends.opcode[0] if block.ends else ""
        if kind == "bar":
            self._waiting[at] = self._waiting.get(at, False) | mask
            self._meet(go)
            return True
        taken = takes() if kind else mask
        if kind == "bra":
            go(block.target, taken)
            go(at + 1, mask & ~taken)
        elif kind == "ret":
            self._live &= ~taken
            go(at + 1, mask & ~taken)
            self._meet(go)
        else:
            if at + 1 >= len(self._code.blocks):
                raise PtxError("threads run beyond the last instruction")
            go(at + 1, mask)
        return False

    def _meet(self, go: Callable[[int, Array], None]) -> None:
        """Let those programs go on whose threads have all arrived at a barrier."""
        if not self._waiting:
            return
        arrived = np.logical_or.reduce(list(self._waiting.values()))
        whole = (arrived | ~self._live).reshape(self.programs, -1).all(1)
        whole &= arrived.reshape(self.programs, -1).any(1)
        if not whole.any():
            return
        each = self.threads // self.programs
        free = np.repeat(whole, each)
        self.tick += 1
        self.met[free] = self.tick
        self.warp_met[free] = self.tick
        self.order.barrier(self.program[::each][whole])
        for at, mask in list(self._waiting.items()):
            go(at + 1, mask & free)
            self._waiting[at] = mask & ~free
            if not self._waiting[at].any():
                del self._waiting[at]


class Launch:
    """One launch of a kernel over a grid.

    Attributes:
        memory: of the tensors that it was given.
        order: of its programs.
        random: decides who runs when.
        rounding: of matrix products, see `fragments.product`.
    """

    def __init__(self, memory: GlobalMemory, random: np.random.Generator, rounding: MatrixUnit | None) -> None:
        self.memory, self.random, self.rounding = memory, random, rounding
        self.order = Order(0)

    def run(self, code: Code, grid: Sequence[int], arguments: Sequence[int], shared: int, together: int) -> None:
        """Run all programs, in a random order, groups of at most `together` of them side by side.

        grid: three sizes. arguments: of the kernel's parameters: integers, addresses, bits of floats.
        """
        programs = int(np.prod(grid))
        self.order = Order(programs)
        left = self.random.permutation(programs).tolist()
        running: list[Iterator[None]] = []
        with np.errstate(all="ignore"):
            while left or running:
                while left and len(running) < 3:
                    n = int(self.random.integers(1, together + 1))
                    running.append(Programs(code, grid, left[:n], arguments, shared, self).run())
                    left = left[n:]
                one = running[int(self.random.integers(len(running)))]
                if next(one, self) is self:
                    running.remove(one)
