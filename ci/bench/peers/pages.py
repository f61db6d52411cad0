"""The comparison tables in `docs/`, written between markers from the rows in `ci/bench/results`.

A table stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`; prose stays outside. Nothing is measured here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from peers.records import RESULTS, ROOT, Row, read
from peers.tables import cpu_table, lead_table, load_table, model_table, not_run, settings_table

PAGES = (ROOT / "docs" / "cpu.md", ROOT / "docs" / "benchmarks.md")


def _of(file: str, table: Callable[[list[Row]], str]) -> Callable[[], str]:
    return lambda: table(read(RESULTS / file))


TABLES: dict[str, Callable[[], str]] = {
    "cpu-engines": _of("cpu.jsonl", cpu_table),
    "cpu-leads": _of("cpu.jsonl", lead_table),
    "cpu-not-run": _of("cpu.jsonl", not_run),
    "cpu-settings": settings_table,
    "cpu-engines-2026-11-25": _of("cpu-2026-11-25.jsonl", cpu_table),
    "cpu-engines-avx2": _of("cpu-avx2.jsonl", cpu_table),
    "gpu-models": _of("gpu.jsonl", model_table),
    "gpu-chat": _of("gpu-chat.jsonl", model_table),
    "gpu-closed-loop": _of("gpu-closed-loop.jsonl", load_table),
    "gpu-open-loop": _of("gpu-open-loop.jsonl", load_table),
}
"""Name of a marker -> what stands there."""
_BLOCK = re.compile(r"<!-- begin: (?P<name>[\w-]+) -->\n.*?<!-- end: (?P=name) -->", re.DOTALL)


def written(text: str) -> str:
    """A page with its tables written anew. Raises ValueError where a marker names no table or is not closed."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"no table is named {name}; there are {', '.join(TABLES)}")
        return f"<!-- begin: {name} -->\n{TABLES[name]()}\n<!-- end: {name} -->"

    if text.count("<!-- begin: ") != len(_BLOCK.findall(text)):
        raise ValueError("a marker has no end of the same name")
    return _BLOCK.sub(block, text)


def stale() -> list[Path]:
    """Pages whose tables are not what the rows give."""
    return [page for page in PAGES if written(page.read_text()) != page.read_text()]
