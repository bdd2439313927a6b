"""Loads, stores, copies, and exchanges between the threads of a warp."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx_machine.faults import PtxError, UnknownInstructionError
from ptx_machine.parser import Address, Constant, Instruction, Symbol
from ptx_machine.registers import SIZES, UNSIGNED, Mask, Slots, Step, over, put, type_class

WARP = 32


def _store(p: Any, d: int, who: Any, mask: Mask, value: Any) -> None:
    """Values of the threads that take part into a register, widened with zeros."""
    if mask is True:
        p.u[d][...] = value
    else:
        p.u[d][who] = value


def _shape(i: Instruction, modifiers: tuple[str, ...]) -> tuple[str, int]:
    """Type and number of elements of a load or store, after its memory's name."""
    *vector, kind = modifiers
    if (vector and vector[0] not in ("v2", "v4")) or len(vector) > 1 or kind[0] != "b":
        raise UnknownInstructionError(i.text)
    return kind, int(vector[0][1:]) if vector else 1


def _wide_enough(i: Instruction, slots: Slots, operands: Any, kind: str) -> list[int]:
    """Registers of at least a type's size."""
    places = []
    for one in operands:
        place, cls = slots.read_any(one, i)
        if cls == "pred" or SIZES[cls] < SIZES[kind]:
            raise UnknownInstructionError(i.text)
        places.append(place)
    return places


def _parameter(i: Instruction, slots: Slots) -> Step:
    address = i.operands[1]
    if not isinstance(address, Address) or not isinstance(address.base, Symbol) or address.offset:
        raise UnknownInstructionError(i.text)
    d, number = slots.written(i.operands[0], i.opcode[2], i), slots.parameters[address.base.name]
    dtype = UNSIGNED[i.opcode[2]]

    def step(p: Any, w: Mask) -> None:
        put(p.u[d], dtype(p.arguments[number]), w)

    return step


def _load_global(i: Instruction, slots: Slots, modifiers: tuple[str, ...]) -> Step:
    kind, count = _shape(i, modifiers)
    ds = _wide_enough(i, slots, slots.parts(i.operands[0]), kind)
    base, offset = slots.address(i.operands[1], "b64", i)
    size = SIZES[kind]
    if len(ds) != count:
        raise UnknownInstructionError(i.text)

    def step(p: Any, w: Mask) -> None:
        who = p.who(w)
        address = over(p.u[base], p.threads)[who] + np.uint64(offset & (1 << 64) - 1)
        for d, value in zip(ds, p.memory.read(p, address, w, size, count), strict=True):
            _store(p, d, who, w, value)

    return step


def _store_global(i: Instruction, slots: Slots, modifiers: tuple[str, ...]) -> Step:
    kind, count = _shape(i, modifiers)
    if kind == "b8":
        raise UnknownInstructionError(i.text)
    base, offset = slots.address(i.operands[0], "b64", i)
    sources = [slots.read(one, kind, i) for one in slots.parts(i.operands[1])]
    size = SIZES[kind]
    if len(sources) != count:
        raise UnknownInstructionError(i.text)

    def step(p: Any, w: Mask) -> None:
        who = p.who(w)
        address = over(p.u[base], p.threads)[who] + np.uint64(offset & (1 << 64) - 1)
        values = np.stack([over(p.u[one], p.threads)[who] for one in sources])
        p.memory.write(p, address, w, values, size)

    return step


def _shared_address(i: Instruction, slots: Slots, operand: Any) -> Callable[[Any, Any], Any]:
    base, offset = slots.address(operand, "b32", i)
    change = np.uint32(offset & (1 << 32) - 1)
    return lambda p, who: over(p.u[base], p.threads)[who] + change


def _load_shared(i: Instruction, slots: Slots) -> Step:
    kind, count = _shape(i, i.opcode[2:])
    ds = _wide_enough(i, slots, slots.parts(i.operands[0]), kind)
    address, size = _shared_address(i, slots, i.operands[1]), SIZES[kind]
    if len(ds) != count:
        raise UnknownInstructionError(i.text)

    def step(p: Any, w: Mask) -> None:
        who = p.who(w)
        for d, value in zip(ds, p.shared.read(address(p, who), who, size, count), strict=True):
            _store(p, d, who, w, value)

    return step


