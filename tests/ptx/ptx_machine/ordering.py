"""Which writes of one program another may rely on.

A program's time is the number of barriers it has passed. A release tells of what the program wrote before its last
barrier, and of all it may rely on itself. An acquire learns that, for the whole program after its next barrier.
"""

from typing import Any

import numpy as np

from ptx_machine.registers import Array


class Order:
    """The programs of one launch.

    Attributes:
        time: int32 [programs], barriers passed.
        seen: int32 [programs, programs]: a program may rely on what another one wrote before this time of its.
    """

    def __init__(self, programs: int) -> None:
        self.time = np.zeros(programs, np.int32)
        self.seen = np.zeros((programs, programs), np.int32)
        self._acquired = self.seen.copy()
        self._released: dict[int, Array] = {}

    def barrier(self, programs: Array) -> None:
        """All threads of these programs have met."""
        self.time[programs] += 1
        self.seen[programs] = np.maximum(self.seen[programs], self._acquired[programs])

    def release(self, program: int, address: int) -> None:
        """An atomic operation of one of its threads tells of the program's writes."""
        told = self.seen[program].copy()
        told[program] = self.time[program]
        self._released[address] = np.maximum(self._released.get(address, 0), told)

    def acquire(self, program: int, address: int) -> None:
        """One of its threads learns what was told there."""
        if address in self._released:
            self._acquired[program] = np.maximum(self._acquired[program], self._released[address])

    def holds(self, program: Any, thread: Any, writer: Any, written_by: Any, time: Any) -> Array:
        """Whether what thread `written_by` of program `writer` wrote at `time` is settled for a thread."""
        own = (written_by == thread) | (time < self.time[program])
        return np.where(writer == program, own, self.seen[program, writer] > time)
