"""Compiling the CPU kernels, and what is said where that fails."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bitsmoe_kernels._cpu import build
from builders import REPO
from cpu_sources import compile_changed


@pytest.mark.slow
def test_a_compiler_that_fails_is_named_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(build.CompileError, match=r"(?s)exit status 1 of .*\.cpp.*error: .*nonsense"):
        compile_changed(tmp_path / "sources", [("isa.h", "#include", "nonsense;\n#include")], [])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("/bin/false", "exit status 1 of /bin/false -std=c"),
        ("/no/such/c++ -v", "/no/such/c++: No such file or directory"),
    ],
)
def test_a_compiler_of_no_use_leaves_all_as_it_was(
    command: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", command)
    target = tmp_path / build.LIBRARY
    target.write_text("an older one")
    with pytest.raises(build.CompileError) as caught:
        build.compile_library(target)
    assert str(caught.value).startswith(words)
    assert [p.name for p in tmp_path.iterdir()] == [build.LIBRARY]
    assert target.read_text() == "an older one"


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.CompileError, match="there is no C\\+\\+ compiler: install g\\+\\+, or name one in CXX"):
        build.compile_library(tmp_path / build.LIBRARY)


def test_a_machine_without_sources_is_said(tmp_path: Path) -> None:
    with pytest.raises(build.CompileError, match=r"no CPU kernels for linux on s390x, only for Linux on \['x86_64'"):
        build.compile_library(tmp_path / build.LIBRARY, machine="s390x")


def test_the_command_ends_with_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bitsmoe_kernels._cpu.build"]
    done = subprocess.run(command, env=os.environ | {"CXX": "/bin/false"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: exit status 1 of /bin/false")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel is built from, without a library."""
    folder = tmp_path_factory.mktemp("checkout") / "checkout"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copyfile(REPO / name, folder / name)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("bitsmoe", "bitsmoe_vllm", "offline_quant", "kernels"):
        shutil.copytree(REPO / name, folder / name, ignore=ignored)
    return folder


def wheel(checkout: Path, out: Path, **environment: str) -> tuple[Path, set[str], str]:
    """A wheel that setuptools builds, the names in it, and what was said."""
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=checkout,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return path, set(archive.namelist()), done.stderr


@pytest.mark.slow
def test_a_broken_compiler_gives_a_wheel_without_the_library_and_says_so(checkout: Path, tmp_path: Path) -> None:
    path, names, said = wheel(checkout, tmp_path, CXX="/bin/false")
    assert "bitsmoe-vllm: NO CPU KERNELS, serving on a CPU will be very slow: exit status 1 of /bin/false" in said
    assert not [name for name in names if name.endswith(".so")]
    assert {f"bitsmoe_kernels/_cpu/{name}" for name in ("native.cpp", "layout.h", "library.py")} <= names
    assert path.name.endswith("-py3-none-linux_" + os.uname().machine + ".whl")


@pytest.mark.nightly
@pytest.mark.slow
def test_a_wheel_holds_the_library_where_python_looks_for_it(checkout: Path, tmp_path: Path) -> None:
    path, names, said = wheel(checkout, tmp_path)
    assert "NO CPU KERNELS" not in said
    assert [name for name in names if name.endswith(".so")] == [f"bitsmoe_kernels/_cpu/{build.LIBRARY}"]
    assert path.name.endswith("-py3-none-linux_" + os.uname().machine + ".whl")


@pytest.mark.slow
@pytest.mark.parametrize("works", [True, False])
def test_an_editable_installation_has_the_library_beside_its_sources(
    works: bool, checkout: Path, tmp_path: Path
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho library > "$2"\n')
    compiler.chmod(0o755)
    folder = shutil.copytree(checkout, tmp_path / "checkout")
    code = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=folder,
        env=os.environ | {"CXX": str(compiler) if works else "/bin/false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    library = folder / "kernels" / "bitsmoe_kernels" / "_cpu" / build.LIBRARY
    assert library.exists() is works
    assert ("NO CPU KERNELS" in done.stderr) is not works
