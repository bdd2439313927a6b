"""Matrix products, and the loads and stores of their operands."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx_machine import fragments
from ptx_machine.faults import PtxError, UnknownInstructionError
from ptx_machine.memory import SEVERAL, SharedMemory
from ptx_machine.parser import Instruction, Vector
from ptx_machine.registers import Array, Mask, Slots, Step, over, put

WARP, GROUP = 32, 128


def _whole(p: Any, mask: Mask, threads: int, name: str) -> Array:
    """Threads that take part: whole warps, or whole groups of four."""
    who = p.who(mask)
    if len(who) != threads * len(np.unique(who // threads)):
        raise PtxError(f"{name} without all of its threads")
    return who


def _places(i: Instruction, slots: Slots, operand: Any) -> tuple[Any, int]:
    """For ldmatrix and stmatrix: threads and addresses of what each one moves, and the number of matrices.

    A thread has one word of each matrix: two neighbours of a row, or with `trans` of a column.
    """
    base, offset = slots.address(operand, "b32", i)
    count, trans = int(i.opcode[4][1:]), "trans" in i.opcode
    change = np.uint32(offset & (1 << 32) - 1)
    lane = np.arange(WARP)
    if trans:
        row, column = 2 * (lane % 4)[:, None] + np.arange(2), np.repeat(lane[:, None] // 4, 2, 1)
    else:
        row, column = lane[:, None] // 4, 2 * (lane % 4)[:, None]

    def places(p: Any, w: Mask) -> tuple[Array, Array]:
        """Threads [threads that take part], addresses [matrices, threads, 1 or 2 (trans)]."""
        who = _whole(p, w, WARP, i.opcode[0])
        rows = (over(p.u[base], p.threads)[who] + change).reshape(-1, WARP)[:, : 8 * count].reshape(-1, count, 8)
        if (rows & np.uint32(15)).any():
            raise PtxError("rows of a matrix in shared memory are not aligned to 16 bytes")
        address = rows[:, :, row] + (2 * column).astype(np.uint32)
        return who, address.transpose(1, 0, 2, 3).reshape(count, len(who), -1)

    return places, count


def _ldmatrix(i: Instruction, slots: Slots) -> Step:
    places, count = _places(i, slots, i.operands[1])
    ds = [slots.written(one, "b32", i) for one in slots.parts(i.operands[0])]
    if len(ds) != count:
        raise UnknownInstructionError(i.text)

    def step(p: Any, w: Mask) -> None:
        who, address = places(p, w)
        each = address.shape[2]
        values = p.shared.read(address.ravel(), np.tile(np.repeat(who, each), count), 4 // each, 1)
        for d, value in zip(ds, values.view(np.uint32).reshape(count, -1), strict=True):
            p.u[d][who] = value

    return step


def _stmatrix(i: Instruction, slots: Slots) -> Step:
    places, count = _places(i, slots, i.operands[0])
    sources = [slots.read(one, "b32", i) for one in slots.parts(i.operands[1])]
    if len(sources) != count:
        raise UnknownInstructionError(i.text)

    def step(p: Any, w: Mask) -> None:
        who, address = places(p, w)
        each = address.shape[2]
        values = np.concatenate([over(p.u[one], p.threads)[who] for one in sources])
        values = values.view(np.uint16 if each == 2 else np.uint32)
        p.shared.write(address.ravel(), np.tile(np.repeat(who, each), count), values[None], 4 // each)

    return step


def _mma(i: Instruction, slots: Slots) -> Step:
    kind = i.opcode[7]
    d, a, b, c = (slots.parts(one) for one in i.operands)
    ds = [slots.written(one, "b32", i) for one in d]
    a_places, b_places, c_places = ([slots.read(one, "b32", i) for one in v] for v in (a, b, c))
    if [len(v) for v in (d, a, b, c)] != [4, 4, 2, 4]:
        raise UnknownInstructionError(i.text)

    def step(p: Any, w: Mask) -> None:
        _whole(p, w, WARP, "mma")
        A, B = (
            fragments.numbers(deal([over(p.u[one], p.threads) for one in places]), kind)
            for deal, places in ((fragments.left, a_places), (fragments.right, b_places))
        )
        C = fragments.sums(np.stack([over(p.f[one], p.threads) for one in c_places]))
        for one, value in zip(ds, fragments.dealt(fragments.product(A, B, C, p.rounding)), strict=True):
            put(p.f[one], value, w)

    return step


_PITCH = {1: 128, 2: 64, 3: 32}
"""Bytes from one row to the next, by the swizzle of a descriptor."""


def described(descriptor: int, rows: int) -> Array:
    """Addresses in shared memory of a matrix of 16-bit numbers whose rows run along k.

    descriptor: bits 0-13 the start, 16-29 the leading offset, 32-45 the stride, all over 16; 62-63 the swizzle.

    Returns:
        int64 [rows, 2]: address of the 16 bytes that hold a row's first eight of 16 numbers, and of the others.
    """
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise UnknownInstructionError("a matrix descriptor with a base offset")
    n, chunk = np.arange(rows)[:, None], np.arange(2)[None, :]
    swizzle = descriptor >> 62
    if not swizzle:
        return start + n // 8 * stride + n % 8 * 16 + chunk * leading
    address = start + n // 8 * stride + n % 8 * _PITCH[swizzle] + chunk * 16
    # Bits 7 and up of an address change its bits 4 and up: three, two or one of them.
    return address ^ (address >> 7 & (8 >> swizzle - 1) - 1) << 4


@dataclass
class _Issue:
    """One product of some groups of four warps: threads [groups, 128], number of its commit group, what it reads."""

    who: Array
    number: Array
    grains: Array
    registers: Sequence[int]
    bits: Array


class _Sums:
    """The sums of one set of registers: whose are not yet in them, and since which commit group."""

    def __init__(self, registers: Sequence[int], threads: int) -> None:
        self.registers = registers
        self.values = np.zeros((len(registers), threads), np.float32)
        self.waiting = np.zeros(threads, bool)
        self.number = np.zeros(threads, np.int32)


class Products:
    """wgmma: results are in no register before they are waited for; until then nothing it reads may change."""

    def __init__(self, p: Any) -> None:
        self._p = p
        self._sums: dict[tuple[int, ...], _Sums] = {}
        self._issued: list[_Issue] = []
        self._committed = np.zeros(p.threads, np.int32)

    def matrix(self, shared: SharedMemory, who: Array, descriptors: Array, rows: int) -> tuple[Array, Array]:
        """What descriptors [groups, 128] describe: numbers uint16 [groups, rows, 16], and their grains."""
        if (descriptors != descriptors[:, :1]).any():
            raise PtxError("threads of a group disagree on a matrix descriptor")
        address = np.stack([described(int(one), rows) for one in descriptors[:, 0]])
        first = np.repeat(who[:, 0], 2 * rows)
        places = shared.places(address.ravel(), first, 16)
        grains = shared.grains(places, 16)
        shared.check_read(first, grains, whole=True)
        shared.check_proxy(first, grains)
        halves = shared.elements(2, places[:, None] + 2 * np.arange(8))
        return halves.reshape(-1, rows, 16), grains.reshape(len(who), -1)

    def issue(self, ds: tuple[int, ...], who: Array, a: Array, b: Array, kept: Array, grains: Array,
              registers: Sequence[int]) -> None:  # fmt: skip
        """Products of a float32 [warps, 16, 16] and b [groups, 16, n], on top of the sums where `kept` [threads]."""
        p = self._p
        sums = self._sums.setdefault(ds, _Sums(ds, p.threads))
        before = np.where(sums.waiting[who.ravel()], sums.values[:, who.ravel()],
                          np.stack([p.f[one][who.ravel()] for one in ds]))  # fmt: skip
        c = fragments.sums(np.where(kept[who.ravel()], before, np.float32(0)))
        result = fragments.product(a, np.repeat(b, 4, 0), c, p.rounding)
        sums.values[:, who.ravel()] = fragments.dealt(result)
        sums.waiting[who.ravel()] = True
        sums.number[who.ravel()] = self._committed[who.ravel()]
        for one in ds:
            p.f[one][who.ravel()] = np.nan
        np.add.at(p.shared.watched, grains.ravel(), 1)
        bits = np.stack([p.u[one][who] for one in registers]) if len(registers) else np.zeros((0, *who.shape))
        self._issued.append(_Issue(who, self._committed[who[:, 0]], grains, registers, bits))

    def commit(self, mask: Mask) -> None:
        """Close each thread's group."""
        self._committed[_whole(self._p, mask, GROUP, "wgmma.commit_group")] += 1

    def wait(self, mask: Mask, left: int) -> None:
        """All commit groups of the threads but the last `left` end."""
        p = self._p
        waits = np.zeros(p.threads, bool)
        waits[_whole(p, mask, GROUP, "wgmma.wait_group")] = True
        ended = self._committed - left
        issued = []
        for one in self._issued:
            ends = waits[one.who[:, 0]] & (one.number < ended[one.who[:, 0]])
            if ends.any():
                self._end(one, ends)
            if not ends.all():
                stay = ~ends
                bits = one.bits[:, stay]
                issued.append(_Issue(one.who[stay], one.number[stay], one.grains[stay], one.registers, bits))
        self._issued = issued
        for sums in self._sums.values():
            lands = sums.waiting & waits & (sums.number < ended)
            if lands.any():
                for place, value in zip(sums.registers, sums.values, strict=True):
                    put(p.f[place], value, True if lands.all() else lands)
                sums.waiting &= ~lands

    def _end(self, one: _Issue, ends: Array) -> None:
        shared, grains = self._p.shared, one.grains[ends].ravel()
        np.add.at(shared.watched, grains, -1)
        shared.reader[grains] = shared.reader_warp[grains] = SEVERAL
        shared.was_read[grains] = self._p.tick
        for register, bits in zip(one.registers, one.bits, strict=True):
            if (self._p.u[register][one.who[ends]] != bits[ends]).any():
                raise PtxError(f"register {register} of A changed while its product was in flight")