def _store_shared(i: Instruction, slots: Slots) -> Step:
    kind, count = _shape(i, i.opcode[2:])
    address, size = _shared_address(i, slots, i.operands[0]), SIZES[kind]
    sources = [
        slots.read(one, kind, i) if isinstance(one, Constant) else _wide_enough(i, slots, [one], kind)[0]
        for one in slots.parts(i.operands[1])
    ]
    dtype = UNSIGNED[kind]
    if len(sources) != count:
        raise UnknownInstructionError(i.text)

    def step(p: Any, w: Mask) -> None:
        who = p.who(w)
        values = np.stack([over(p.u[one], p.threads)[who].astype(dtype) for one in sources])
        p.shared.write(address(p, who), who, values, size)

    return step


def _copy(i: Instruction, slots: Slots) -> Step:
    """cp.async: some bytes, or zeros where the last operand is 0."""
    address = _shared_address(i, slots, i.operands[0])
    base, offset = slots.address(i.operands[1], "b64", i)
    size = slots.values[slots.read(i.operands[2], "b32", i)]
    given = slots.read(i.operands[3], "b32", i) if len(i.operands) == 4 else slots.constant(size, "b32")
    if size not in ((4, 8, 16) if i.opcode[2] == "ca" else (16,)):
        raise UnknownInstructionError(i.text)

    def step(p: Any, w: Mask) -> None:
        who = p.who(w)
        filled = over(p.u[given], p.threads)[who]
        if ((filled != 0) & (filled != size)).any():
            raise UnknownInstructionError("cp.async of a part")
        some = np.zeros(p.threads, bool)
        some[who[filled != 0]] = True
        source = over(p.u[base], p.threads)[some] + np.uint64(offset)
        words = np.zeros((len(who), size // 4), np.uint32)
        words[filled != 0] = p.memory.read(p, source, some, 4, size // 4).T
        p.copies.start(p.shared, address(p, who), who, words)

    return step


def _copy_group(i: Instruction, slots: Slots) -> Step:
    if i.opcode[2] == "commit_group":
        return lambda p, w: p.copies.commit(w)
    left = slots.values[slots.read(i.operands[0], "b32", i)]
    return lambda p, w: p.copies.wait(p.shared, w, left)


_ATOMIC_ORDERS = {
    "acq_rel": (True, True),
    "release": (True, False),
    "acquire": (False, True),
    "relaxed": (False, False),
}


def _atomic(i: Instruction, slots: Slots) -> Step:
    if i.opcode[1:3] != ("global", "gpu") or i.opcode[4:] != ("add", "u32") or i.opcode[3] not in _ATOMIC_ORDERS:
        raise UnknownInstructionError(i.text)
    releases, acquires = _ATOMIC_ORDERS[i.opcode[3]]
    d, source = slots.written(i.operands[0], "b32", i), slots.read(i.operands[2], "b32", i)
    base, offset = slots.address(i.operands[1], "b64", i)

    def step(p: Any, w: Mask) -> None:
        who = p.who(w)
        address = over(p.u[base], p.threads)[who] + np.uint64(offset)
        values = over(p.u[source], p.threads)[who]
        p.u[d][who] = p.memory.add(p, address, w, values, releases, acquires)

    return step


def _shared_atomic(i: Instruction, slots: Slots) -> Step:
    if i.opcode != ("atom", "shared", "add", "u32"):
        raise UnknownInstructionError(i.text)
    d, source = slots.written(i.operands[0], "b32", i), slots.read(i.operands[2], "b32", i)
    address = _shared_address(i, slots, i.operands[1])

    def step(p: Any, w: Mask) -> None:
        who = p.who(w)
        p.u[d][who] = p.shared.add(address(p, who), who, over(p.u[source], p.threads)[who])

    return step


def _prefetch(i: Instruction, slots: Slots) -> Step:
    """A hint; nothing happens, but the address has to be one."""
    if i.opcode != ("prefetch", "global", "L2"):
        raise UnknownInstructionError(i.text)
    base, offset = slots.address(i.operands[0], "b64", i)

    def step(p: Any, w: Mask) -> None:
        who = p.who(w)
        p.memory.read(p, over(p.u[base], p.threads)[who] + np.uint64(offset), w, 4, 1)

    return step


def _ballot(i: Instruction, slots: Slots) -> Step:
    """vote.sync.ballot: one bit for each thread of the warp."""
    if i.opcode != ("vote", "sync", "ballot", "b32"):
        raise UnknownInstructionError(i.text)
    d, a = slots.written(i.operands[0], "b32", i), slots.read(i.operands[1], "pred", i)
    members = slots.read(i.operands[2], "b32", i)

    def step(p: Any, w: Mask) -> None:
        warps = _whole_warps(p, w, p.u[members], "vote")
        bits = over(p.u[a], p.threads).reshape(-1, WARP)[warps].astype(np.uint32) << np.arange(WARP, dtype=np.uint32)
        p.u[d].reshape(-1, WARP)[warps] = bits.sum(1, keepdims=True, dtype=np.uint32)

    return step


def _whole_warps(p: Any, mask: Mask, members: Any, name: str) -> Any:
    """Warps of the threads that take part: all of a warp must, and the instruction must say so."""
    who = p.who(mask)
    warps = np.unique(who >> 5)
    if len(who) != len(warps) * WARP:
        raise PtxError(f"{name} by a part of a warp")
    if (over(members, p.threads)[who] != 0xFFFFFFFF).any():
        raise UnknownInstructionError(f"{name} of a part of a warp")
    return warps


def _exchange(i: Instruction, slots: Slots) -> Step:
    """shfl.sync: the value of another thread of the warp."""
    mode, kind = i.opcode[2:]
    if kind != "b32" or mode not in ("up", "down", "bfly", "idx"):
        raise UnknownInstructionError(i.text)
    d, *sources = slots.written(i.operands[0], "b32", i), *(slots.read(one, "b32", i) for one in i.operands[1:])
    a, b, c, members = sources

    def step(p: Any, w: Mask) -> None:
        warps = _whole_warps(p, w, p.u[members], "shfl")
        values, by, bound = (over(p.u[one], p.threads).reshape(-1, WARP)[warps] for one in (a, b, c))
        lane, by = np.arange(WARP), by.astype(np.int64) & 31
        segment, clamp = bound.astype(np.int64) >> 8 & 31, bound.astype(np.int64) & 31
        last, first = lane & segment | clamp & ~segment, lane & segment
        other = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first | by & ~segment}[mode]
        inside = other >= last if mode == "up" else other <= last
        p.u[d].reshape(-1, WARP)[warps] = np.take_along_axis(values, np.where(inside, other, lane), 1)

    return step


def _reduce(i: Instruction, slots: Slots) -> Step:
    if i.opcode != ("redux", "sync", "add", "s32"):
        raise UnknownInstructionError(i.text)
    d, a, members = slots.written(i.operands[0], "b32", i), *(slots.read(one, "b32", i) for one in i.operands[1:])

    def step(p: Any, w: Mask) -> None:
        warps = _whole_warps(p, w, p.u[members], "redux")
        values = over(p.u[a], p.threads).reshape(-1, WARP)[warps]
        p.u[d].reshape(-1, WARP)[warps] = values.sum(1, keepdims=True, dtype=np.uint32)

    return step


def _warp_barrier(i: Instruction, slots: Slots) -> Step:
    members = slots.read(i.operands[0], "b32", i)

    def step(p: Any, w: Mask) -> None:
        _whole_warps(p, w, p.u[members], "bar.warp.sync")
        p.tick += 1
        p.warp_met[p.who(w)] = p.tick

    return step


def decode(i: Instruction, slots: Slots) -> Step | None:
    """What an instruction does, or None if it is none of these."""
    match i.opcode:
        case ("ld", "param", _):
            return _parameter(i, slots)
        case ("ld", "global", *modifiers) | ("ld", "volatile", "global", *modifiers):
            return _load_global(i, slots, tuple(modifiers))
        case ("st", "global", *modifiers):
            return _store_global(i, slots, tuple(modifiers))
        case ("ld", "shared", *_):
            return _load_shared(i, slots)
        case ("st", "shared", *_):
            return _store_shared(i, slots)
        case ("cp", "async", "ca" | "cg", "shared", "global"):
            return _copy(i, slots)
        case ("cp", "async", "commit_group" | "wait_group"):
            return _copy_group(i, slots)
        case ("vote", *_):
            return _ballot(i, slots)
        case ("prefetch", *_):
            return _prefetch(i, slots)
        case ("atom", "shared", *_):
            return _shared_atomic(i, slots)
        case ("atom", *_):
            return _atomic(i, slots)
        case ("shfl", "sync", _, _):
            return _exchange(i, slots)
        case ("redux", *_):
            return _reduce(i, slots)
        case ("bar", "warp", "sync"):
            return _warp_barrier(i, slots)
    return None


def grain(i: Instruction) -> int:
    """Bytes of the smallest part of shared memory that an instruction names; 4 for all others."""
    if i.opcode[0] in ("ld", "st") and i.opcode[1] == "shared":
        return min(4, SIZES[type_class(i.opcode[-1])])
    return 2 if i.opcode[0] in ("ldmatrix", "stmatrix") and "trans" in i.opcode else 4
