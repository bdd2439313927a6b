"""Links in README and docs/, and the site's list of pages. `mkdocs build --strict` checks anchors too."""

import re

import pytest
import yaml

from builders import REPO

PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("examples/*/*.md")])
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")


def broken(text: str, folder: str) -> list[str]:
    return [link for link in LINK.findall(text) if not (REPO / folder / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(REPO).as_posix())
def test_links_lead_to_files(page) -> None:
    assert broken(page.read_text(encoding="utf-8"), page.parent.relative_to(REPO).as_posix()) == []


def test_a_broken_link_is_found() -> None:
    assert broken("[a](index.md#b) ![c](no_such.png) [d](https://e.f) [g](#h)", "docs") == ["no_such.png"]


def test_the_site_lists_every_page() -> None:
    """A page that `nav` lacks is found by nobody."""

    def listed(entries):
        for entry in entries:
            yield from [entry] if isinstance(entry, str) else listed(next(iter(entry.values())))

    nav = list(listed(yaml.safe_load((REPO / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    pages = [p.relative_to(REPO / "docs").as_posix() for p in REPO.glob("docs/**/*.md")]
    assert sorted(nav) == sorted(pages)
