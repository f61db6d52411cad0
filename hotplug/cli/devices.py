"""`hotplug devices`: every platform plugin, found or absent and why, and what is wrong with it. Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hotplug.cli.display import gib, out, print_json

if TYPE_CHECKING:
    from hotplug.core.platform.discovery import Candidate


def devices(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List every platform, its devices, or why it has none."""
    from hotplug.core.platform.discovery import discover

    rows = [_describe(candidate) for candidate in discover()]
    if json:
        print_json({"schema": 1, "platforms": rows})
    else:
        _print(rows)


def _describe(candidate: Candidate) -> dict[str, Any]:
    """A platform and its devices as plain data; sizes in bytes."""
    state = "broken" if candidate.broken else "found" if candidate.devices else "absent"
    found = []
    for device in candidate.devices:
        assert candidate.platform is not None
        entry: dict[str, Any] = {
            "index": device.index, "name": device.name, "arch": device.arch, "cores": device.cores,
            "details": device.details,
        }  # fmt: skip
        try:
            memory = candidate.platform.memory(device)
            entry["memory"] = {"free": memory.free, "total": memory.total}
        except Exception as e:  # a driver may fail here in any way; the list must still be shown
            entry["memory_error"] = f"{type(e).__name__}: {e}"
        found.append(entry)
    return {
        "platform": candidate.name,
        "state": state,
        "reason": candidate.reason,
        "distribution": candidate.distribution,
        "api_version": candidate.api_version,
        "devices": found,
        "findings": _findings(candidate),
    }


def _findings(candidate: Candidate) -> list[str]:
    """What a platform with devices says is wrong; without any, that is its reason already."""
    from hotplug.core.platform.optional import HasDiagnosis

    if not candidate.devices or not isinstance(candidate.platform, HasDiagnosis):
        return []
    try:
        return list(candidate.platform.diagnose())
    except Exception as e:  # as above: the list must still be shown
        return [f"diagnose failed: {type(e).__name__}: {e}"]


_COLORS = {"found": "green", "absent": "yellow", "broken": "red"}


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("platform", "state", "device", "arch", "cores", "memory free / total", "from")
    for row in rows:
        state = f"[{_COLORS[row['state']]}]{row['state']}"
        if not row["devices"]:
            table.add_row(row["platform"], state, escape(row["reason"]), "", "", "", row["distribution"])
        for device in row["devices"]:
            name = f"{row['platform']}:{device['index']}"
            memory = device.get("memory")
            shown = f"{gib(memory['free'])} / {gib(memory['total'])}" if memory else escape(device["memory_error"])
            table.add_row(
                name, state, escape(device["name"]), device["arch"], str(device["cores"] or ""), shown,
                row["distribution"],
            )  # fmt: skip
    out().print(table)
    for row in rows:
        for finding in row["findings"]:
            out().print(f"[yellow]{row['platform']}[/]: {escape(finding)}")
