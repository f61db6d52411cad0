"""`hotplug tune --modes`: run a model in every execution mode of its platform, and keep what each reached.

The record is `hotplug.core.startup.mode_record`'s; `--exec auto` reads it from the next start on.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hotplug.cli.bench_engine import Run, decode_rate, measure, random_prompts
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import ConfigError, HotplugError
from hotplug.core.startup import mode_record
from hotplug.core.startup.bind import Bound, bind
from hotplug.core.startup.mode_record import ModeRecord

if TYPE_CHECKING:
    from hotplug.core.platform.base import ExecMode

ALONE, BATCH, LONG = (64, 48), (32, 32), (512, 2)
"""(prompt tokens, output tokens) of what is measured: one request, several at once, one prompt."""
AT_ONCE = 16
REPEAT = 3
"""Runs; a figure is their best: what disturbs a run only ever makes it slower."""

Report = Callable[["ExecMode", "dict[str, float] | str"], None]
"""Told of every mode: its figures, or why it did not run."""


def tune_modes(engine: EngineConfig, report: Report) -> tuple[Path, ModeRecord]:
    """Measure all modes and write the record. Raises ConfigError where a mode is asked for, or none runs."""
    if engine.exec != "auto":
        raise ConfigError(f"--modes measures every mode, and --exec {engine.exec} asks for one", hint="Leave one out.")
    eager = bind(dataclasses.replace(engine, exec="eager"), meta=True)
    figures: dict[ExecMode, dict[str, float]] = {}
    failed: dict[ExecMode, str] = {}
    for mode in eager.placement.limits.exec_modes:
        try:
            figures[mode] = rates(EngineCore(dataclasses.replace(engine, exec=mode.value)))
            report(mode, figures[mode])
        except (HotplugError, RuntimeError) as e:
            failed[mode] = str(e)
            report(mode, failed[mode])
        gc.collect()  # weights and cache of the one before, before those of the next
    if not figures:
        raise ConfigError("no execution mode runs this model", why=[f"{mode}: {why}" for mode, why in failed.items()])
    record = ModeRecord(figures, failed)
    path = _file(engine, eager)
    mode_record.write(path, record, _about(engine, eager))
    return path, record


def rates(core: EngineCore) -> dict[str, float]:
    """Tokens a second of a started engine, by kind of work. Raises what running raises."""
    core.wait_until_compiled()

    def best(shape: tuple[int, int], count: int, rate: Callable[[Run], float]) -> float:
        length, output = shape
        room = core.max_model_len - output
        if length > room:
            raise ConfigError(f"modes are measured with {length + output} tokens; this engine's sequences hold "
                              f"{core.max_model_len}", hint="Raise --max-model-len or --kv-cache-memory.")  # fmt: skip
        prompts = [random_prompts(core.vocab_size, count, length, seed) for seed in range(REPEAT + 1)]
        return max([rate(measure(core, each, output)) for each in prompts][1:])  # the first one warms up

    return {
        "decode_alone": best(ALONE, 1, decode_rate),
        "decode_batch": best(BATCH, AT_ONCE, decode_rate),
        "prompt": best(LONG, 1, lambda run: run.prompt_tokens / run.ttft),
    }


def _file(engine: EngineConfig, bound: Bound) -> Path:
    return mode_record.record_file(engine, bound.placement.selection, bound.checkpoint.config)


def _about(engine: EngineConfig, bound: Bound) -> dict[str, Any]:
    return mode_record.key(engine, bound.placement.selection, bound.checkpoint.config)
