"""`hotplug doctor`: is this machine set up to run hotplug, and if not, what to do.

The checks are in `checks.py`; this file runs and prints them.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from hotplug.cli.display import out, print_json

_COLORS = {"ok": "green", "note": "cyan", "warn": "yellow", "fail": "red"}


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the environment; exit code 1 if anything keeps hotplug from working."""
    from hotplug.cli.checks import CHECKS
    from hotplug.cli.environment import snapshot

    environment = snapshot()
    findings = [finding for check in CHECKS for finding in check(environment)]
    failed = any(f.state == "fail" for f in findings)
    if json:
        print_json({"schema": 1, "ok": not failed, "findings": [dataclasses.asdict(f) for f in findings]})
    else:
        from rich.markup import escape

        for finding in findings:
            color = _COLORS[finding.state]
            out().print(f"[{color}]{finding.state:<5}[/] {finding.check:<13} {escape(finding.message)}")
            if finding.fix:
                out().print(f"      {'':<13} [dim]-> {escape(finding.fix)}")
    if failed:
        raise typer.Exit(1)
