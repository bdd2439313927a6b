"""The one error type for faults of a checkpoint or of a user's input."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

MAX_LINE = 600
"""Characters of one fault that are shown."""
USAGE_STATUS = 2
"""Exit status of a command that refuses what it was given."""


class BitsmoeError(Exception):
    """A fault the user can mend. The message names the file, tensor or option, the values, and the remedy.

    Not a ValueError: pydantic, inside vLLM, would wrap one into a validation error of its own.
    """


class FormatError(BitsmoeError):
    """A checkpoint that does not follow the format. Lists every fault found, not only the first.

    Args:
        subject: what was checked, a path or a tensor prefix.
        faults: one sentence each.
    """

    MAX_SHOWN = 20

    def __init__(self, subject: str, faults: Iterable[str]):
        self.faults = list(faults)
        shown = self.faults[: self.MAX_SHOWN]
        lines = [
            f"{subject}: not a valid bitsmoe checkpoint, {len(self.faults)} fault(s):",
            *(f"  - {_shown(f)}" for f in shown),
        ]
        if len(self.faults) > len(shown):
            lines.append(f"  ... and {len(self.faults) - len(shown)} more")
        super().__init__("\n".join(lines))


class Faults:
    """Gathers the faults of several checks, so that all are said at once."""

    def __init__(self) -> None:
        self._said: list[str] = []

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """A check: its BitsmoeError is kept, and what follows the block goes on."""
        try:
            yield
        except BitsmoeError as e:
            self._said.append(str(e))

    def raise_all(self) -> None:
        """End the checks.

        Raises:
            BitsmoeError: the messages of all that failed.
        """
        if self._said:
            raise BitsmoeError("\n".join(dict.fromkeys(self._said)))


def one_line(error: BaseException) -> str:
    """A library's whole message on one line, or the error's name."""
    return " ".join(str(error).split()) or type(error).__name__


def fault_list(title: str, faults: list[str], shown: int = 12) -> str:
    """A message with one line for each fault, the first `shown` of them."""
    more = [f"... and {len(faults) - shown} more"] if len(faults) > shown else []
    return "\n".join([f"{title}:", *(f"  - {_shown(f)}" for f in faults[:shown]), *(f"  {m}" for m in more)])


def _shown(fault: str) -> str:
    """A fault as a terminal can take it: names come from files, where they may be of any length and hold anything."""
    cut = fault if len(fault) <= MAX_LINE else f"{fault[:MAX_LINE]}..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)
