"""What `tools/try_wheel.py` finds in wheels and source distributions that were built wrongly."""

import tarfile
import zipfile
from pathlib import Path

import pytest

from tools.try_wheel import LIBRARY, TAG, TrialError, check_sdist, check_wheels

NAMES = {
    "Makefile",
    "bitsmoe/py.typed",
    "kernels/bitsmoe_kernels/_cpu/native.cpp",
    "kernels/bitsmoe_kernels/deep/er/SPEC.md",
    "offline_quant/cli.py",
    "tests/unit/test_cli.py",
    ".github/workflows/quick.yml",
}
WHEEL = (
    "bitsmoe/py.typed",
    "bitsmoe_kernels/_cpu/native.cpp",
    "bitsmoe_kernels/deep/er/SPEC.md",
    "offline_quant/cli.py",
    LIBRARY,
    "x-1.dist-info/METADATA",
)
SDIST = ("Makefile", *(n for n in NAMES if "/" in n and not n.startswith(".")))


def make_wheel(folder: Path, *names: str, text: str = "same", tag: str = TAG) -> Path:
    folder.mkdir()
    path = folder / f"x-1-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, text)
    return path


def make_sdist(folder: Path, *names: str) -> Path:
    content = folder / "content"
    content.touch()
    path = folder / "x-1.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.add(content, f"x-1/{name}")
    return path


def test_a_whole_wheel_is_accepted(tmp_path: Path) -> None:
    check_wheels(make_wheel(tmp_path / "a", *WHEEL), make_wheel(tmp_path / "b", *WHEEL), NAMES)


@pytest.mark.parametrize("lost", WHEEL[:-1])
def test_a_file_missing_from_both_wheels_is_named(tmp_path: Path, lost: str) -> None:
    names = [n for n in WHEEL if n != lost]
    with pytest.raises(TrialError, match=rf"missing: \['{lost}'\], unexpected: \[\]"):
        check_wheels(make_wheel(tmp_path / "a", *names), make_wheel(tmp_path / "b", *names), NAMES)


def test_a_file_left_over_from_an_earlier_build_is_named(tmp_path: Path) -> None:
    names = (*WHEEL, "offline_quant/old.py")
    with pytest.raises(TrialError, match=r"missing: \[\], unexpected: \['offline_quant/old.py'\]"):
        check_wheels(make_wheel(tmp_path / "a", *names), make_wheel(tmp_path / "b", *names), NAMES)


def test_wheels_that_differ_are_refused(tmp_path: Path) -> None:
    other = make_wheel(tmp_path / "b", *WHEEL, text="other")
    with pytest.raises(TrialError, match="differ"):
        check_wheels(make_wheel(tmp_path / "a", *WHEEL), other, NAMES)


@pytest.mark.parametrize("tag", ["py3-none-any", "cp311-cp311-linux_x86_64"])
def test_a_wheel_for_any_machine_or_one_python_is_refused(tmp_path: Path, tag: str) -> None:
    wheels = [make_wheel(tmp_path / name, *WHEEL, tag=tag) for name in "ab"]
    with pytest.raises(TrialError, match=rf"x-1-{tag}.whl does not end in -py3-none-linux_"):
        check_wheels(*wheels, NAMES)


def test_a_source_distribution_needs_all_but_hidden_files(tmp_path: Path) -> None:
    folder = check_sdist(make_sdist(tmp_path, *SDIST), NAMES, tmp_path / "whole")
    assert (folder / "tests/unit/test_cli.py").is_file()
    with pytest.raises(TrialError, match=r"missing: \['Makefile'\]"):
        check_sdist(make_sdist(tmp_path, *SDIST[1:]), NAMES, tmp_path / "cut")
