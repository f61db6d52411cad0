"""`hotplug bisect`: which call site's kernel leaves its reference, found by running a prompt op by op."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hotplug.cli.display import err, fetch_model, out, print_json
from hotplug.cli.options import takes
from hotplug.core.config import EngineConfig

if TYPE_CHECKING:
    from hotplug.core.tools.bisect import Bisection

SCHEMA = 1
SHOWN = 10


@takes(engine=EngineConfig)
def bisect(
    engine: EngineConfig,
    *,
    prompt: Annotated[str, typer.Argument(help="What to run.")] = "The capital of France is",
    platform: Annotated[
        str | None, typer.Option("--platform", metavar="NAME", help="The platform to judge (default: --device).")
    ] = None,
    reference: Annotated[
        str, typer.Option("--reference", metavar="NAME", help="The platform to trust, with every op by its reference.")
    ] = "cpu",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, max=256, help="Tokens to generate.")] = 4,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the first call site whose output leaves its reference's tolerance; exit code 1 if there is one."""
    path = fetch_model(engine)
    from hotplug.core.text.tokenizer_files import load_tokenizer
    from hotplug.core.tools.bisect import bisect as judge

    ids = load_tokenizer(path).encode(prompt)
    if platform is not None:
        engine = dataclasses.replace(engine, device=platform)
    found = judge(engine, ids, reference=reference, max_tokens=max_tokens)
    if json:
        print_json({"schema": SCHEMA, **dataclasses.asdict(found)})
    else:
        _print(found)
    if found.divergent or found.tokens != found.expected or found.whole not in (None, found.expected):
        raise typer.Exit(1)


def _print(found: Bisection) -> None:
    from rich.markup import escape

    console = out()
    for line in summary(found):
        console.print(escape(line))
    if found.unlike:
        err().print(escape(f"{len(found.unlike)} sites run another kernel in {found.exec_mode} than op by op, "
                           f"e.g. {found.unlike[0][0]}: {found.unlike[0][1]} -> {found.unlike[0][2]}"))  # fmt: skip


def summary(found: Bisection) -> list[str]:
    """What was found, most telling line first."""
    lines = [_culprit(found)]
    for site in found.divergent[:SHOWN]:
        lines.append(f"  {site.site}: {site.op} -> {site.provider}, {site.wrong_calls} of {site.calls} calls; first in "
                     f"step {site.step}, {site.what}: {site.comparison.reason}")  # fmt: skip
        lines.append(f"    inputs {', '.join(site.inputs)}")
    if len(found.divergent) > SHOWN:
        lines.append(f"  and {len(found.divergent) - SHOWN} more sites")
    lines.append(f"{found.compared} calls of {len(found.sites)} sites compared, dtype {found.dtype}")
    lines.append(_tokens("op by op", found.platform, found.tokens, found))
    if found.whole is not None:
        lines.append(_tokens(found.exec_mode, found.platform, found.whole, found))
    return lines


def _culprit(found: Bisection) -> str:
    if not found.divergent:
        return f"every kernel of {found.platform} stays within its reference's tolerance"
    first = found.divergent[0]
    text = f"first divergence: {first.site} ({first.op} -> {first.provider})"
    if found.repaired_by_first:
        return f"{text}; with the reference there, the expected tokens come back"
    if found.repaired_by_all:
        return f"{text}; the expected tokens come back with references at all divergent sites only"
    return text


def _tokens(how: str, platform: str, tokens: list[int], found: Bisection) -> str:
    if tokens == found.expected:
        return f"tokens of {platform}, {how}: those of {found.reference}"
    at = next((i for i, (a, b) in enumerate(zip(tokens, found.expected, strict=False)) if a != b), len(tokens))
    got: Any = tokens[at] if at < len(tokens) else "none"
    return f"tokens of {platform}, {how}: token {at} is {got}, {found.reference} gives {found.expected[at]}"
