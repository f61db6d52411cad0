"""What differs between two plans: of two platforms, or of two reports that `hotplug explain --json` saved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hotplug.core.errors import ConfigError

SCHEMA = 1
_ASPECTS = ("op", "provider", "reason", "dtype", "facts")
_SURROUNDINGS = ("hotplug", "torch", "model", "architecture", "platform", "device", "dtype", "quantization",
                 "exec", "kv", "max_model_len", "reference_sites")  # fmt: skip


def read_report(path: Path) -> dict[str, Any]:
    """A report that `hotplug explain --json` wrote. Raises ConfigError."""
    try:
        report = json.loads(path.read_text())
    except OSError as e:
        raise ConfigError(f"cannot read the file: {e.strerror}", where=str(path)) from e
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"not valid JSON: {e}", where=str(path)) from e
    if not isinstance(report, dict) or not {"schema", "plan_hash", "sites"} <= report.keys():
        raise ConfigError("not a report of `hotplug explain --json`", where=str(path))
    if report["schema"] != SCHEMA:
        raise ConfigError(f"the report has schema {report['schema']}, this hotplug reads {SCHEMA}", where=str(path))
    return report


def diff(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The two reports' differences as plain data: surroundings, sites of one side only, sites served otherwise."""
    sites_a, sites_b = ({site["site"]: site for site in report["sites"]} for report in (a, b))
    changed = []
    for name, left in sites_a.items():
        right = sites_b.get(name, left)
        aspects = [aspect for aspect in _ASPECTS if left[aspect] != right[aspect]]
        if aspects:
            changed.append({"site": name, "differs": aspects, "a": _shown(left), "b": _shown(right)})
    return {
        "schema": SCHEMA,
        "a": _identity(a),
        "b": _identity(b),
        "surroundings": [{"field": field, "a": a.get(field), "b": b.get(field)}
                         for field in _SURROUNDINGS if a.get(field) != b.get(field)],
        "sites": changed,
        "only_a": [_shown(site) for name, site in sites_a.items() if name not in sites_b],
        "only_b": [_shown(site) for name, site in sites_b.items() if name not in sites_a],
    }  # fmt: skip


def _identity(report: dict[str, Any]) -> dict[str, Any]:
    return {"model": report["model"], "platform": report["platform"], "plan_hash": report["plan_hash"],
            "sites": len(report["sites"])}  # fmt: skip


def _shown(site: dict[str, Any]) -> dict[str, Any]:
    return {key: site[key] for key in ("site", *_ASPECTS, "rejected")}


def group_changes(changes: Sequence[dict[str, Any]]) -> list[tuple[str, str, list[str]]]:
    """Op, what became of it in words, and at which sites; equal changes together, in the order of the model."""
    groups: dict[tuple[str, str], list[str]] = {}
    for change in changes:
        key = (change["a"]["op"], "; ".join(_words(change)))
        groups.setdefault(key, []).append(change["site"])
    return [(op, words, sites) for (op, words), sites in groups.items()]


def _words(change: dict[str, Any]) -> list[str]:
    a, b, differs = change["a"], change["b"], change["differs"]
    words = []
    if "op" in differs:
        words.append(f"op {a['op']} -> {b['op']}")
    if "provider" in differs or "reason" in differs:
        words.append(f"{_choice(a)} -> {_choice(b)}")
    if "dtype" in differs:
        words.append(f"dtype {a['dtype']} -> {b['dtype']}")
    if "facts" in differs:
        names = [*a["facts"], *(n for n in b["facts"] if n not in a["facts"])]
        words += [f"{n} {_fact(a, n)} -> {_fact(b, n)}" for n in names if _fact(a, n) != _fact(b, n)]
    return words


def _choice(site: dict[str, Any]) -> str:
    refusals = [f"{r['reason']} ({r['provider']})" for r in site["rejected"]]
    why = "; ".join(refusals) if refusals and site["reason"].startswith("no kernel") else site["reason"]
    return f"{site['provider']} ({why})"


def _fact(site: dict[str, Any], name: str) -> str:
    return json.dumps(site["facts"][name]) if name in site["facts"] else "absent"
