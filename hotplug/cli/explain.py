"""`hotplug explain`: the kernel plan of a model on a device, without loading a weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from hotplug.cli.display import fetch, out, print_json
from hotplug.cli.options import takes
from hotplug.core.config import EngineConfig


@takes(engine=EngineConfig)
def explain(
    engine: EngineConfig,
    *,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, one entry a call site.")] = False,
) -> None:
    """Show which kernel serves each operation of a model, and why."""
    fetch(engine.model)
    from hotplug.core.engine.bind import bind

    report = bind(engine, meta=True).report()
    if json:
        print_json(report)
    else:
        _print(report)


@dataclass(slots=True)
class Group:
    """Call sites that one choice covers."""

    op: str
    provider: str
    reason: str
    rejected: tuple[tuple[str, str], ...]
    sites: list[str] = field(default_factory=list)


def group_sites(sites: list[dict[str, Any]]) -> list[Group]:
    """Sites with the same operation, provider, reason and rejected candidates, in the order of the model."""
    groups: dict[tuple[Any, ...], Group] = {}
    for site in sites:
        rejected = tuple((r["provider"], r["reason"]) for r in site["rejected"])
        key = (site["op"], site["provider"], site["reason"], rejected)
        groups.setdefault(key, Group(*key)).sites.append(site["site"])
    return list(groups.values())


def _print(report: dict[str, Any]) -> None:
    from rich.markup import escape

    device, kv = report["device"], report["kv"]
    console = out()
    for name, value in (
        ("model", f"{report['model']} ({report['architecture']})"),
        ("device", f"{report['platform']}:{device['index']}  {device['name']} ({device['arch']})"),
        ("because", report["selected_because"]),
        ("dtype", f"{report['dtype']}, {report['exec']}, torch {report['torch']}"),
        ("kv cache", f"{kv['dtype']} {kv['layout']}, blocks of {kv['block_size']} tokens, {kv['block_bytes']:,} bytes"),
        ("context", f"{report['max_model_len']:,} tokens"),
        ("plan", report["plan_hash"]),
        ("references", f"{report['reference_sites']} of {len(report['sites'])} sites run a plain-PyTorch reference"),
    ):
        console.print(f"{name:<10} {escape(str(value))}")
    groups = group_sites(report["sites"])
    op_width, kernel_width = (max(len(getattr(g, name)) for g in groups) for name in ("op", "provider"))
    for group in groups:
        count, why = f"{len(group.sites)}x", escape(f"({group.reason})")
        console.print(f"{count:>5} {group.op:<{op_width}} -> {group.provider:<{kernel_width}} {why}")
        for provider, reason in group.rejected:
            console.print(f"[dim]{'':>5} {'':<{op_width}}    not {escape(provider)}: {escape(reason)}")
