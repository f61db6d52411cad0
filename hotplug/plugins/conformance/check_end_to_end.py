"""Whole models in every execution mode: the references' greedy tokens, however requests are scheduled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotplug.core.platform.base import ExecMode, Feature
from hotplug.core.request import EngineStats
from hotplug.core.startup.bind import bind
from hotplug.plugins.conformance.engine_runs import (
    MAX_LEN,
    Output,
    artifacts,
    config,
    first_difference,
    generate,
    modes,
    prompts,
    small_model,
    smallest_block,
    start,
    trusted,
    with_prefix,
)
from hotplug.plugins.conformance.report import Report
from hotplug.plugins.conformance.target import Target

Prompts = Mapping[str, Sequence[int]]


@dataclass
class _Scenario:
    """Requests, how an engine is set up for them, and what must have happened by their end."""

    words: str
    model: Path
    asked: Prompts
    tokens: int
    options: Callable[[ExecMode], dict[str, Any]] = lambda mode: {}
    rounds: int = 1
    """How often the requests are run by one engine; the last outputs count."""
    missed: Callable[[EngineStats, ExecMode], str] = lambda stats, mode: ""
    """Why the engine did not do what the scenario is about; empty if it did."""

    @property
    def run(self) -> tuple[Path, int, int]:
        """What the references' tokens follow from."""
        return self.model, id(self.asked), self.tokens


def end_to_end(target: Target, report: Report) -> None:
    """In each mode that is declared, greedy tokens are the references' in every scenario."""
    scenarios = _scenarios(target)
    expected: dict[tuple[Path, int, int], dict[str, Output]] = {}
    for scenario in scenarios:
        if scenario.run not in expected:
            core = start(target, trusted(target, scenario.model))
            expected[scenario.run] = generate(core, scenario.asked, scenario.tokens)
    with artifacts(target):
        for mode in modes(target):
            for scenario in _chosen(scenarios, target, mode):
                _run(target, report, scenario, mode, expected[scenario.run])
    report.data["modes"] = [str(mode) for mode in modes(target)]


def _chosen(scenarios: Sequence[_Scenario], target: Target, mode: ExecMode) -> Sequence[_Scenario]:
    """All of them, or in a quick run of a further mode those that differ most in what a step holds."""
    if not target.options.quick or mode is modes(target)[0]:
        return scenarios
    return [s for s in scenarios if s.words in ("together", "sharing a prefix", "preempted")]


def _run(target: Target, report: Report, scenario: _Scenario, mode: ExecMode, expected: Mapping[str, Output]) -> None:
    core = start(target, config(target, scenario.model, exec=str(mode), **scenario.options(mode)))
    for _ in range(scenario.rounds):
        found = generate(core, scenario.asked, scenario.tokens)
    if missed := scenario.missed(core.stats(), mode):
        raise RuntimeError(f"{missed} (exec {mode})")
    report.cases += len(scenario.asked)
    if difference := first_difference(found, expected, target.limits.dtypes[0]):
        where = (f"`hotplug bisect MODEL --platform {target.platform.name}` finds the kernel" if mode is ExecMode.EAGER
                 else "`--only executables` compares its steps with those op by op")  # fmt: skip
        report.fail(f"greedy tokens differ from the references' {scenario.words}, exec {mode}: {difference}; {where}")


def _scenarios(target: Target) -> list[_Scenario]:
    """Alone, together, in chunks, with shared prefixes, out of KV memory twice over (computed again, and found in the
    swap space), with a window, speculating; and with a model of the user's."""
    quick = target.options.quick
    tokens = 8 if quick else 32
    model, sliding = small_model(target.folder), small_model(target.folder, window=24)
    asked = prompts(5 if quick else 8)
    chunks: dict[str, Any] = {"max_num_batched_tokens": 16}
    found = [
        _Scenario("one after the other", model, asked, tokens, lambda mode: {"max_num_seqs": 1}),
        _Scenario("together", model, asked, tokens),
        _Scenario("in chunks of 16 tokens", model, asked, tokens, lambda mode: chunks),
        _Scenario("after a prefix hit", model, asked, tokens, rounds=2,
                  missed=lambda stats, mode: "" if stats.prefix_hits else
                  "the second run of the same prompts met no cached prefix"),
        *_shared(target, model, chunks),
        *_crowded(target, model),
        _Scenario("with a sliding window", sliding, asked, tokens),
    ]  # fmt: skip
    if Feature.SPECULATIVE in target.limits.features:
        speculating = {"speculative": "ngram", "speculative_ngram_min": 1}
        found.append(_Scenario("speculating", model, asked, tokens, lambda mode: speculating,
                               missed=lambda stats, mode: "" if stats.proposed_tokens else
                               "no prompt had a token to propose"))  # fmt: skip
    if target.options.model is not None:
        real = Path(target.options.model)
        few = {name: ids[:40] for name, ids in list(asked.items())[:4]}
        found.append(_Scenario(f"with {real.name}", real, few, tokens))
    return found


def _shared(target: Target, model: Path, chunks: dict[str, Any]) -> list[_Scenario]:
    """Requests that arrive together and share a prefix: blocks are read in the very step that fills them."""
    blocks = {mode: smallest_block(target, model, mode) for mode in modes(target)}
    length = min(max(40, 2 * max(blocks.values()) + 3), MAX_LEN - 40)
    asked = with_prefix(length, 4 if target.options.quick else 7)

    def missed(stats: EngineStats, mode: ExecMode) -> str:
        least = (len(asked) - 1) * (length // blocks[mode] * blocks[mode])
        return "" if stats.prefix_hits >= least else "the shared prefix was computed more than once"

    def scenario(words: str, options: dict[str, Any]) -> _Scenario:
        return _Scenario(words, model, asked, 8, lambda mode: {"block_size": blocks[mode], **options}, missed=missed)

    return [scenario("sharing a prefix", {}), scenario("sharing a prefix in chunks of 16 tokens", chunks)]


def _crowded(target: Target, model: Path) -> list[_Scenario]:
    """Requests that outgrow the KV cache, each past its first block."""
    block = {mode: smallest_block(target, model, mode) for mode in modes(target)}
    most, quick = max(block.values()), target.options.quick
    asked, tokens = prompts(5 if quick else 8, longest=12), max(24 if quick else 64, most + most // 2)

    def tight(mode: ExecMode) -> dict[str, Any]:
        size = block[mode]
        kv = bind(config(target, model, block_size=size, exec=str(mode)), meta=True, candidates=target.candidates).kv
        return {"kv_cache_memory": (2 + len(asked) * tokens // 2 // size) * kv.block_bytes, "block_size": size}

    def swapping(mode: ExecMode) -> dict[str, Any]:
        options = tight(mode)
        return {**options, "swap_space": 2 * options["kv_cache_memory"]}

    return [
        _Scenario("preempted", model, asked, tokens, tight,
                  missed=lambda stats, mode: "" if stats.preemptions else
                  "the cache was too large for anything to be preempted"),
        _Scenario("swapped", model, asked, tokens, swapping,
                  missed=lambda stats, mode: "" if stats.blocks_swapped_in else
                  "nothing was swapped out and in again"),
    ]  # fmt: skip
