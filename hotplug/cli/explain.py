"""`hotplug explain`: the kernel plan of a model on a device, without loading a weight."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from hotplug.cli.display import fetch_model, out, print_json
from hotplug.cli.options import takes
from hotplug.cli.plan_view import explanation, group_sites, short
from hotplug.core.config import EngineConfig
from hotplug.core.errors import ConfigError


@takes(engine=EngineConfig)
def explain(
    engine: EngineConfig,
    *,
    why: Annotated[
        str | None,
        typer.Option("--why", metavar="SITE", help="Every candidate of a call site, or of those that a pattern names."),
    ] = None,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option("--diff", metavar="A B", help="Compare two platforms, or reports saved with --json."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, one entry a call site.")] = False,
) -> None:
    """Show which kernel serves each operation of a model, and why."""
    if why is not None and diff is not None:
        raise ConfigError("--why and --diff do not go together")
    if diff is not None:
        _explain_diff(engine, *diff, json=json)
    elif why is not None:
        _explain_why(engine, why, json=json)
    else:
        report = _report(engine)
        print_json(report) if json else _print(report)


def _report(engine: EngineConfig) -> dict[str, Any]:
    fetch_model(engine)
    from hotplug.core.startup.bind import bind

    return bind(engine, meta=True).report()


def _print(report: dict[str, Any]) -> None:
    from rich.markup import escape

    device, kv, step = report["device"], report["kv"], report["step"]
    console = out()
    for name, value in (
        ("model", f"{report['model']} ({report['architecture']})"),
        ("device", f"{report['platform']}:{device['index']}  {device['name']} ({device['arch']})"),
        ("because", report["selected_because"]),
        ("dtype", f"{report['dtype']}, torch {report['torch']}"),
        ("exec", f"{report['exec']}: {report['exec_because']}"),
        ("step", f"{step['requests']:,} requests, {step['tokens']:,} tokens: {step['because']}"),
        *([("ranks", f"{report['ranks']}, sites and sizes are those of one")] if report["ranks"] > 1 else []),
        ("weights", f"{report['quantization']}: {report['quantization_because']}"),
        ("kv cache", f"{kv['dtype']} {kv['layout']}, blocks of {kv['block_size']} tokens, {kv['block_bytes']:,} bytes"),
        *([("kv groups", _groups(kv))] if len(kv["groups"]) > 1 else []),
        *([("swap", _swap(kv))] if kv["swap_blocks"] else []),
        ("context", f"{report['max_model_len']:,} tokens"),
        ("plan", report["plan_hash"]),
        ("references", f"{report['reference_sites']} of {len(report['sites'])} sites run a plain-PyTorch reference"),
    ):
        console.print(f"{name:<10} {escape(str(value))}")
    groups = sorted(group_sites(report["sites"]), key=lambda g: _first(report, g.op))
    op_width = max(len(g.op) for g in groups)
    before = ""
    for group in groups:
        count, op = f"{len(group.sites)}x", group.op if group.op != before else ""
        before = group.op
        whole = f"{group.compiled_by}; until compiled " if group.compiled_by else ""
        line = f"{count:>5} {group.op if op else '':<{op_width}} -> {whole}{group.provider}: {explanation(group)}"
        console.print(f"{escape(line)}  [dim]{escape(short(group.sites))}")


def _groups(kv: dict[str, Any]) -> str:
    """What each group of layers keeps of a sequence."""
    kinds = [f"{group['layers']} x {group['spec']}, {group['pages']} pages a block" for group in kv["groups"]]
    return f"{'; '.join(kinds)}; {kv['lanes']} layers a page"


def _swap(kv: dict[str, Any]) -> str:
    text = f"{kv['swap_blocks']:,} blocks on the host, {kv['swap_blocks'] * kv['block_bytes']:,} bytes"
    return text + ("; gains nothing: the KV cache is in host memory already" if kv["shared_host_memory"] else "")


def _first(report: dict[str, Any], op: str) -> int:
    """Where an op first occurs, so that all of its groups stand together there."""
    return next(i for i, site in enumerate(report["sites"]) if site["op"] == op)


# --- --why ----------------------------------------------------------------------------------------


def _explain_why(engine: EngineConfig, pattern: str, *, json: bool) -> None:
    fetch_model(engine)
    from hotplug.core.ops.why import candidates, sites_like
    from hotplug.core.startup.bind import bind

    bound = bind(engine, meta=True)
    entries = {entry["site"]: entry for entry in bound.kernels.plan.report()}
    sites = []
    for choice in sites_like(bound.kernels.plan, pattern):
        table = [dataclasses.asdict(c) for c in candidates(bound.kernels.plan, choice)]
        entry = {k: v for k, v in entries[choice.spec.site].items() if k != "rejected"}
        sites.append({**entry, "arch": choice.spec.arch, "forced": choice.reason.startswith("forced"),
                      "candidates": table})  # fmt: skip
    document = {"schema": 1, "model": engine.model_name, "platform": bound.placement.platform.name, "sites": sites}
    print_json(document) if json else _print_why(sites)


def _print_why(sites: list[dict[str, Any]]) -> None:
    from rich.markup import escape

    alike: dict[str, list[dict[str, Any]]] = {}
    for site in sites:
        alike.setdefault(str({k: v for k, v in site.items() if k not in ("site", "part_of")}), []).append(site)
    console = out()
    for group in alike.values():
        site = group[0]
        count = f" ({len(group)} sites alike)" if len(group) > 1 else ""
        console.print(escape(f"{short([s['site'] for s in group])}{count}: {site['op']} -> {site['provider']}"))
        facts = ", ".join(f"{name} {value}" for name, value in site["facts"].items())
        part = f", part of {short([s['part_of'] for s in group])}" if site["part_of"] else ""
        console.print(escape(f"  {site['dtype']}, arch {site['arch']}, {facts}{part}"))
        rows = [("rank", "candidate", "check", "shapes", "outcome", "why")]
        rows += [(str(c["rank"]), c["provider"], "ok" if c["ok"] else "no", c["shapes"], c["outcome"], c["reason"])
                 for c in site["candidates"]]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            console.print(escape(f"  {'  '.join(cells).rstrip()}"))


# --- --diff ---------------------------------------------------------------------------------------


def _explain_diff(engine: EngineConfig, a: str, b: str, *, json: bool) -> None:
    from hotplug.cli.plan_diff import diff, read_report

    reports = [read_report(Path(side)) if _is_file(side) else _report(dataclasses.replace(engine, device=side))
               for side in (a, b)]  # fmt: skip
    document = diff(*reports)
    print_json(document) if json else _print_diff(document, a, b)


def _is_file(side: str) -> bool:
    return side.endswith(".json") or Path(side).is_file()


def _print_diff(document: dict[str, Any], a: str, b: str) -> None:
    from rich.markup import escape

    from hotplug.cli.plan_diff import group_changes

    console = out()
    for name, side in ((a, document["a"]), (b, document["b"])):
        console.print(escape(f"{name}: {side['model']} on {side['platform']}, plan {side['plan_hash']}, "
                             f"{side['sites']} sites"))  # fmt: skip
    for entry in document["surroundings"]:
        console.print(escape(f"  {entry['field']}: {_flat(entry['a'])} -> {_flat(entry['b'])}"))
    total = sum(len(document[key]) for key in ("sites", "only_a", "only_b"))
    console.print("no call site differs" if not total else f"{total} call sites differ")
    for op, words, sites in group_changes(document["sites"]):
        console.print(f"{escape(f'{len(sites)}x'.rjust(5) + f' {op}: {words}')}  [dim]{escape(short(sites))}")
    for key, name in (("only_a", a), ("only_b", b)):
        for group in group_sites(document[key]):
            line = f"{len(group.sites)}x".rjust(5) + f" {group.op}: only in {name} ({group.provider})"
            console.print(f"{escape(line)}  [dim]{escape(short(group.sites))}")


def _flat(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
