"""`hotplug tune`: measure a platform's kernels, its execution modes or its sizes of steps for a model, and keep the
fastest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hotplug.cli.display import device_line, err, fetch_model, out, print_json
from hotplug.cli.options import takes
from hotplug.core.config import EngineConfig
from hotplug.core.errors import ConfigError, FeatureError

if TYPE_CHECKING:
    from hotplug.core.ops.plan import Choice
    from hotplug.core.ops.registry import SiteSpec
    from hotplug.core.platform.tuning import TuningResult


@takes(engine=EngineConfig)
def tune(
    engine: EngineConfig,
    *,
    seconds: Annotated[
        float | None, typer.Option("--seconds", metavar="S", help="Time to spend, about. Default: 120.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="The file to write. Default: the platform's own place."),
    ] = None,
    modes: Annotated[
        bool, typer.Option("--modes", help="Measure execution modes instead; --exec auto takes the fastest then.")
    ] = False,
    defaults: Annotated[
        bool,
        typer.Option(
            "--defaults", help="Measure instead how many requests a step had best hold; that many are the default then."
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, one entry a kernel and shape.")] = False,
) -> None:
    """Measure kernel configurations on a device at a model's shapes, and keep the fastest in a data file."""
    if modes and defaults:
        raise ConfigError("--modes and --defaults are measured one after the other", hint="Leave one out.")
    if defaults:
        if seconds is not None:
            raise ConfigError("--seconds is for kernels, and does not go with --defaults")
        _tune_defaults(engine, output, json=json)
        return
    if modes:
        if seconds is not None or output is not None:
            raise ConfigError("--seconds and --output are for kernels, and do not go with --modes")
        _tune_modes(engine, json=json)
        return
    _tune_kernels(engine, 120.0 if seconds is None else seconds, output, json=json)


def _tune_kernels(engine: EngineConfig, budget: float, output: Path | None, *, json: bool) -> None:
    if budget <= 0:
        raise ConfigError(f"{budget:g} is no time to measure in", where="--seconds", hint="Give a positive number.")
    from hotplug.cli.display import selected
    from hotplug.core.platform.optional import HasTuning

    platform = selected(engine.device).platform
    if not isinstance(platform, HasTuning):
        raise FeatureError("the platform has no kernels to tune", where=f"platform {platform.name}",
                           hint="Choose another --device: `hotplug devices` lists them.")  # fmt: skip
    fetch_model(engine)
    from hotplug.core.startup.bind import bind

    bound = bind(engine, meta=True)
    if not json:
        out().print(_escaped(device_line(bound.placement.selection)))
    results: list[TuningResult] = []

    def report(result: TuningResult) -> None:
        results.append(result)
        (err() if json else out()).print(line(result))

    summary = platform.tune(bound.placement.device, distinct(bound.kernels.plan.choices), budget, report, output)
    if json:
        print_json(_document(bound.placement.device.name, summary, results))
        return
    faster = sum(dict(r.after) != dict(r.before) for r in results)
    left = f"; {summary.left} were left, give more --seconds" if summary.left else ""
    out().print(_escaped(f"{summary.measured} kernels and shapes measured, {faster} changed{left}"))
    out().print(_escaped(f"written to {summary.file}"))


def _tune_modes(engine: EngineConfig, *, json: bool) -> None:
    fetch_model(engine)
    from hotplug.cli.tune_modes import tune_modes

    console = err() if json else out()

    def report(mode: str, found: dict[str, float] | str) -> None:
        text = found if isinstance(found, str) else ", ".join(f"{k} {v:,.0f}" for k, v in found.items()) + " tokens/s"
        console.print(_escaped(f"{mode:<8} {text}"))

    path, record = tune_modes(engine, report)
    if json:
        failed = {str(mode): why for mode, why in record.failed.items()}
        figures = {str(mode): record.figures[mode] for mode in record.order}
        print_json({"schema": 1, "file": str(path), "fastest": record.order[0], "modes": figures, "failed": failed})
        return
    console.print(_escaped(f"{record.order[0]} is fastest; --exec auto takes it from now on: {path}"))


def _tune_defaults(engine: EngineConfig, output: Path | None, *, json: bool) -> None:
    fetch_model(engine)
    from hotplug.cli.tune_steps import tune_steps

    console = err() if json else out()

    def report(requests: int, tokens: int, found: str) -> None:
        console.print(_escaped(f"{requests:>6,} requests, {tokens:>6,} tokens  {found}"))

    path, record = tune_steps(engine, report, output)
    best = record.best
    if json:
        measured = [dataclasses.asdict(one) for one in record.measured]
        print_json({"schema": 1, "file": str(path), "requests": best.requests, "tokens": best.tokens,
                    "measured": measured})  # fmt: skip
        return
    console.print(_escaped(f"{best.requests:,} requests and {best.tokens:,} tokens are the defaults for models near "
                           f"{record.weight_bytes / 1e9:.1f} GB from now on: {path}"))  # fmt: skip


def distinct(choices: Iterable[Choice]) -> list[SiteSpec]:
    """One call site of each op, dtype and facts that a kernel serves, in the order of the model."""
    from hotplug.core.ops.plan import COMPOSED
    from hotplug.core.ops.registry import REFERENCE

    found: dict[tuple[Any, ...], SiteSpec] = {}
    for choice in choices:
        spec = choice.spec
        if choice.provider not in (REFERENCE, COMPOSED):
            found.setdefault((spec.op, spec.dtype, *sorted(spec.facts.items())), spec)
    return list(found.values())


def line(result: TuningResult) -> str:
    """`silu_mul  bfloat16  width 8192, tokens 64   3.61 -> 3.20 us  BLOCK 1024, num_warps 4 -> BLOCK 512, ...`."""
    shape = ", ".join(f"{name} {size}" for name, size in result.shape.items())
    before, after = _words(result.before), _words(result.after)
    change = f"{before} -> {after}" if after != before else f"{after} stays"
    refused = f", {len(result.rejected)} rejected" if result.rejected else ""
    color = "green" if after != before else "dim"
    was = "  failed" if result.before_us is None else f"{result.before_us:8.2f}"
    times = f"{was} -> {result.after_us:8.2f} us"
    head = f"{result.kernel:<16} {result.dtype:<9} {shape:<36}"
    return _escaped(f"{head} {times}  ") + f"[{color}]{_escaped(f'{change} (of {result.candidates}{refused})')}[/]"


def _words(config: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in config.items())


def _document(device: str, summary: Any, results: list[TuningResult]) -> dict[str, Any]:
    return {"schema": 1, "device": device, "file": str(summary.file), "measured": summary.measured,
            "left": summary.left, "results": [dataclasses.asdict(r) for r in results]}  # fmt: skip


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
