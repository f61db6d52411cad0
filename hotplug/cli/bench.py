"""`hotplug bench latency|throughput|serve`: figures as a table and as JSON, with the plan they belong to.

The measurements are in `bench_engine.py` and `bench_serve.py`. `hotplug bench track|report`, the performance history of
a checkout's commits, are tools of the checkout (`bench_track.py`).
"""

from __future__ import annotations

import json as jsonlib
from collections import Counter
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

import hotplug
from hotplug.cli.bench_track import report, track
from hotplug.cli.display import err, fetch_model, out, print_json
from hotplug.cli.options import SectionedCommand, takes
from hotplug.core.config import EngineConfig
from hotplug.core.errors import ConfigError, HotplugError

if TYPE_CHECKING:
    from hotplug.core.engine.core import EngineCore
    from hotplug.core.tools.timeline import Timeline

app = typer.Typer(rich_markup_mode=None, help="Measure latency, throughput, or a running server.", no_args_is_help=True)

_TOOL = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Of a command that hands all of its arguments, `--help` among them, to a tool of the checkout."""
app.command("track", context_settings=_TOOL, add_help_option=False)(track)
app.command("report", context_settings=_TOOL, add_help_option=False)(report)

InputLen = Annotated[int, typer.Option(min=1, help="Prompt tokens of a request.")]
OutputLen = Annotated[int, typer.Option(min=1, help="Tokens to generate a request; end of sequence is ignored.")]
Repeat = Annotated[int, typer.Option(min=1, help="Runs; figures are their medians.")]
JsonFile = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write JSON to a file, or to standard output with -.")
]
TraceFile = Annotated[
    Path | None,
    typer.Option("--trace", metavar="FILE", help="Write a trace of the measured runs, for ui.perfetto.dev."),
]
Seed = Annotated[int, typer.Option("--prompt-seed", help="Seed of the random prompts.")]


@app.command("latency", cls=SectionedCommand)
@takes(engine=EngineConfig)
def latency(
    engine: EngineConfig,
    *,
    input_len: InputLen = 128,
    output_len: OutputLen = 64,
    repeat: Repeat = 3,
    prompt_seed: Seed = 0,
    json: JsonFile = None,
    trace: TraceFile = None,
) -> None:
    """One request alone: time to first token, inter-token latency, decode tokens a second."""
    timeline = _timeline(trace)
    core = _load(engine)
    from hotplug.cli.bench_engine import latency_figures, measure, random_prompts, speculation_figures

    warm_up, *prompts = random_prompts(core.vocab_size, repeat + 1, input_len, prompt_seed)
    measure(core, [warm_up], output_len)
    runs = [measure(core, [prompt], output_len, timeline) for prompt in prompts]
    options = {"input_len": input_len, "output_len": output_len, "repeat": repeat}
    facts = _engine_facts(core)
    _report("latency", facts, options, latency_figures(runs) | speculation_figures(core), json)
    _write_trace(timeline, trace, {"benchmark": "latency", **facts, **options})


@app.command("throughput", cls=SectionedCommand)
@takes(engine=EngineConfig)
def throughput(
    engine: EngineConfig,
    *,
    num_requests: Annotated[int, typer.Option(min=1, help="Requests sent at once.")] = 16,
    input_len: InputLen = 128,
    output_len: OutputLen = 64,
    repeat: Repeat = 3,
    prompt_seed: Seed = 0,
    json: JsonFile = None,
    trace: TraceFile = None,
) -> None:
    """Many requests at once: output tokens a second."""
    timeline = _timeline(trace)
    core = _load(engine)
    from hotplug.cli.bench_engine import measure, random_prompts, speculation_figures, throughput_figures

    measure(core, random_prompts(core.vocab_size, 1, input_len, prompt_seed + repeat), 2)  # warms up
    runs = [
        measure(core, random_prompts(core.vocab_size, num_requests, input_len, prompt_seed + i), output_len, timeline)
        for i in range(repeat)
    ]
    options = {"num_requests": num_requests, "input_len": input_len, "output_len": output_len, "repeat": repeat}
    figures = throughput_figures(runs, num_requests) | speculation_figures(core)
    facts = _engine_facts(core)
    _report("throughput", facts, options, figures, json)
    _write_trace(timeline, trace, {"benchmark": "throughput", **facts, **options})


@app.command("serve", cls=SectionedCommand)
def serve(
    url: Annotated[str, typer.Argument(help="A running server.")] = "http://127.0.0.1:8000",
    *,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    num_requests: Annotated[int, typer.Option(min=1, help="Requests of a run.")] = 64,
    input_len: InputLen = 128,
    output_len: OutputLen = 64,
    repeat: Repeat = 3,
    prompt_seed: Seed = 0,
    token_ids: Annotated[int, typer.Option(min=1, help="Prompts are random token ids below this.")] = 1000,
    api_key: Annotated[str | None, typer.Option(help="Key to send as a bearer token.")] = None,
    json: JsonFile = None,
) -> None:
    """A closed loop of streamed completions against a server: what its clients see."""
    import asyncio

    from hotplug.cli.bench_engine import random_prompts
    from hotplug.cli.bench_serve import Load, drive, serve_figures, server_info

    url = url.rstrip("/").removesuffix("/v1")
    model, plan = server_info(url, api_key)
    runs: list[dict[str, float]] = []
    errors: Counter[str] = Counter()
    for i in range(repeat):
        prompts = random_prompts(token_ids, num_requests, input_len, prompt_seed + i)
        load = Load(url=url, api_key=api_key, model=model, prompts=prompts, output_len=output_len,
                    concurrency=concurrency)  # fmt: skip
        outcome = asyncio.run(drive(load))
        errors.update(outcome.errors)
        if not outcome.completed:
            raise HotplugError("no request succeeded", where=url, why=[f"{n}x {e}" for e, n in errors.items()])
        runs.append(serve_figures(outcome))
    figures = {name: median(run[name] for run in runs) for name in runs[0]}
    figures["errors"] = sum(run["errors"] for run in runs)
    options = {"url": url, "concurrency": concurrency, "num_requests": num_requests, "input_len": input_len,
               "output_len": output_len, "repeat": repeat}  # fmt: skip
    _report("serve", _plan_facts(plan) | {"model": model}, options, figures, json)
    for reason, count in errors.items():
        err().print(f"{count} requests failed: {reason}", style="red")
    if errors:
        raise typer.Exit(1)


def _timeline(file: Path | None) -> Timeline | None:
    """What records a trace, if one is asked for. Raises ConfigError where it could not be written afterwards."""
    if file is None:
        return None
    from hotplug.core.tools.timeline import Timeline

    try:
        file.touch()
    except OSError as e:
        raise ConfigError(f"cannot write the trace: {e.strerror}", where=str(file)) from e
    return Timeline()


def _write_trace(timeline: Timeline | None, file: Path | None, facts: dict[str, Any]) -> None:
    if timeline is None or file is None:
        return
    timeline.write(file, facts)
    if timeline.left_out:
        err().print(f"the trace is full: {timeline.left_out:,} later records were left out", style="yellow")


def _load(engine: EngineConfig) -> EngineCore:
    fetch_model(engine)
    from hotplug.core.engine.core import EngineCore

    return EngineCore(engine)


def _engine_facts(core: EngineCore) -> dict[str, Any]:
    import torch

    return _plan_facts(core.report()) | {"threads": torch.get_num_threads()}


def _plan_facts(report: dict[str, Any]) -> dict[str, Any]:
    """What a figure means nothing without."""
    device = report["device"]
    return {
        "model": report["model"],
        "device": f"{report['platform']}:{device['index']} {device['name']} ({device['arch']})",
        "dtype": report["dtype"],
        "plan_hash": report["plan_hash"],
        "torch": report["torch"],
    }


def _report(
    name: str, facts: dict[str, Any], options: dict[str, Any], figures: dict[str, float], file: str | None
) -> None:
    document = {"schema": 1, "benchmark": name, "hotplug": hotplug.__version__, **facts, "options": options,
                "figures": {key: round(value, 3) for key, value in figures.items()}}  # fmt: skip
    if file == "-":
        print_json(document)
        return
    from rich.table import Table

    table = Table("figure", "median", title=f"{name}: {facts['model']} on {facts['device']}, plan {facts['plan_hash']}")
    table.columns[1].justify = "right"
    for key, value in figures.items():
        table.add_row(key, f"{value:,.2f}")
    out().print(table)
    if file is not None:
        try:
            Path(file).write_text(jsonlib.dumps(document, indent=2) + "\n")
        except OSError as e:
            raise ConfigError(f"cannot write the file: {e.strerror}", where=file) from e
