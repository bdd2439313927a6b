"""What the machine reports."""


class PtxError(AssertionError):
    """A program did what a GPU would punish, or may punish in another order of events."""


class UnknownInstructionError(NotImplementedError):
    """PTX that the machine cannot execute: an opcode, a modifier or an operand."""
