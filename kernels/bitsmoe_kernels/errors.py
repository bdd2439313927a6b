"""The one error type for faults of a checkpoint or of a user's input."""

from collections.abc import Iterable


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
            *(f"  - {f}" for f in shown),
        ]
        if len(self.faults) > len(shown):
            lines.append(f"  ... and {len(self.faults) - len(shown)} more")
        super().__init__("\n".join(lines))


def fault_list(title: str, faults: list[str], shown: int = 12) -> str:
    """A message with one line for each fault, the first `shown` of them."""
    more = [f"... and {len(faults) - shown} more"] if len(faults) > shown else []
    return "\n".join([f"{title}:", *(f"  - {f}" for f in faults[:shown]), *(f"  {m}" for m in more)])
