"""`hotplug conform`: examine a platform, print a table, and write a certificate."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hotplug.cli.display import err, out, print_json


def conform(
    platform: Annotated[str, typer.Option("--platform", metavar="NAME", help="The installed platform, or NAME:INDEX.")],
    json: Annotated[bool, typer.Option("--json", help="Print the certificate.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases of everything.")] = False,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="CHECK", help="This check; repeatable.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A model to generate with, besides the small one that is made.")
    ] = None,
    absent: Annotated[
        list[str] | None,
        typer.Option("--absent", metavar="NAME=VALUE", help="A variable that hides the device; repeatable."),
    ] = None,
) -> None:
    """Examine a platform: imports, kernels, KV, features, tokens, leaks. Exit code 1 if a check fails."""
    from hotplug.core.errors import ConfigError
    from hotplug.core.weights.source import resolve
    from hotplug.plugins.conformance.report import Result, certificate
    from hotplug.plugins.conformance.suite import run
    from hotplug.plugins.conformance.target import Options

    if wrong := [pair for pair in absent or () if "=" not in pair]:
        raise ConfigError(f"cannot read {wrong[0]!r}", where="--absent", hint="Write NAME=VALUE.")
    options = Options(quick=quick, model=model and str(resolve(model)), absent=tuple(absent or ()))

    def show(result: Result) -> None:
        err().print(line(result)) if json else out().print(line(result))
        for text in result.failures:
            (err() if json else out()).print(f"             {_escaped(text)}")

    target, results = run(platform, options, only or (), on_result=show)
    document = certificate(target, results)
    if json:
        print_json(document)
    else:
        _print_end(document)
    if not document["passed"]:
        raise typer.Exit(1)


def line(result: Any) -> str:
    """One check in a line: outcome, name, what it is, cases and seconds."""
    color = {"passed": "green", "failed": "red", "skipped": "yellow"}[result.outcome]
    note = f"  [dim]{_escaped('; '.join(result.notes))}[/]" if result.outcome == "skipped" else ""
    cases = f"{result.cases} cases, " if result.cases else ""
    return f"[{color}]{result.outcome:<8}[/] {result.name:<12} {result.title} ({cases}{result.seconds:.1f} s){note}"


def _print_end(document: dict[str, Any]) -> None:
    console = out()
    kernels = ", ".join(f"{op} -> {'+'.join(names)}" for op, names in document["ops_covered"].items())
    console.print(_escaped(f"kernels      {kernels or 'none'}"))
    console.print(_escaped(f"references   {', '.join(document['reference_ops'])}"))
    count = sum(check["outcome"] == "failed" for check in document["checks"])
    console.print(_escaped(f"{document['platform']} (interface {document['api_version']}) "
                           + ("conforms" if not count else f"does not conform: {count} checks failed")))  # fmt: skip


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
