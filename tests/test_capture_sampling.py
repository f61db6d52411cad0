"""Captured steps and sampling: what is recorded reads of the rows what the device knows when the step is replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_platforms import FakePlatform, candidates, limits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.platform.base import DeviceInfo, ExecMode
from hotplug.core.request import Request, SamplingParams, TokenDelta
from hotplug.plugins.conformance.engine_runs import small_model


class Tape(TorchDispatchMode):
    """Records torch's operations and runs them again on the same memory, without the Python that called them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert "local_scalar_dense" not in func.name(), "a recorded step reads the device"
        result = func(*args, **kwargs)
        made = [] if func._schema.is_mutable else [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if func._schema.is_mutable or any(t.untyped_storage().data_ptr() not in given for t in made):
            self.calls.append((func, args, kwargs, made))
        return result

    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for target, source in zip(made, again, strict=False):
                target.copy_(source)


@dataclass
class Taping(FakePlatform):
    """Captures as a device would: a replay runs no Python of the core."""

    facts: Any = field(
        default_factory=lambda: limits(exec_modes=(ExecMode.CAPTURE, ExecMode.EAGER), shared_host_memory=True,
                                       accelerator=False)
    )  # fmt: skip
    replays: int = 0

    def capture(self, step: Callable[[], Any], device: DeviceInfo) -> Callable[[], Any]:
        with Tape() as tape:
            step()

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models"))


def start(folder: Path, platform: FakePlatform, **options: Any) -> EngineCore:
    fixed = {"max_num_seqs": 4, "max_model_len": 64, "kv_cache_memory": "4MiB"}
    return EngineCore(EngineConfig(model=str(folder), **{**fixed, **options}), candidates=candidates(platform))


def eager() -> FakePlatform:
    return FakePlatform(facts=limits(accelerator=False))


def ask(core: EngineCore, name: int, **params: Any) -> None:
    fixed = {"temperature": 0.0, "max_tokens": 9, "ignore_eos": True}
    core.add(Request(id=str(name), prompt_token_ids=list(range(5 + name, 17)),
                     sampling=SamplingParams(**{**fixed, **params})))  # fmt: skip


def run(core: EngineCore, steps: int | None = None) -> list[TokenDelta]:
    """What comes of some steps, or of all."""
    found: list[TokenDelta] = []
    while core.has_work and steps != 0:
        found += core.step()
        steps = None if steps is None else steps - 1
    return found


def tokens(deltas: list[TokenDelta]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for delta in deltas:
        found.setdefault(delta.request_id, []).extend(delta.token_ids)
    return found


EVEN, ODD = tuple(range(0, 290, 2)), tuple(range(1, 290, 2))
SPECIAL: dict[str, list[dict[str, Any]]] = {
    "penalties": [{"repetition_penalty": 1.5}, {"presence_penalty": 1.0, "temperature": 1.0, "seed": 3}, {}],
    "bias": [{"logit_bias": {7: 9.0}}, {"logit_bias": {9: -50.0}, "temperature": 0.7, "seed": 1}, {}],
    "held back": [{"min_tokens": 7, "stop_token_ids": EVEN}, {}, {"min_tokens": 9, "stop_token_ids": ODD}],
    "logprobs": [{"logprobs": 2}, {"logprobs": 0, "temperature": 1.0, "seed": 4}, {}],
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_rows_that_need_their_scores_get_what_eager_steps_give(kind: str, model: Path) -> None:
    def outcome(platform: FakePlatform, asked: list[dict[str, Any]]) -> list[TokenDelta]:
        core = start(model, platform)
        for i, params in enumerate(asked):
            ask(core, i, **params)
        return run(core)

    platform = Taping()
    found, expected = outcome(platform, SPECIAL[kind]), outcome(eager(), SPECIAL[kind])
    assert platform.replays > 0
    assert tokens(found) == tokens(expected)
    drawn = [{name: p[name] for name in ("temperature", "seed") if name in p} for p in SPECIAL[kind]]
    if kind != "logprobs":
        assert tokens(found) != tokens(outcome(eager(), drawn))
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one.logprobs or [], other.logprobs or [], strict=True):
            assert (a.token_ids, a.rank) == (b.token_ids, b.rank)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert (kind == "logprobs") == any(delta.logprobs for delta in found)


def test_parameters_of_rows_admitted_later_reach_recorded_steps(model: Path) -> None:
    """Rows are used again, and a sampled request joins a greedy one whose steps are already replayed."""
    later = [{"temperature": 1.0, "seed": 5}, {"temperature": 1.5, "seed": 6, "top_k": 3}, {},
             {"temperature": 2.0, "seed": 7, "top_p": 0.6, "min_p": 0.1}]  # fmt: skip

    def outcome(platform: FakePlatform, params: list[dict[str, Any]]) -> dict[str, list[int]]:
        core = start(model, platform, max_num_seqs=2)
        ask(core, 9, max_tokens=30)
        found = run(core, steps=4)
        for i, more in enumerate(params):
            ask(core, i, **more)
            found += run(core, steps=3)
        return tokens(found + run(core))

    platform = Taping()
    found = outcome(platform, later)
    assert platform.replays > 0
    assert found == outcome(eager(), later)
    greedy = outcome(eager(), [{}] * len(later))
    assert [found[str(i)] != greedy[str(i)] for i in range(4)] == [True, True, False, True]
    assert found["9"] == greedy["9"]


def test_padding_rows_change_nothing_of_other_rows(model: Path) -> None:
    core = start(model, Taping(), max_num_seqs=8)
    for i in range(3):  # padded to a step of four
        ask(core, i)
    run(core, steps=2)
    batch, (first, *_) = core.bound.rows.batch, core._executor.worker.executable._eager._kv
    used = batch.block_tables[0, :3].unique().tolist()
    others = [i for i in range(len(first[0])) if i not in used]
    before = [batch.last_tokens.clone(), batch.block_tables.clone(), first[0].clone()]
    run(core, steps=1)
    assert torch.equal(batch.last_tokens[3:-1], before[0][3:-1])
    assert torch.equal(batch.block_tables, before[1])
    assert not batch.block_tables[:, batch.spare_row].any()
    assert torch.equal(first[0][others], before[2][others])
    assert not torch.equal(first[0], before[2])
