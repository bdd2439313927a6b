"""Several processes that quantize one model: every one runs the same program and does its share of each loop.

What is shared comes back to all of them, in the same order however many there are, so the result does not depend on
their number. Processes talk through torch.distributed.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

TIMEOUT = timedelta(days=7)
"""Longest wait for the others. The first process samples text or tries forecasts alone, which may take hours; one that
is gone is noticed at once."""


class Workers:
    """One process alone; see `TorchWorkers` for several."""

    rank = 0
    size = 1
    local_rank = 0

    def owner(self, index: int) -> int:
        """The process whose item is at this place of a shared loop."""
        return index % self.size

    def is_local(self, index: int) -> bool:
        """Whether the item at this place of a shared loop is this process's."""
        return self.owner(index) == self.rank

    def map(self, items: Sequence[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
        """`work` of every item by its owner; results in the order of the items, for all processes."""
        for item in items:
            yield work(item)

    def in_turn(self, items: Sequence[Item], state: Tensor) -> Iterator[Item]:
        """Items of this process, each when those before it are done, whoever owns them; to be read to the end.

        Args:
            items: of all processes.
            state: contiguous; what every item changes and the next one goes on with. Before and after, the first
                process has it.
        """
        yield from items

    def all_reduce_sum(self, disjoint: Tensor) -> Tensor:
        """Sum of everyone's tensor, of which every entry is filled by one process and 0 in the others: exact."""
        return disjoint

    def smallest(self, value: int) -> int:
        """The smallest of everyone's values."""
        return value

    def broadcast_from_first(self, decide: Callable[[], Result]) -> Result:
        """What the first process decides."""
        return decide()

    def barrier(self) -> None:
        """Until all have come here."""


class TorchWorkers(Workers):
    """A process of a torch.distributed group, which `torchrun` or `workers.launch_workers` has started.

    Raises:
        RuntimeError: the others cannot be reached.
    """

    def __init__(self) -> None:
        # gloo: what is exchanged is small beside what is computed, and lies on the CPU.
        dist.init_process_group("gloo", timeout=TIMEOUT)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))

    def map(self, items: Sequence[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
        """See `Workers.map`; in rounds of one item for each process, so that few results wait."""
        for start in range(0, len(items), self.size):
            own = work(items[start + self.rank]) if start + self.rank < len(items) else None
            found: list[Any] = [None] * self.size
            dist.all_gather_object(found, own)
            yield from found[: len(items) - start]

    def in_turn(self, items: Sequence[Item], state: Tensor) -> Iterator[Item]:
        """See `Workers.in_turn`."""
        holder = 0
        for i, item in enumerate(items):
            self._hand_on(state, holder, self.owner(i))
            holder = self.owner(i)
            if holder == self.rank:
                yield item
        self._hand_on(state, holder, 0)

    def _hand_on(self, state: Tensor, giver: int, taker: int) -> None:
        """The taker's tensor becomes that of the giver."""
        if giver == taker:
            return
        if self.rank == giver:
            dist.send(state.cpu(), taker)
        elif self.rank == taker:
            received = torch.empty_like(state, device="cpu")
            dist.recv(received, giver)
            state.copy_(received)

    def all_reduce_sum(self, disjoint: Tensor) -> Tensor:
        """See `Workers.all_reduce_sum`."""
        on_cpu = disjoint.cpu()
        dist.all_reduce(on_cpu)
        return on_cpu.to(disjoint.device)

    def smallest(self, value: int) -> int:
        """See `Workers.smallest`."""
        least = torch.tensor(value)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)

    def broadcast_from_first(self, decide: Callable[[], Result]) -> Result:
        """See `Workers.broadcast_from_first`."""
        box: list[Any] = [decide() if self.rank == 0 else None]
        own = box[0]
        dist.broadcast_object_list(box)
        return own if self.rank == 0 else box[0]

    def barrier(self) -> None:
        """See `Workers.barrier`."""
        dist.barrier()


def started_as_worker() -> bool:
    """Whether the environment says that this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
