"""A logits processor that raises in the middle of a step ends its own request, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.request import Request, SamplingParams, TokenDelta


class Breaks:
    """Raises in one of its methods, the third time it is called."""

    def __init__(self, vocab: int, *, method: str) -> None:
        self._method, self._calls = method, 0

    def _count(self, method: str) -> None:
        self._calls += method == self._method
        if method == self._method and self._calls == (1 if method == "start" else 3):
            raise KeyError(method)

    def start(self, *_: Any) -> None:
        self._count("start")

    def apply(self, _: Any) -> None:
        self._count("apply")

    def accept(self, _: Any) -> None:
        self._count("accept")


@pytest.mark.parametrize(("method", "kept"), [("start", 0), ("apply", 2), ("accept", 3)])
def test_a_processor_that_raises_ends_its_request_alone(tiny_model: Path, method: str, kept: int) -> None:
    config = EngineConfig(model=str(tiny_model), load_format="dummy", kv_cache_memory="1MiB", max_num_seqs=4)
    core = EngineCore(config)
    core.bound.rows.sampler._factories = {"breaks": Breaks}
    plain = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    broken = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True,
                            logits_processors={"breaks": {"method": method}})  # fmt: skip
    for name, params in {"before": plain, "broken": broken, "after": plain}.items():
        core.add(Request(id=name, prompt_token_ids=[5, 6, 7], sampling=params))
    deltas: dict[str, list[TokenDelta]] = {"before": [], "broken": [], "after": []}
    while core.has_work:
        for delta in core.step():
            deltas[delta.request_id].append(delta)
    tokens = {name: [token for delta in found for token in delta.token_ids] for name, found in deltas.items()}
    assert deltas["broken"][-1].finish_reason == "error"
    assert len(tokens["broken"]) == kept
    assert len(tokens["before"]) == 8
    assert tokens["before"] == tokens["after"]
    assert core.stats().kv_blocks_used == 0
