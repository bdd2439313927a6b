"""Resident memory of this process."""

import ctypes
import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # the other figure begins with what the parent process had
        found = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if found:
            return 1024 * int(found.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def give_back() -> None:
    """Give freed memory back to the system.

    glibc keeps what lies between blocks that are still in use: of a large model
    more with every expert.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
