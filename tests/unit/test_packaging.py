"""What `[tool.setuptools]` puts into a wheel. `tools/try_wheel.py` builds one and installs it."""

import re
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

from bitsmoe_kernels._cpu.build import MACHINES
from bitsmoe_kernels._cpu.library import PATH
from builders import REPO

SETTINGS = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
FOLDERS = {
    "bitsmoe": REPO / "bitsmoe",
    "bitsmoe_kernels": REPO / "kernels" / "bitsmoe_kernels",
    "bitsmoe_vllm": REPO / "bitsmoe_vllm",
    "offline_quant": REPO / "offline_quant",
}


def packages_below(root: Path) -> set[str]:
    find = SETTINGS["packages"]["find"]
    return {p for where in find["where"] for p in find_packages(str(root / where), include=find["include"])}


def package_of(path: Path, top: str) -> str:
    return ".".join((top, *path.parent.relative_to(FOLDERS[top]).parts))


def test_every_module_is_in_a_package_of_the_wheel() -> None:
    folders = {package_of(path, top) for top, folder in FOLDERS.items() for path in folder.rglob("*.py")}
    assert packages_below(REPO) == folders


@pytest.mark.parametrize("top", FOLDERS)
def test_packages_at_any_depth_are_found(tmp_path: Path, top: str) -> None:
    names = [".".join((top, *"abcd"[:depth])) for depth in range(5)]
    for name in names:
        folder = tmp_path / FOLDERS[top].relative_to(REPO).parent / name.replace(".", "/")
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    for name in ("tests", "tools", "benchmarks", "examples"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "kernels").mkdir(exist_ok=True)
    assert packages_below(tmp_path) == set(names)


def test_sources_of_the_cpu_kernels_are_in_a_source_distribution() -> None:
    """As data of the package: setuptools' list of an extension's sources leaves out headers."""
    declared = {p for pattern in SETTINGS["package-data"]["bitsmoe_kernels._cpu"] for p in PATH.parent.glob(pattern)}
    assert {PATH.parent / name for machine in MACHINES.values() for name in machine} <= declared
    included = {name for p in declared for name in re.findall(r'#include "(.*)"', p.read_text(encoding="utf-8"))}
    assert {PATH.parent / name for name in included} <= declared


@pytest.mark.parametrize("top", FOLDERS)
def test_all_other_files_of_a_package_are_declared(top: str) -> None:
    """Files that are no modules are left out of a wheel unless `package-data` names them. The library is compiled."""
    data = SETTINGS["package-data"]
    others = {p for p in FOLDERS[top].rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")} - {PATH}
    declared = {
        path
        for folder in {p.parent for p in FOLDERS[top].rglob("*.py")}
        for pattern in (*data.get("*", ()), *data.get(package_of(folder / "x", top), ()))
        for path in folder.glob(pattern)
    }
    assert FOLDERS[top] / "py.typed" in declared
    assert others == declared
