"""Every Markdown page of the repository: its relative links, anchors and named files lead to something that exists."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_OURS = {"build", "dist", "node_modules"}
HISTORY = {"CHANGELOG.md"}
"""Pages that may name files that are gone."""


def pages(root: Path) -> Iterator[Path]:
    """Every Markdown file below `root`, but what tools have put there."""
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in NOT_OURS and (not f.startswith(".") or f == ".github")]
        yield from (Path(folder, file) for file in files if file.endswith(".md"))


PAGES = sorted(pages(ROOT))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^(```+).*?^\1", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken(page: Path, root: Path) -> list[str]:
    """The relative links of a page that lead nowhere, or out of the repository."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    targets = re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", text)
    targets += re.findall(r"^\[[^\]]+\]: (\S+)", text, re.MULTILINE)
    return [target for target in targets if not _leads_somewhere(target, page, root)]


def _leads_somewhere(target: str, page: Path, root: Path) -> bool:
    if re.match(r"[a-z]+:", target):
        return True
    name, _, anchor = target.partition("#")
    file = (page.parent / name).resolve() if name else page
    if not file.is_relative_to(root.resolve()) or not file.exists():
        return False
    return not anchor or (file.suffix == ".md" and anchor in anchors(file))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_of_a_page_lead_somewhere(page: Path) -> None:
    assert broken(page, ROOT) == []


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in HISTORY], ids=lambda page: str(page.relative_to(ROOT))
)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:hotplug|tests|ci|docs|examples)/[\w./-]+)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_pages_of_every_kind_are_looked_at() -> None:
    found = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {
        "README.md", "CONTRIBUTING.md", "GOVERNANCE.md", "docs/platforms.md", "docs/rfcs/README.md",
        ".github/PULL_REQUEST_TEMPLATE.md", "examples/toy-eager/README.md",
    } <= found  # fmt: skip


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One heading\n\n# `code` & more\n\n# Twice\n\n# Twice\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#one-heading) [c](#here) [d](https://example.org/x) [e](other.md#code--more)\n"
        "[f](other.md#twice-1) `[g](code.md)`\n```\n[h](block.md)\n# not-a-heading\n```\n# Here\n"
        "[i](none.md) [j](other.md#none) [k](#not-a-heading) [l](../outside.md)\n[m]: gone.md\n"
    )
    assert broken(page, tmp_path) == ["none.md", "other.md#none", "#not-a-heading", "../outside.md", "gone.md"]
