"""The import directions: bitsmoe -> offline_quant -> bitsmoe_kernels <- bitsmoe_vllm, read from the source."""

import ast
from collections.abc import Iterator
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
    """The format is usable without a GPU stack: of its own package it imports only itself and the errors."""
    folder = REPO / "kernels/bitsmoe_kernels/format"
    assert violations(folder, {"triton", "numpy"}) == []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bitsmoe_kernels"):
                assert node.module.startswith(("bitsmoe_kernels.format", "bitsmoe_kernels.errors")), path


def test_kernels_is_no_package() -> None:
    """An __init__.py there would shadow the PyPI package `kernels`, which transformers imports."""
    assert (REPO / "kernels" / "bitsmoe_kernels" / "__init__.py").is_file()
    assert not (REPO / "kernels" / "__init__.py").exists()


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
