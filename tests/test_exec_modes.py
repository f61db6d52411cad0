"""KV growth, preemption and prefix hits are the same in every execution mode that a platform declares."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wrong_platforms.right import Right

from hotplug.core.engine.core import EngineCore
from hotplug.core.platform.base import ExecMode
from hotplug.core.request import Request, SamplingParams
from hotplug.core.startup.bind import bind
from hotplug.platforms.cpu import CpuPlatform
from hotplug.plugins.conformance.engine_runs import (
    MAX_LEN,
    Output,
    artifacts,
    config,
    first_difference,
    modes,
    small_model,
    smallest_block,
    start,
)
from hotplug.plugins.conformance.target import Options, Target

PLATFORMS = (CpuPlatform, Right)
CASES = [(kind, mode) for kind in PLATFORMS for mode in kind().limits(kind().probe()[0]).exec_modes]
STEMS = [[(stem * 37 + i * 11) % 290 + 1 for i in range(100)] for stem in range(2)]


@dataclass(frozen=True)
class Ask:
    """A request of a script."""

    step: int
    """Of the script, at which it arrives."""
    prompt: Sequence[int]
    max_tokens: int
    abort: int | None = None
    """Steps after its arrival at which it is given up."""


@dataclass
class Life:
    """What became of a script."""

    outputs: dict[str, Output] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    steps: list[tuple[int, ...]] = field(default_factory=list)
    """Running, waiting, KV blocks in use, and since the begin preempted and found in the prefix cache, by step."""


class Engines:
    """Engines of one platform over a small model, made when first asked for and used again and again."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.model = small_model(target.folder)
        self.block = max(16, *(smallest_block(target, self.model, mode) for mode in modes(target)))
        self._cores: dict[tuple[str, ExecMode], EngineCore] = {}
        self._names = itertools.count()

    def core(self, size: str, mode: ExecMode, number: int = 0) -> EngineCore:
        """Engine `number` of those of this mode: `tight`, one sequence and a bit fits, or `roomy`."""
        key = (f"{size}{number}", mode)
        if key not in self._cores:
            options: dict[str, Any] = {"block_size": self.block, "exec": str(mode), "max_num_batched_tokens": 48}
            shape = bind(config(self.target, self.model, **options), meta=True,
                         candidates=self.target.candidates).kv  # fmt: skip
            blocks = 2 + MAX_LEN // self.block if size == "tight" else 2 + 8 * MAX_LEN // self.block
            options |= {"kv_cache_memory": blocks * shape.block_bytes, "enable_prefix_cache": size == "tight"}
            self._cores[key] = start(self.target, config(self.target, self.model, **options))
        return self._cores[key]

    def live(self, core: EngineCore, script: Sequence[Ask]) -> Life:
        """Run a script to its end, after which the engine must hold nothing."""
        life, begin, prefix = Life(), core.stats(), next(self._names)
        for step in itertools.count():
            for i, ask in enumerate(script):
                if ask.step == step:
                    params = SamplingParams(temperature=0.0, max_tokens=ask.max_tokens, ignore_eos=True, logprobs=2)
                    core.add(Request(id=f"{prefix}-{i}", prompt_token_ids=list(ask.prompt), sampling=params))
                    life.outputs[str(i)] = Output()
                if ask.abort is not None and ask.step + ask.abort == step and core.abort(f"{prefix}-{i}"):
                    life.aborted.add(str(i))
            for delta in core.step():
                output = life.outputs[delta.request_id.partition("-")[2]]
                output.tokens += delta.token_ids
                output.margins += [entry.logprobs[1] - entry.logprobs[2] for entry in delta.logprobs or ()]
            stats = core.stats()
            since = (stats.preemptions - begin.preemptions, stats.prefix_hits - begin.prefix_hits)
            life.steps.append((stats.running, stats.waiting, stats.kv_blocks_used, *since))
            if not core.has_work and all(ask.step <= step for ask in script):
                break
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
        return life


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Engines]:
    made: dict[Any, Engines] = {}

    def of(kind: Any) -> Engines:
        if kind not in made:
            platform = kind()
            folder = tmp_path_factory.mktemp(platform.name)
            made[kind] = Engines(Target(platform, platform.probe()[0], kind, Options(), folder))
        return made[kind]

    return of


def same_as_alone(engines: Engines, mode: ExecMode, script: Sequence[Ask], life: Life) -> None:
    """Every output is what its request gets alone, op by op and without a cache; an aborted one is a part of that."""
    roomy = engines.core("roomy", ExecMode.EAGER)
    for i, ask in enumerate(script):
        alone = engines.live(roomy, [Ask(0, ask.prompt, ask.max_tokens)]).outputs["0"]
        got = life.outputs[str(i)]
        if str(i) in life.aborted:
            alone = Output(alone.tokens[: len(got.tokens)], alone.margins)
        else:
            assert len(got.tokens) == ask.max_tokens
        assert not first_difference({"": got}, {"": alone}, "float32"), f"request {i} of {script}, exec {mode}"


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    shared = draw(st.sampled_from([[], *STEMS]))[: draw(st.integers(0, 100))]
    own = [draw(st.integers(1, 290))] * draw(st.integers(1, 30))
    most = MAX_LEN - len(shared) - len(own) - 1
    return Ask(draw(st.integers(0, 8)), [*shared, *own], min(most, draw(st.integers(1, 40))),
               draw(st.none() | st.none() | st.integers(0, 20)))  # fmt: skip


@pytest.mark.parametrize(("kind", "mode"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
@settings(
    max_examples=8, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(script=st.lists(asks(), min_size=2, max_size=8))
def test_random_lives_are_those_of_op_by_op_steps(
    engines: Callable[[Any], Engines], kind: Any, mode: ExecMode, script: list[Ask]
) -> None:
    made = engines(kind)
    with artifacts(made.target):
        # An engine op by op for each mode, which sees the same scripts in the same order: the caches hold the same.
        beside = made.core("tight", ExecMode.EAGER, number=1 + modes(made.target).index(mode))
        life, plain = made.live(made.core("tight", mode), script), made.live(beside, script)
        same_as_alone(made, mode, script, life)
        assert life.steps == plain.steps


@pytest.mark.parametrize(("kind", "mode"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_crowd_is_preempted_and_shares_its_prefix(
    engines: Callable[[Any], Engines], kind: Any, mode: ExecMode
) -> None:
    made = engines(kind)
    script = [Ask(0, [*STEMS[0][:64], i + 1], 60) for i in range(5)]
    with artifacts(made.target):
        life = made.live(made.core("tight", mode, number=9), script)
        same_as_alone(made, mode, script, life)
    preemptions, hits = life.steps[-1][3:]
    assert preemptions > 0
    assert hits >= 4 * 64 // made.block * made.block
