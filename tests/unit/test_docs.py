"""Pages against the code: links, paths, modules, commands and calls that they name, and the site's list of pages.

`mkdocs build --strict` checks anchors too.
"""

import ast
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import bitsmoe
from builders import REPO
from offline_quant.cli.options_table import options_table

PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "examples/*/*.md", "benchmarks/**/*.md", "kernels/**/*.md")
    for page in REPO.glob(pattern)
)
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")
ROOTS = [REPO, REPO / "offline_quant", REPO / "kernels", REPO / "kernels" / "bitsmoe_kernels"]
"""Folders below which a page may name a file."""
SUFFIXES = r"py|md|json|toml|txt|sh|svg|png|yml|yaml|cfg"
PACKAGES = {
    folder.name: folder
    for root in (REPO, REPO / "kernels")
    for folder in root.iterdir()
    if folder.is_dir() and any(folder.glob("*.py"))
}
"""Folder of each top-level package."""


def named(page: Path) -> str:
    return page.relative_to(REPO).as_posix()


def broken(text: str, folder: str) -> list[str]:
    return [link for link in LINK.findall(text) if not (REPO / folder / link).exists()]


def code(text: str) -> Iterator[str]:
    """What a page shows as code: commands, and words in backticks. A file that a recipe adds is not there yet."""
    text = re.sub(r'```\w+ title=".*?```', "", text, flags=re.DOTALL)
    yield from (line for line in text.splitlines() if re.search(r"\b(python|pytest|torchrun)\b", line))
    yield from re.findall(r"`([^`\n]+)`", text)


def missing_paths(text: str) -> list[str]:
    """Files and folders of this repository that a page names, but for those that commands make in `build`."""
    folders = {entry.name for root in ROOTS for entry in root.iterdir() if entry.is_dir()} - {"build"}
    words = [word for piece in code(text) for word in re.findall(r"[\w.-]+(?:/[\w.-]+)+", piece)]
    return sorted(
        word
        for word in set(words)
        if word.split("/")[0] in folders or (re.search(rf"\.({SUFFIXES})$", word) and not word.startswith("build/"))
        if not any((root / word).exists() or (root / f"{word}.py").exists() for root in ROOTS)
    )


def is_named(name: str) -> bool:
    """Whether a dotted name is a module of ours, or something that a module of ours holds."""
    first, *parts = name.split(".")
    folder = PACKAGES[first]
    for i, part in enumerate(parts):
        if (folder / part).is_dir():
            folder = folder / part
            continue
        module, rest = folder / f"{part}.py", parts[i + 1 :]
        if not module.exists():
            module, rest = folder / "__init__.py", parts[i:]
        return not rest or (module.exists() and rest[0] in bound_names(module))
    return True


