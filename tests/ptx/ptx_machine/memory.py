"""Global and shared memory: bounds, alignment, and who wrote what when.

An access is of `count` elements of `size` bytes side by side, and must lie at a multiple of all its bytes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ptx_machine.faults import PtxError
from ptx_machine.registers import Array, Mask

WORDS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SLOT = 36
"""log2 of the room that every tensor has for itself: nothing lies near it."""
_GRAIN = 2
"""Bytes of global memory whose writer is kept as one."""


@dataclass
class _Writers:
    """Who wrote last, for each grain: program (-1: nobody in this launch), thread of it, and its time."""

    program: Array
    thread: Array
    time: Array

    @classmethod
    def of(cls, size: int) -> "_Writers":
        nobody = np.full(-(-size // _GRAIN), -1, np.int32)
        return cls(nobody, nobody.copy(), nobody.copy())


class Allocation:
    """A tensor at a made-up address. It is aligned to 16 bytes only, and less where the tensor itself is."""

    def __init__(self, name: str, tensor: torch.Tensor, place: int) -> None:
        assert tensor.is_contiguous()
        self.name = f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        self.size = tensor.nbytes
        self.base = (place << _SLOT) + (1 << 20) + 16 + tensor.data_ptr() % 16
        self.writers: _Writers | None = None
        data = tensor.reshape(-1).view(torch.uint8).numpy() if self.size else np.zeros(0, np.uint8)
        self._views = {n: data[: self.size // n * n].view(word) for n, word in WORDS.items()}

    def at(self, offset: Array, size: int) -> tuple[Array, Array]:
        """A view of the memory and places in it of elements at these offsets in bytes."""
        if (offset % size).any():
            raise PtxError(f"elements of {size} bytes at odd places of {self.name}")
        return self._views[size], offset // size


class GlobalMemory:
    """Tensors, each on its own."""

    def __init__(self) -> None:
        self._allocations: dict[int, Allocation] = {}
        self._known: dict[tuple[int, int], Allocation] = {}

    def put(self, name: str, tensor: torch.Tensor) -> int:
        """Address of a tensor; the same for the same memory."""
        key = (tensor.data_ptr(), tensor.nbytes)
        if key not in self._known or not tensor.nbytes:
            place = len(self._allocations) + 1
            self._allocations[place] = self._known[key] = Allocation(name, tensor, place)
        return self._known[key].base

    def _parts(self, address: Array, who: Array, width: int) -> list[tuple[Allocation, Array, Array]]:
        """Accesses sorted by tensor: it, indices into `who`, offsets. Each must lie within it, and be aligned."""
        if (address & np.uint64(width - 1)).any():
            wrong = np.flatnonzero(address & np.uint64(width - 1))[0]
            raise PtxError(f"{width} bytes at {int(address[wrong]):#x}, thread {who[wrong]}: not aligned")
        places = address >> np.uint64(_SLOT)
        one = bool((places == places[0]).all())
        parts = []
        for place in places[:1] if one else np.unique(places):
            mine = np.arange(len(who)) if one else np.flatnonzero(places == place)
            allocation = self._allocations.get(int(place))
            if allocation is None:
                raise PtxError(f"address {int(address[mine[0]]):#x} is of no tensor, thread {who[mine[0]]}")
            offset = (address[mine] - np.uint64(allocation.base)).view(np.int64)
            out = (offset < 0) | (offset > allocation.size - width)
            if out.any():
                raise PtxError(
                    f"{width} bytes at {offset[out][0]} of {allocation.name}, which has {allocation.size}, "
                    f"{out.sum()} threads, the first {who[mine[out][0]]}"
                )
            parts.append((allocation, mine, offset))
        return parts

    def read(self, p: Any, address: Array, mask: Mask, size: int, count: int) -> Array:
        """Elements [count, threads that take part]."""
        who = p.who(mask)
        if not len(who):
            return np.zeros((count, 0), WORDS[size])
        parts = self._parts(address, who, size * count)
        out = np.empty((count, len(who)), WORDS[size])
        for allocation, mine, offset in parts:
            if allocation.writers is not None:
                self._check(p, allocation, who[mine], offset, size * count, "reads")
            data, at = allocation.at(offset, size)
            for j in range(count):
                out[j, mine] = data[at + j]
        return out

    def write(self, p: Any, address: Array, mask: Mask, values: Array, size: int) -> None:
        """Values [count, threads that take part]."""
        who, count = p.who(mask), len(values)
        if not len(who):
            return
        for allocation, mine, offset in self._parts(address, who, size * count):
            if allocation.writers is None:
                allocation.writers = _Writers.of(allocation.size)
            data, at = allocation.at(offset, size)
            new = values[:, mine]
            # What is there already may be written again, in any order.
            changes = np.logical_or.reduce([data[at + j] != new[j] for j in range(count)])
            if changes.any():
                self._check(p, allocation, who[mine[changes]], offset[changes], size * count, "writes to")
            for j in range(count):
                data[at + j] = new[j]
            if any((data[at + j] != new[j]).any() for j in range(count)):
                raise PtxError(f"threads write different values to one place of {allocation.name}")
            grains = _grains(offset, size * count)
            program = p.program[who[mine]]
            allocation.writers.program[grains] = program[:, None]
            allocation.writers.thread[grains] = p.lane[who[mine]][:, None]
            allocation.writers.time[grains] = p.order.time[program][:, None]

    def _check(self, p: Any, allocation: Allocation, who: Array, offset: Array, width: int, does: str) -> None:
        writers, grains = allocation.writers, _grains(offset, width)
        assert writers is not None
        writer = writers.program[grains]
        if (writer < 0).all():
            return
        program, lane = p.program[who][:, None], p.lane[who][:, None]
        holds = p.order.holds(program, lane, writer, writers.thread[grains], writers.time[grains]) | (writer < 0)
        if not holds.all():
            one, grain = np.argwhere(~holds)[0]
            raise PtxError(
                f"program {program[one, 0]} {does} {allocation.name} at byte {offset[one]}, where program "
                f"{writer[one, grain]} wrote with nothing that orders the two"
            )

    def add(self, p: Any, address: Array, mask: Mask, values: Array, releases: bool, acquires: bool) -> Array:
        """Atomic addition of uint32, programs in a random order: what was there before, one for each thread."""
        who = p.who(mask)
        out = np.zeros(len(who), np.uint32)
        if not len(who):
            return out
        for allocation, mine, offset in self._parts(address, who, 4):
            data, at = allocation.at(offset, 4)
            turns = p.random.permutation(p.program.max() + 1)[p.program[who[mine]]]
            for one in np.argsort(turns, kind="stable"):
                program, key = int(p.program[who[mine[one]]]), int(address[mine[one]])
                if acquires:
                    p.order.acquire(program, key)
                if releases:
                    p.order.release(program, key)
                out[mine[one]] = data[at[one]]
                data[at[one]] += values[mine[one]]
        return out


def _grains(offset: Array, width: int) -> Array:
    return (offset // _GRAIN)[:, None] + np.arange(max(1, width // _GRAIN))


NOBODY, SEVERAL, ARRIVING = -1, -2, -3
"""Instead of a thread: never written or read; read by more than one; a copy is on its way."""


class SharedMemory:
    """Shared memory of programs side by side, and who wrote and read each grain of it when.

    Time is a count of barriers of any kind. A thread may rely on another one's access before its program's last
    barrier, or before its warp's last one if both are of one warp.
    """

    def __init__(self, p: Any, size: int, grain: int) -> None:
        self._p, self.size, self.grain = p, size, grain
        self.pitch = -(-size // 16) * 16
        self.data = np.zeros(p.programs * self.pitch, np.uint8)
        self._views = {n: self.data.view(word) for n, word in WORDS.items()}
        grains = len(self.data) // grain
        self.writer = np.full(grains, NOBODY, np.int32)
        self.written = np.zeros(grains, np.int32)
        self.reader, self.reader_warp = self.writer.copy(), self.writer.copy()
        self.was_read = np.zeros(grains, np.int32)
        self.watched = np.zeros(grains, np.int16)
        self.stored = np.zeros(grains, bool)
        self.added = np.zeros(grains, bool)

    def places(self, address: Array, who: Array, width: int) -> Array:
        """Offsets in `data` of some threads' addresses: within bounds, and aligned."""
        at = address.astype(np.int64)
        out = at > self.size - width
        if out.any():
            raise PtxError(f"{width} bytes at {at[out][0]} of {self.size} in shared memory, thread {who[out][0]}")
        if (at & (width - 1)).any():
            raise PtxError(f"{width} bytes of shared memory at {at[(at & (width - 1)) != 0][0]}: not aligned")
        return at + self._p.index[who] * self.pitch

    def grains(self, places: Array, width: int) -> Array:
        """Grains [accesses, grains of each]."""
        return (places // self.grain)[:, None] + np.arange(max(1, width // self.grain))

    def _settled(self, who: Array, other: Array, other_warp: Array, time: Array) -> Array:
        """Whether each thread may rely on another's access, [accesses, grains]."""
        p, thread = self._p, who[:, None]
        after = (time < p.met[who][:, None]) | (other == thread)
        return after | ((other_warp == thread >> 5) & (time < p.warp_met[who][:, None]))

    def check_read(self, who: Array, grains: Array, whole: bool = False) -> None:
        """The bytes are there, and whoever wrote them did so before a barrier; `whole`: the reading thread too."""
        writer = self.writer[grains]
        if (writer < 0).any():
            if (writer == ARRIVING).any():
                raise PtxError("a thread reads shared memory that a copy was not waited for")
            raise PtxError("a thread reads shared memory that nobody has written")
        time = self.written[grains]
        ok = time < self._p.met[who][:, None] if whole else self._settled(who, writer, writer >> 5, time)
        if not ok.all():
            one, grain = np.argwhere(~ok)[0]
            raise PtxError(
                f"thread {who[one]} reads shared memory that thread {writer[one, grain]} wrote, no barrier between"
            )

    def check_proxy(self, who: Array, grains: Array) -> None:
        """What stores wrote is fenced before wgmma reads it, by the thread that wrote or by the one that reads."""
        time = self.written[grains]
        fenced = np.maximum(self._p.fenced[self.writer[grains]], self._p.fenced[who][:, None])
        if (self.stored[grains] & (time >= fenced)).any():
            raise PtxError("a matrix product reads shared memory that stores wrote, no fence.proxy.async between")

    def note_read(self, who: Array, grains: Array) -> None:
        """Remember who read, since the last barrier of a program."""
        p, thread = self._p, np.broadcast_to(who[:, None], grains.shape)
        last, warp = self.reader[grains], self.reader_warp[grains]
        fresh = (last == NOBODY) | (self.was_read[grains] < p.met[who][:, None])
        new = np.where(fresh | (last == thread), thread, SEVERAL)
        new_warp = np.where(fresh | (warp == thread >> 5), thread >> 5, SEVERAL)
        for target, value in ((self.reader, new), (self.reader_warp, new_warp)):
            target[grains] = value
            twice = target[grains] != value
            if twice.any():
                target[grains[twice]] = SEVERAL
        self.was_read[grains] = p.tick

    def check_write(self, who: Array, grains: Array, changes: Array | None) -> None:
        """No one else has read or written the bytes since a barrier; the same value may be written twice."""
        if (self.writer[grains] == ARRIVING).any():
            raise PtxError("a thread writes to shared memory that a copy was not waited for")
        if self.watched[grains].any():
            raise PtxError("a thread writes to shared memory that a matrix product in flight reads")
        reader = self.reader[grains]
        read = (reader == NOBODY) | self._settled(who, reader, self.reader_warp[grains], self.was_read[grains])
        if not read.all():
            raise PtxError(
                f"thread {who[np.argwhere(~read)[0, 0]]} overwrites shared memory that others read, no barrier between"
            )
        writer = self.writer[grains]
        written = (writer == NOBODY) | self._settled(who, writer, writer >> 5, self.written[grains])
        if changes is not None:
            written |= ~changes[:, None]
        if not written.all():
            raise PtxError(
                f"thread {who[np.argwhere(~written)[0, 0]]} overwrites shared memory that another thread wrote, "
                "no barrier between"
            )

    def add(self, address: Array, who: Array, values: Array) -> Array:
        """atom.add of words: what was there, thread after thread. Atomic operations may meet without a barrier."""
        places = self.places(address, who, 4)
        grains = self.grains(places, 4)
        if (self.writer[grains] == NOBODY).any():
            raise PtxError("a thread adds to shared memory that nobody has written")
        together = self.added[grains].all(1)
        self.check_write(who[~together], grains[~together], None)
        self.check_write(who[together], grains[together], np.zeros(int(together.sum()), bool))
        self.note_write(who, grains, stored=True)
        self.added[grains] = True
        at, words = places // 4, self._views[4]
        before = np.empty(len(at), np.uint32)
        for one, (place, value) in enumerate(zip(at, values, strict=True)):
            before[one] = words[place]
            words[place] += value
        return before

    def note_write(self, who: Array, grains: Array, arriving: bool = False, stored: bool = False) -> None:
        """Remember who wrote, and whether by a store."""
        self.writer[grains] = ARRIVING if arriving else who[:, None]
        self.stored[grains] = stored
        self.added[grains] = False
        self.written[grains] = self._p.tick
        self.reader[grains] = self.reader_warp[grains] = NOBODY

    def elements(self, size: int, places: Array) -> Array:
        """What lies at offsets in `data`, unchecked."""
        return self._views[size][places // size]

    def arrive(self, who: Array, places: Array, words: Array) -> None:
        """Words uint32 [threads, n] of copies that were checked when they began."""
        self._views[4][(places // 4)[:, None] + np.arange(words.shape[1])] = words
        self.note_write(who, self.grains(places, 4 * words.shape[1]))

    def read(self, address: Array, who: Array, size: int, count: int) -> Array:
        """Elements [count, threads]."""
        places = self.places(address, who, size * count)
        grains = self.grains(places, size * count)
        self.check_read(who, grains)
        self.note_read(who, grains)
        return self._views[size][places // size + np.arange(count)[:, None]]

    def write(self, address: Array, who: Array, values: Array, size: int) -> None:
        """Values [count, threads]."""
        count = len(values)
        places = self.places(address, who, size * count)
        grains, at = self.grains(places, size * count), places // size + np.arange(count)[:, None]
        view = self._views[size]
        self.check_write(who, grains, (view[at] != values).any(0))
        view[at] = values
        if (view[at] != values).any():
            raise PtxError("threads write different values to one place of shared memory")
        self.note_write(who, grains, stored=True)


@dataclass
class _Copy:
    """A part of a copy to shared memory: threads, places, words [threads, n] and the group of each."""

    who: Array
    places: Array
    words: Array
    group: Array


class Copies:
    """cp.async: data arrives no earlier than it is waited for."""

    def __init__(self, p: Any) -> None:
        self._p = p
        self._pending: list[_Copy] = []
        self._committed = np.zeros(p.threads, np.int32)

    def start(self, shared: SharedMemory, target: Array, who: Array, words: Array) -> None:
        """Words uint32 [threads, n] are on their way; the target holds nothing until they arrive."""
        places = shared.places(target, who, 4 * words.shape[1])
        grains = shared.grains(places, 4 * words.shape[1])
        shared.check_write(who, grains, None)
        shared.note_write(who, grains, arriving=True)
        self._pending.append(_Copy(who, places, words, self._committed[who]))

    def commit(self, mask: Mask) -> None:
        """Close each thread's group."""
        self._committed[self._p.who(mask)] += 1

    def wait(self, shared: SharedMemory, mask: Mask, left: int) -> None:
        """All groups of the threads but the last `left` arrive."""
        waits = np.zeros(self._p.threads, bool)
        waits[self._p.who(mask)] = True
        pending = []
        for copy in self._pending:
            lands = waits[copy.who] & (copy.group < self._committed[copy.who] - left)
            if lands.any():
                who, places, words = copy.who[lands], copy.places[lands], copy.words[lands]
                shared.arrive(who, places, words)
            if not lands.all():
                stays = ~lands
                pending.append(_Copy(*(v[stays] for v in (copy.who, copy.places, copy.words, copy.group))))
        self._pending = pending
