"""How a plan is shown: call sites that one choice covers in one line, and site names in short."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(slots=True)
class Group:
    """Call sites that one choice covers."""

    op: str
    provider: str
    reason: str
    rejected: tuple[tuple[str, str], ...]
    compiled_by: str
    """What serves instead in compiled steps; empty where nothing does."""
    sites: list[str] = field(default_factory=list)


def group_sites(sites: Sequence[dict[str, Any]]) -> list[Group]:
    """Sites with all of this the same, in the order of the model."""
    groups: dict[tuple[Any, ...], Group] = {}
    for site in sites:
        rejected = tuple((r["provider"], r["reason"]) for r in site["rejected"])
        key = (site["op"], site["provider"], site["reason"], rejected, site.get("compiled_by", ""))
        groups.setdefault(key, Group(*key)).sites.append(site["site"])
    return list(groups.values())


def short(sites: Sequence[str], limit: int = 3) -> str:
    """`layers.0.attn, layers.1.attn, norm` as "layers.0-1.attn, norm"; at most `limit` patterns, then a count."""
    numbers: dict[str, list[int]] = {}
    for site in sites:
        found = _NUMBER.search(site)
        pattern = site if found is None else f"{site[: found.start()]}{{}}{site[found.end() :]}"
        numbers.setdefault(pattern, []).extend([] if found is None else [int(found[0])])
    patterns = [p.replace("{}", _ranges(n)) if n else p for p, n in numbers.items()]
    more = len(patterns) - limit
    return ", ".join(patterns[:limit]) + (f" and {more} more" if more > 0 else "")


def _ranges(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` as "[0-2,5]"; one number stays bare."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if text.isdigit() else f"[{text}]"


def explanation(group: Group) -> str:
    """Why the group runs what it runs, in a few words: "reference: head_dim 80 not supported (acme.flash)"."""
    refusals = [f"{reason} ({provider})" for provider, reason in group.rejected if not _outranked(reason)]
    if group.provider in ("reference", "composed") and refusals and group.reason.startswith("no kernel"):
        return "; ".join(refusals)
    return group.reason


def _outranked(reason: str) -> bool:
    return reason.startswith("outranked by ")