def bound_names(module: Path) -> set[str]:
    """What a module defines, assigns or imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        match node:
            case ast.FunctionDef(name) | ast.ClassDef(name) | ast.Name(name, ast.Store()):
                names.add(name)
            case ast.alias(name, asname):
                names.add(asname or name)
    return names


def missing_names(text: str) -> list[str]:
    """Dotted names in our packages that do not exist."""
    pattern = rf"(?<![\w/.-])(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+(?!/)"
    return sorted({name for piece in code(text) for name in re.findall(pattern, piece) if not is_named(name)})


def unknown_commands(text: str) -> list[str]:
    """Modules in `python -m MODULE` that cannot be run, and targets in `make TARGET` that the Makefile lacks."""
    modules = {m for piece in code(text) for m in re.findall(r"(?:python|torchrun)\b.*? -m ([a-z_][\w.]*)", piece)}
    targets = set(re.findall(r"(?:`|^    )make ([a-z]+)", text, re.MULTILINE))
    known = set(re.findall(r"^([a-z]+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    return sorted({f"python -m {m}" for m in modules if not runs(m)} | {f"make {t}" for t in targets - known})


def runs(module: str) -> bool:
    """Whether `python -m` runs a module: one of ours has a main part, another is installed."""
    first, *rest = module.split(".")
    if first not in PACKAGES:
        return importlib.util.find_spec(first) is not None
    path = PACKAGES[first].joinpath(*rest)
    if path.is_dir():
        return (path / "__main__.py").exists()
    file = path.with_suffix(".py")
    return file.exists() and "__main__" in file.read_text(encoding="utf-8")


def wrong_calls(text: str) -> list[str]:
    """Calls of our Python API in a page's programs that do not fit its signatures."""
    faults = []
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(textwrap.dedent(block))):
            match node:
                case ast.Call(ast.Attribute(ast.Name("bitsmoe"), name)):
                    if name not in bitsmoe.__all__:
                        faults.append(name)
                        continue
                    try:
                        inspect.signature(getattr(bitsmoe, name)).bind(*node.args, **{k.arg: k for k in node.keywords})
                    except TypeError as e:
                        faults.append(f"{name}: {e}")
    return faults


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files(page: Path) -> None:
    assert broken(page.read_text(encoding="utf-8"), page.parent.relative_to(REPO).as_posix()) == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert missing_paths(text) == []
    assert missing_names(text) == []
    assert unknown_commands(text) == []
    assert wrong_calls(text) == []


def test_the_picture_names_modules_that_exist() -> None:
    labels = re.findall(r"<text [^>]*>([^<]+)", (REPO / "docs" / "architecture.svg").read_text(encoding="utf-8"))
    assert missing_paths(" ".join(f"`{label}`" for label in labels)) == []
    assert "backends/select" in labels


def test_faults_are_found() -> None:
    assert broken("[a](index.md#b) ![c](no_such.png) [d](https://e.f) [g](#h)", "docs") == ["no_such.png"]
    paths = (
        "`rounding/no` `rounding/tuning` `no/such.py` `tests/golden` `build/x.json` `me/model` `offline_quant/cli/no`"
    )
    assert missing_paths(f"{paths}\n    python -m pytest tests/no\n") == [
        "no/such.py", "offline_quant/cli/no", "rounding/no", "tests/no",
    ]  # fmt: skip
    names = (
        "`bitsmoe.quantize` `bitsmoe.no` `offline_quant.layer.view.LayerView` `offline_quant.layer.no`, `x.bitsmoe.no`"
    )
    assert missing_names(names) == ["bitsmoe.no", "offline_quant.layer.no"]
    commands = "`python -m tools.fuzz` `python -m tools.no` `python -m offline_quant.layer` `python -m pytest`\n"
    assert unknown_commands(f"{commands}    make test\n    make no\n") == [
        "make no", "python -m offline_quant.layer", "python -m tools.no",
    ]  # fmt: skip
    calls = (
        '```python\nbitsmoe.inspect("a")\nbitsmoe.inspect("a", b=1)\nbitsmoe.no()\nbitsmoe.quantize("a", bits=2)\n```\n'
    )
    assert [fault.partition(":")[0] for fault in wrong_calls(calls)] == ["inspect", "no", "quantize"]


def test_the_table_of_options_is_that_of_the_command() -> None:
    """After a change of an option: paste what the command in the comment prints."""
    page = (REPO / "docs" / "quantizing.md").read_text(encoding="utf-8")
    shown = re.findall(
        r"<!-- options: python -m offline_quant\.cli\.options_table -->\n(.*?)\n<!-- end of options -->",
        page,
        re.DOTALL,
    )
    assert [table.strip() for table in shown] == [options_table()]


def test_the_site_lists_every_page() -> None:
    """A page that `nav` lacks is found by nobody."""

    def listed(entries):
        for entry in entries:
            yield from [entry] if isinstance(entry, str) else listed(next(iter(entry.values())))

    nav = list(listed(yaml.safe_load((REPO / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    pages = [p.relative_to(REPO / "docs").as_posix() for p in REPO.glob("docs/**/*.md")]
    assert sorted(nav) == sorted(pages)
