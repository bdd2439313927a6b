"""The hook of mkdocs.yml: a link from a page to a file outside docs/ brings that file into the site.

Each fact has one owner, and some owners lie elsewhere: the specification of the format, tables of benchmarks. The site
shows such a file at its path in the repository. Markdown files become pages.
"""

import re
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)")


def _place(page: Path) -> str:
    """Path of a file in the site, before Markdown becomes HTML."""
    path = page.relative_to(ROOT)
    return path.relative_to("docs").as_posix() if path.parts[0] == "docs" else path.as_posix()


def _targets(page: Path) -> dict[str, Path]:
    """Link as written -> the file of this repository that it names. Other links are left to mkdocs."""
    links = _LINK.findall(page.read_text(encoding="utf-8"))
    paths = {link: ROOT / normpath((page.parent / link).relative_to(ROOT).as_posix()) for link in links}
    return {link: path for link, path in paths.items() if path.is_file()}


def on_files(files: Any, *, config: Any) -> Any:
    """Add the files that pages link to, and those that these link to."""
    pages = [Path(file.abs_src_path) for file in files.documentation_pages()]
    while pages:
        for path in _targets(pages.pop()).values():
            if files.get_file_from_path(_place(path)) is None:
                outside = InclusionLevel.NOT_IN_NAV
                files.append(File.generated(config, _place(path), abs_src_path=str(path), inclusion=outside))
                if path.suffix == ".md":
                    pages.append(path)
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Let links name files at their places in the site."""
    targets = _targets(Path(page.file.abs_src_path))
    here = dirname(page.file.src_uri)

    def placed(link: re.Match[str]) -> str:
        path = targets.get(link[1])
        return link[1] if path is None else relpath(_place(path), here or ".")

    return _LINK.sub(placed, markdown)
