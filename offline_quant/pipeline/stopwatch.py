"""Time and peak memory of a run, by stage."""

import time
from typing import Any

from offline_quant.runtime.malloc import peak_bytes, trim


class Stopwatch:
    """Wall time, processor time and peak memory by stage; what a stage has freed is given back.

    Args:
        matrix: bytes of one of an expert's matrices.
    """

    def __init__(self, matrix: int) -> None:
        self._matrix = matrix
        self.laps: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._last, self._last_cpu = time.monotonic(), time.process_time()

    def lap(self, name: str) -> None:
        """End a stage; stages of one name add up."""
        now, cpu = time.monotonic(), time.process_time()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self.cpu[name] = self.cpu.get(name, 0.0) + cpu - self._last_cpu
        self.peaks[name] = peak_bytes()
        trim(self._matrix)
        self._last, self._last_cpu = now, cpu

    def dump(self) -> dict[str, Any]:
        """As JSON data."""
        return {"laps": self.laps, "cpu": self.cpu, "peaks": self.peaks}

    def restore(self, data: dict[str, Any]) -> None:
        """Count on from what an earlier run had used."""
        for mine, theirs in ((self.laps, data["laps"]), (self.cpu, data["cpu"])):
            for name, value in theirs.items():
                mine[name] = mine.get(name, 0.0) + value
        for name, value in data["peaks"].items():
            self.peaks[name] = max(self.peaks.get(name, 0), value)
