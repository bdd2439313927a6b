"""The import directions, read from the source: between packages, between the stages of one, and no circle."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from builders import REPO

# Package -> its folder and the top-level modules it must never import, not even inside a function.
RULES = {
    "bitsmoe_kernels": (
        "kernels/bitsmoe_kernels",
        {"bitsmoe", "offline_quant", "bitsmoe_vllm", "vllm", "transformers"},
    ),
    "offline_quant": ("offline_quant", {"bitsmoe", "bitsmoe_vllm", "vllm", "triton"}),
    "bitsmoe_vllm": ("bitsmoe_vllm", {"bitsmoe", "offline_quant"}),
    "bitsmoe": ("bitsmoe", {"bitsmoe_vllm", "vllm", "triton"}),
}
# What each of the outer packages is there to join.
NEEDS = {
    "offline_quant": {"bitsmoe_kernels"},
    "bitsmoe_vllm": {"bitsmoe_kernels", "vllm"},
    "bitsmoe": {"bitsmoe_kernels", "offline_quant", "transformers"},
}


ARCHITECTURE = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")


def floors_of(package: str) -> list[set[str]]:
    """Stages that docs/architecture.md lists for a package, those that import nothing first."""
    section = ARCHITECTURE.split(f"## Floors of `{package}`", 1)[1]
    block = re.search(r"```text\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return [set(line.split()) for line in block[1].splitlines()]


def inner_imports(folder: Path) -> dict[str, set[str]]:
    """What every module of a package imports of it, by dotted names without the package's own."""
    names = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == folder.name:
                module = node.module.partition(".")[2]
                for alias in node.names:
                    below = f"{module}.{alias.name}".lstrip(".")
                    found[name].add(below if below in names else module)
        found[name] -= {name}
    return found


def climbs(folder: Path, floors: list[set[str]]) -> list[str]:
    """Imports of a package that go to another stage of the same floor, or to a later one."""
    floor = {stage: i for i, stages in enumerate(floors) for stage in stages}
    return [
        f"{name} imports {target}"
        for name, targets in sorted(inner_imports(folder).items())
        for target in sorted(targets)
        if name and target and (a := name.partition(".")[0]) != (b := target.partition(".")[0])
        if floor[a] <= floor[b]
    ]


def circle(folder: Path) -> list[str]:
    """Modules of a package that import one another in a circle; a package's `__init__` counts as a module."""
    graph = inner_imports(folder)
    graph.pop("", None)  # its version, which anything may read
    try:
        TopologicalSorter({name: targets - {""} for name, targets in graph.items()}).prepare()
    except CycleError as e:
        return list(e.args[1])
    return []


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and top-level module of every absolute import, at any depth, and of importlib with a literal name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.lineno, node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0]
            if called in ("import_module", "__import__", "find_spec") and isinstance(name, ast.Constant):
                yield node.lineno, str(name.value).partition(".")[0]


def violations(folder: Path, forbidden: set[str]) -> list[str]:
    return [
        f"{path.relative_to(folder.parent)}:{line} imports {module}"
        for path in sorted(folder.rglob("*.py"))
        for line, module in imports(path.read_text(encoding="utf-8"))
        if module in forbidden
    ]


@pytest.mark.parametrize("package", RULES)
def test_direction(package: str) -> None:
    folder, forbidden = RULES[package]
    assert (REPO / folder / "__init__.py").is_file()
    assert violations(REPO / folder, forbidden) == []


@pytest.mark.parametrize("package", NEEDS)
def test_the_outer_packages_build_on_the_inner_one(package: str) -> None:
    files = (REPO / RULES[package][0]).rglob("*.py")
    assert NEEDS[package] <= {module for path in files for _, module in imports(path.read_text(encoding="utf-8"))}


def test_format_needs_neither_triton_nor_the_kernels() -> None:
    """The format is usable without a GPU stack: its imports of its own package are itself, errors and activations."""
    folder = REPO / "kernels/bitsmoe_kernels/format"
    allowed = tuple(f"bitsmoe_kernels.{name}" for name in ("format", "errors", "expert_mlp"))
    assert violations(folder, {"triton", "numpy"}) == []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bitsmoe_kernels"):
                assert node.module.startswith(allowed), path


def test_kernels_is_no_package() -> None:
    """An __init__.py there would shadow the PyPI package `kernels`, which transformers imports."""
    assert (REPO / "kernels" / "bitsmoe_kernels" / "__init__.py").is_file()
    assert not (REPO / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("package", ["offline_quant", "bitsmoe_kernels"])
def test_stages_import_downwards_only(package: str) -> None:
    folder = REPO / RULES[package][0]
    floors = floors_of(package)
    stages = {p.stem for p in folder.iterdir() if (p / "__init__.py").exists() or p.suffix == ".py"} - {"__init__"}
    assert set().union(*floors) == stages
    assert climbs(folder, floors) == []


def test_the_quantizers_top_level_holds_stages() -> None:
    assert {p.name for p in (REPO / "offline_quant").glob("*.py")} == {"__init__.py", "config.py", "linalg.py"}


@pytest.mark.parametrize("package", RULES)
def test_no_modules_import_one_another(package: str) -> None:
    assert circle(REPO / RULES[package][0]) == []


@pytest.mark.parametrize("line", ["from house.attic import a", "def f():\n    from house.attic.box import b"])
def test_a_planted_climb_and_a_planted_circle_are_found(tmp_path: Path, line: str) -> None:
    folder = tmp_path / "house"
    for stage in ("cellar", "attic"):
        (folder / stage).mkdir(parents=True)
        (folder / stage / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("")
    (folder / "attic" / "box.py").write_text("from house.cellar import tools\n")
    (folder / "cellar" / "tools.py").write_text("import torch\n")
    floors = [{"cellar"}, {"attic"}]
    assert climbs(folder, floors) == []
    assert circle(folder) == []
    (folder / "cellar" / "tools.py").write_text(f"{line}\n")
    (climb,) = climbs(folder, floors)
    assert climb.startswith("cellar.tools imports attic")
    (folder / "attic" / "__init__.py").write_text("from house.attic.box import b\n")
    assert "cellar.tools" in circle(folder)


@pytest.mark.parametrize(
    "line",
    [
        "import vllm",
        "import vllm.config as c",
        "import os, vllm",
        "from vllm import LLM",
        "from vllm.model_executor.layers import fused_moe",
        "def f():\n    from vllm import LLM",
        "if TYPE_CHECKING:\n    import vllm",
        "try:\n    import vllm\nexcept ImportError:\n    pass",
        "importlib.import_module('vllm.config')",
        "import_module('vllm')",
        "__import__('vllm')",
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, line: str) -> None:
    package = tmp_path / "package" / "deep"
    package.mkdir(parents=True)
    (package / "fine.py").write_text("import torch\nfrom . import vllm\nfrom vllm_like import x\n'import vllm'\n")
    assert violations(tmp_path / "package", {"vllm"}) == []
    (package / "bad.py").write_text(f"import importlib\n{line}\n")
    (found,) = violations(tmp_path / "package", {"vllm"})
    assert found.startswith("package/deep/bad.py:")
    assert found.endswith(" imports vllm")
