"""Time and peak memory of a run, by stage."""

import time
from dataclasses import dataclass, field

from offline_quant.runtime.malloc import peak_bytes, trim


@dataclass(frozen=True)
class StageFigures:
    """Time and memory by name of a stage.

    Attributes:
        laps: wall time, seconds.
        cpu: processor time of all threads, seconds.
        peaks: largest resident bytes of the process by the end of the stage.
    """

    laps: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)


class Stopwatch:
    """Measures the stages of a run, one after another. Memory that a stage has freed goes back to the system.

    Attributes:
        figures: what was measured so far.

    Args:
        matrix_bytes: of one matrix of an expert, float32.
    """

    def __init__(self, matrix_bytes: int) -> None:
        self.figures = StageFigures()
        self._matrix_bytes = matrix_bytes
        self._last, self._last_cpu = time.monotonic(), time.process_time()

    def lap(self, name: str) -> None:
        """End a stage; stages of one name add up."""
        now, cpu = time.monotonic(), time.process_time()
        figures = self.figures
        figures.laps[name] = figures.laps.get(name, 0.0) + now - self._last
        figures.cpu[name] = figures.cpu.get(name, 0.0) + cpu - self._last_cpu
        figures.peaks[name] = peak_bytes()
        trim(self._matrix_bytes)
        self._last, self._last_cpu = now, cpu

    def restore(self, earlier: StageFigures) -> None:
        """Add the figures of an earlier run that this one resumes."""
        for mine, theirs in ((self.figures.laps, earlier.laps), (self.figures.cpu, earlier.cpu)):
            for name, value in theirs.items():
                mine[name] = mine.get(name, 0.0) + value
        for name, peak in earlier.peaks.items():
            self.figures.peaks[name] = max(self.figures.peaks.get(name, 0), peak)
