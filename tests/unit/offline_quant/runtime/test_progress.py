"""Progress where there is no terminal: a line now and then, with the time left."""

import io
import re
import time

import pytest
from rich.console import Console

from offline_quant.runtime import progress


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    written = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=written, width=120))
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    return written


def lines(log: io.StringIO) -> list[str]:
    return [line for line in log.getvalue().splitlines() if " so far, " in line]


def wait_for_line(log: io.StringIO, words: str) -> str:
    for _ in range(1000):
        if found := [line for line in lines(log) if words in line]:
            return found[0]
        time.sleep(0.02)
    raise AssertionError(log.getvalue())


def test_a_long_stage_shows_lines_before_it_ends(log: io.StringIO) -> None:
    with progress.bar("Quantizing layer 1/2", 100) as on_progress:
        on_progress(10)
        first = wait_for_line(log, "10 of 100")
        on_progress.describe("Quantizing layer 2/2")
        on_progress(30)
        last = wait_for_line(log, "40 of 100")
    assert re.fullmatch(r"Quantizing layer 1/2: 10 of 100, \d:\d\d:\d\d so far, time left not known yet", first)
    assert re.fullmatch(r"Quantizing layer 2/2: 40 of 100, \d:\d\d:\d\d so far, \d:\d\d:\d\d left", last)


def test_the_time_left_follows_the_pace_and_not_what_an_earlier_run_did(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it is there at once; the rest goes at 5 in 30 seconds, so that 45 take four and a half minutes."""
    clock, waited = [0.0], []

    class Clock:
        """`Event` whose waiting moves the clock on."""

        def __init__(self) -> None:
            self.ended = False

        def wait(self, seconds: float) -> bool:
            if self.ended or len(waited) == 3:
                return True
            waited.append(seconds)
            clock[0] += 30
            if len(waited) > 1:
                on_progress(5)
            return False

        def set(self) -> None:
            self.ended = True

    class Now:
        """A thread that has run when it has started."""

        def __init__(self, target, args, daemon):
            self.work = lambda: target(*args)

        def start(self) -> None:
            pass

        def join(self) -> None:
            self.work()

    monkeypatch.setattr(progress, "Event", Clock)
    monkeypatch.setattr(progress, "Thread", Now)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Clock, "set", lambda self: None)
    with progress.bar("Quantizing", 100) as on_progress:
        on_progress(50)
    assert lines(log) == [
        "Quantizing: 50 of 100, 0:00:30 so far, time left not known yet",
        "Quantizing: 55 of 100, 0:01:00 so far, 0:04:30 left",
        "Quantizing: 60 of 100, 0:01:30 so far, 0:04:00 left",
    ]


def test_a_terminal_has_its_bar_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=written, width=120, force_terminal=True))
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    with progress.bar("Quantizing", 10) as on_progress:
        time.sleep(0.05)
        on_progress(10)
    assert not lines(written)
    assert "10/10" in written.getvalue()