def _wgmma(i: Instruction, slots: Slots) -> Step:
    shape, kind = i.opcode[4], i.opcode[6]
    columns = int(shape.removeprefix("m64n").removesuffix("k16"))
    a_given, b_given, keeps, *signs = i.operands[1:]
    a_registers = isinstance(a_given, Vector)
    numbers = [slots.values.get(slots.read(one, "b32", i)) for one in signs]
    if i.opcode[5] != "f32" or kind != i.opcode[7] or numbers != [1, 1] + [0] * (2 - a_registers):
        raise UnknownInstructionError(i.text)
    ds = tuple(slots.written(one, "b32", i) for one in slots.parts(i.operands[0]))
    a_places = [slots.read(one, "b32" if a_registers else "b64", i) for one in slots.parts(a_given)]
    b_place, keep = slots.read(b_given, "b64", i), slots.read(keeps, "pred", i)
    if len(ds) != columns // 2 or (a_registers and len(a_places) != 4):
        raise UnknownInstructionError(i.text)

    def step(p: Any, w: Mask) -> None:
        who = _whole(p, w, GROUP, "wgmma").reshape(-1, GROUP)
        b, grains = p.products.matrix(p.shared, who, over(p.u[b_place], p.threads)[who], columns)
        if a_registers:
            a = fragments.left([over(p.u[one], p.threads)[who.ravel()] for one in a_places])
        else:
            a, more = p.products.matrix(p.shared, who, over(p.u[a_places[0]], p.threads)[who], 64)
            grains = np.concatenate([grains, more], 1)
        a, b = fragments.numbers(a.reshape(-1, 16, 16), kind), fragments.numbers(b, kind).transpose(0, 2, 1)
        kept = over(p.u[keep], p.threads)
        p.products.issue(ds, who, a, b, kept, grains, a_places if a_registers else ())

    return step


