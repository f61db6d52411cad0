"""How many requests and tokens a step holds by default: by a record near the model's size, else by the platform."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_platforms import FakePlatform, candidates, limits
from typer.testing import CliRunner

from hotplug.cli import tune_steps
from hotplug.cli.main import app
from hotplug.core.config import EngineConfig
from hotplug.core.errors import ConfigError
from hotplug.core.platform.base import DeviceInfo
from hotplug.core.startup import step_record
from hotplug.core.startup.bind import Bound, bind
from hotplug.core.startup.step_record import Measured, StepRecord


class Shipping(FakePlatform):
    """A platform that brings measured sizes of steps."""

    file: Path

    def step_sizes(self, device: DeviceInfo) -> Path | None:
        return self.file if self.file.exists() else None


PLATFORM = Shipping(facts=limits(step_requests=8, step_tokens=64))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOTPLUG_CACHE", str(tmp_path / "cache"))
    PLATFORM.file = tmp_path / "shipped.json"
    return tmp_path / "cache"


def bound(model: Path, **options: object) -> Bound:
    config = EngineConfig.from_mapping({"model": str(model), "load_format": "dummy", **options})
    return bind(config, meta=True, candidates=candidates(PLATFORM))


def step(model: Path, **options: object) -> tuple[int, int, str]:
    found = bound(model, **options).report()["step"]
    return found["requests"], found["tokens"], found["because"]


def size(model: Path) -> int:
    found = bound(model)
    return step_record.weight_bytes(found.checkpoint.config, found.model.context.dtype.itemsize)


def record(weight_bytes: int, *measured: tuple[int, int, float], name: str = "a model") -> StepRecord:
    return StepRecord(name, weight_bytes, [Measured(*one, gap_p99_ms=1.0) for one in measured])


def own(model: Path) -> Path:
    return step_record.own_file(bound(model).placement.selection)


# --- what counts ---


def test_without_a_record_the_platform_decides(tiny_model: Path) -> None:
    requests, tokens, because = step(tiny_model)
    assert (requests, tokens) == (8, 64)
    assert "hotplug tune --defaults" in because


def test_a_shipped_record_of_a_model_of_about_the_size_decides(tiny_model: Path) -> None:
    step_record.write(PLATFORM.file, record(size(tiny_model) * 3 // 2, (24, 96, 5.0), name="a tiny one"), "here")
    requests, tokens, because = step(tiny_model)
    assert (requests, tokens) == (24, 96)
    assert "a tiny one" in because


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_a_record_of_a_model_of_another_size_does_not_count(tiny_model: Path, factor: float) -> None:
    step_record.write(PLATFORM.file, record(int(size(tiny_model) * factor), (24, 96, 5.0)), "here")
    assert step(tiny_model)[:2] == (8, 64)


def test_the_nearest_counts_and_of_equals_the_users_own(tiny_model: Path) -> None:
    at = size(tiny_model)
    step_record.write(PLATFORM.file, record(at * 3 // 2, (24, 96, 5.0)), "here")
    step_record.write(PLATFORM.file, record(at, (32, 96, 5.0)), "here")
    assert step(tiny_model)[0] == 32
    step_record.write(own(tiny_model), record(at, (40, 96, 5.0)), "here")
    assert step(tiny_model)[0] == 40
    assert "measured here" in step(tiny_model)[2]


def test_the_fewest_requests_that_are_all_but_the_fastest_are_taken() -> None:
    found = record(1, (8, 64, 90.0), (16, 64, 99.5), (32, 64, 100.0))
    assert (found.best.requests, found.best.tokens) == (16, 64)


def test_of_as_many_requests_those_tokens_are_taken_at_which_gaps_are_shortest() -> None:
    rates = ((64, 99.5, 3.0), (48, 99.6, 2.0), (32, 100.0, 4.0))
    found = StepRecord("m", 1, [Measured(16, tokens, rate, gap) for tokens, rate, gap in rates])
    assert found.best.tokens == 48


def test_what_is_asked_for_wins(tiny_model: Path) -> None:
    step_record.write(PLATFORM.file, record(size(tiny_model), (24, 96, 5.0)), "here")
    assert step(tiny_model, max_num_seqs=5)[:2] == (5, 96)
    assert step(tiny_model, max_num_batched_tokens=16)[:2] == (16, 16)
    assert step(tiny_model, max_num_seqs=5, max_num_batched_tokens=16) == (5, 16, "asked for")


GOOD = {"requests": 8, "tokens": 80_000, "output_tokens_per_s": 1, "gap_p99_ms": 1}
FEW_TOKENS = {"requests": 9, "tokens": 8, "output_tokens_per_s": 1, "gap_p99_ms": 1}
DAMAGED: tuple[object, ...] = (
    "", "[]", {"schema": 2, "entries": []}, {"schema": 1, "entries": [{}]},
    {"schema": 1, "entries": [{"model": "m", "weight_bytes": 5, "measured": [], "about": {}}]},
    {"schema": 1, "entries": [{"model": "m", "weight_bytes": 5, "measured": [FEW_TOKENS], "about": {}}]},
    *({"schema": 1, "entries": [{"model": "m", "weight_bytes": 5, "measured": [GOOD | wrong], "about": {}}]}
      for wrong in ({"requests": 70_000}, {"requests": 1.5}, {"tokens": 1e300}, {"output_tokens_per_s": float("nan")},
                    {"output_tokens_per_s": float("inf")}, {"gap_p99_ms": "1"})),
    '{"schema": 1, "entries": [{"model": "m", "weight_bytes": 1e999}]}', '{"schema": 1, "entries": ' + "[" * 100_000,
)  # fmt: skip


@pytest.mark.parametrize("text", [text if isinstance(text, str) else json.dumps(text) for text in DAMAGED])
def test_a_damaged_record_is_an_error_that_names_the_file(tiny_model: Path, text: str) -> None:
    path = own(tiny_model)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        bound(tiny_model)
    assert str(path) in str(caught.value) and "tune --defaults" in str(caught.value)


def test_a_record_takes_the_place_of_one_of_the_same_size(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    for one in (record(9, (8, 64, 1.0)), record(5, (4, 64, 1.0)), record(9, (16, 64, 2.0))):
        step_record.write(path, one, "here")
    assert [(one.weight_bytes, one.best.requests) for one in step_record.read(path)] == [(5, 4), (9, 16)]


# --- the command ---


def test_the_command_measures_sizes_and_the_next_start_takes_the_best(
    tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_steps, "MIX", 20)
    monkeypatch.setattr(tune_steps, "LONGEST", (60, 20))
    monkeypatch.setattr(tune_steps, "FACTORS", (1 / 16, 1 / 8))
    monkeypatch.setattr(tune_steps, "TOKENS", (128,))
    model = [str(tiny_model), "--load-format", "dummy", "--device", "cpu", "--kv-cache-memory", "64MiB"]
    done = CliRunner().invoke(app, ["tune", *model, "--defaults", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert [one["requests"] for one in document["measured"][:2]] == [8, 16]
    assert all(one["output_tokens_per_s"] > 0 for one in document["measured"])
    assert Path(document["file"]).parent == cache / "step_sizes"
    shown = json.loads(CliRunner().invoke(app, ["explain", *model, "--json"]).stdout)
    assert (shown["step"]["requests"], shown["step"]["tokens"]) == (document["requests"], document["tokens"])
    assert "measured here" in shown["step"]["because"]


def test_the_load_has_the_lengths_of_chats() -> None:
    prompts, lengths = tune_steps.mix(1000, 500, 4096, seed=1)
    assert 200 < sum(map(len, prompts)) / 500 < 300 and 200 < sum(lengths) / 500 < 300
    assert max(map(len, prompts)) <= 2000 and max(lengths) <= 1000
    assert tune_steps.mix(1000, 500, 4096, seed=2)[1] == lengths


@pytest.mark.parametrize("wrong", [["--max-num-seqs", "4"], ["--seconds", "5"], ["--modes"], ["--max-model-len", "64"]])
def test_the_command_refuses_what_does_not_go_together(tiny_model: Path, wrong: list[str]) -> None:
    done = CliRunner().invoke(app, ["tune", str(tiny_model), "--load-format", "dummy", "--defaults", *wrong])
    assert done.exit_code == 2, done.output
