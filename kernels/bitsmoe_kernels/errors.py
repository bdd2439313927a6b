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