def _wgmma_group(i: Instruction, slots: Slots) -> Step:
    if i.opcode[1] == "commit_group":
        return lambda p, w: p.products.commit(w)
    left = slots.values[slots.read(i.operands[0], "b32", i)]
    return lambda p, w: p.products.wait(w, left)


def _proxy_fence(p: Any, w: Mask) -> None:
    p.tick += 1
    p.fenced[p.who(w)] = p.tick


def decode(i: Instruction, slots: Slots) -> Step | None:
    """What an instruction does, or None if it is none of these."""
    match i.opcode:
        case ("ldmatrix", "sync", "aligned", "m8n8", "x1" | "x2" | "x4", *trans, "shared", "b16"):
            return _ldmatrix(i, slots) if trans in ([], ["trans"]) else None
        case ("stmatrix", "sync", "aligned", "m8n8", "x1" | "x2" | "x4", *trans, "shared", "b16"):
            return _stmatrix(i, slots) if trans in ([], ["trans"]) else None
        case ("mma", "sync", "aligned", "m16n8k16", "row", "col", "f32", "f16" | "bf16" as kind, other, "f32"):
            if kind == other:
                return _mma(i, slots)
        case ("wgmma", "mma_async", "sync", "aligned", shape, _, "f16" | "bf16", _) if shape.startswith("m64n"):
            return _wgmma(i, slots)
        case ("wgmma", "fence", "sync", "aligned"):
            return lambda p, w: None
        case ("fence", "proxy", "async", "shared::cta"):
            return _proxy_fence
        case ("wgmma", "commit_group" | "wait_group", "sync", "aligned"):
            return _wgmma_group(i, slots)
    return None
