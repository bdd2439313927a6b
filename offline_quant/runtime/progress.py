"""Progress with a time estimate, on standard error, so that standard output stays clean for `--json`.

A bar on a terminal; elsewhere (a log file, say) a line now and then.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 60.0
"""Between two lines where there is no terminal."""
LINES_COUNTED = 30
"""Lines whose pace the estimate of the time left is taken from."""
T = TypeVar("T")
# Without markup and emoji: paths and messages may hold brackets and colons.
console = Console(stderr=True, highlight=False, markup=False, emoji=False)


def make_progress() -> Progress:
    """A progress display: description, bar, count, elapsed and remaining time."""
    return Progress(
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def _shown() -> Iterator[Progress]:
    with make_progress() as progress:
        if console.is_terminal:
            yield progress
            return
        over = Event()
        lines = Thread(target=_write_lines, args=(progress, over), daemon=True)
        lines.start()
        try:
            yield progress
        finally:
            over.set()
            lines.join()


def _write_lines(progress: Progress, over: Event) -> None:
    """A line for every LINE_SECONDS until it is over, with the time left at the pace of the last LINES_COUNTED."""
    start, seen = time.monotonic(), deque[tuple[float, float]](maxlen=LINES_COUNTED)
    while not over.wait(LINE_SECONDS):
        for task in progress.tasks:
            now = time.monotonic()
            # Not from the start on: what an earlier run had finished is passed in a moment.
            seen.append((now, task.completed))
            (before, had), total = seen[0], task.total or 0
            left = "time left not known yet"
            if task.completed > had:
                left = f"{clock((total - task.completed) * (now - before) / (task.completed - had))} left"
            console.print(f"{task.description}: {task.completed:g} of {total:g}, {clock(now - start)} so far, {left}")


def clock(seconds: float) -> str:
    """A duration as hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Iterate with a progress bar of its own."""
    with _shown() as progress:
        yield from progress.track(items, description=description)


@contextmanager
def bar(description: str, total: int) -> Iterator["Bar"]:
    """A bar that the caller advances."""
    with _shown() as progress:
        yield Bar(progress, description, total)


class Bar:
    """One bar: call it to advance, `describe` it to change its text."""

    def __init__(self, progress: Progress, description: str, total: int):
        self._progress = progress
        self._task = progress.add_task(description, total=total)

    def __call__(self, count: int = 1) -> None:
        """Advance."""
        self._progress.advance(self._task, count)

    def describe(self, description: str) -> None:
        """Change the text."""
        self._progress.update(self._task, description=description)
