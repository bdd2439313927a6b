"""Progress bars with a time estimate, on standard error, so that standard output stays clean for `--json`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Iterate with a progress bar of its own."""
    with make_progress() as progress:
        yield from progress.track(items, description=description)


@contextmanager
def bar(description: str, total: int) -> Iterator["Bar"]:
    """A bar advanced by hand."""
    with make_progress() as progress:
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
