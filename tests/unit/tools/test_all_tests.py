"""`make test` leaves no test out, runs none twice, and says what failed."""

import sys
from pathlib import Path

import pytest

from tools.all_tests import GROUPS, ROOT, run_all


def taken(arguments: tuple[str, ...], path: Path) -> bool:
    """Whether pytest collects a file."""
    ignored = [Path(a.removeprefix("--ignore=")) for a in arguments if a.startswith("--ignore=")]
    given = [Path(a) for a in arguments if not a.startswith("--")]
    assert all((ROOT / p).exists() for p in given + ignored)
    return any(path.is_relative_to(p) for p in given) and not any(path.is_relative_to(p) for p in ignored)


def test_every_test_file_is_in_one_group() -> None:
    files = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")]
    counts = {path: sum(taken(tuple(given), path) for given in GROUPS.values()) for path in files}
    wrong = {str(p): n for p, n in counts.items() if n != (not p.is_relative_to("tests/gpu"))}
    assert len(files) > 80
    assert not wrong


def test_failures_are_named_and_everything_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os, sys; print('said by', *sys.argv[1:], os.environ['OMP_NUM_THREADS']); sys.exit(int(sys.argv[2]))"
    commands = {name: [sys.executable, "-c", code, name, str(n)] for name, n in (("a", 0), ("b", 3), ("c", 0))}
    assert run_all(commands, 2) == ["b"]
    said = capfd.readouterr().out
    for name, status, ended in (("a", 0, "passed"), ("b", 3, "failed"), ("c", 0, "passed")):
        assert f"said by {name} {status} 1\n\n##### {name}: {ended} in " in said
