"""What the machine reports."""


class PtxFault(AssertionError):
    """A program did what a GPU would punish, or may punish in another order of events."""


class UnknownInstruction(NotImplementedError):
    """PTX that the machine cannot execute: an opcode, a modifier or an operand."""
