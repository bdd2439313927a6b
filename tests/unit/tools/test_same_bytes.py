"""The comparer of checkouts: it sees a changed byte, and no time or memory."""

from pathlib import Path

import pytest
import typer

from tools import same_bytes

PAGE = """<h2>Weights</h2>
{weights}
<h2>Time and memory</h2>
<td>write</td> {time} s 12% {memory} GB
<h2>Options</h2>
2.5"""


def page(weights: str = "0.5 s", time: str = "1.2", memory: str = "1.1") -> str:
    return same_bytes.digest("report.html", PAGE.format(weights=weights, time=time, memory=memory).encode())


def test_times_and_memory_do_not_count() -> None:
    assert page() == page(time="31.0", memory="24.0")
    shown = (
        "Report: out/report.html\n2.5 bits, 21.9 s (check 0.1\ns, write 0.2 s)",
        "Report: out/report.html\n2.5 bits, 9.0 s (check 0.1 s,\nwrite 7.2 s)",
    )
    assert len({same_bytes.digest("stdout", text.encode()) for text in shown}) == 1


def test_everything_else_does() -> None:
    assert page() != page(weights="0.6 s")  # only the section of times is masked
    assert same_bytes.digest("stdout", b"2.5 bits, 9.0 s") != same_bytes.digest("stdout", b"2.6 bits, 9.0 s")
    assert same_bytes.digest("config.json", b"1.0 s") != same_bytes.digest("config.json", b"2.0 s")


def test_differences_are_named() -> None:
    before, after = {"a": "1", "b": "1", "c": "1"}, {"b": "2", "c": "1", "d": "1"}
    assert same_bytes.differences(before, after) == ["a is missing", "d is new", "b differs"]
    assert same_bytes.differences(before, before) == []


def test_a_directory_is_taken_and_another_name_is_refused(tmp_path: Path) -> None:
    with same_bytes.checkout(str(tmp_path)) as (tree, revision):
        assert (tree, revision) == (tmp_path.resolve(), None)
    with (
        pytest.raises(typer.BadParameter, match="neither a directory nor a commit"),
        same_bytes.checkout("no-such-thing"),
    ):
        pass


def test_the_matrix_holds_what_it_promises() -> None:
    options = [" ".join(case.options) for case in same_bytes.CASES.values()]
    for wanted in ("alphaq", "bt-moe", "frequency", "uniform", "natural", "whitened", "paper", "--tune", "--workers 2"):
        assert any(wanted in given for given in options), wanted
    for wanted in ("--dense-bits 4", "--dense-bits 8", "--block-size 32", "--device cuda", "--budget model"):
        assert any(wanted in given for given in options), wanted
    assert sum(case.killed for case in same_bytes.CASES.values()) == 2
    assert sum(case.pretended for case in same_bytes.CASES.values()) == 3
