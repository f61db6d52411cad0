"""`--exec auto`: by a record measured here, else by the platform's order; and the command that measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_platforms import FakePlatform, candidates, limits
from typer.testing import CliRunner

from hotplug.cli.main import app
from hotplug.core.config import EngineConfig
from hotplug.core.errors import ConfigError
from hotplug.core.platform.base import ExecMode
from hotplug.core.startup import mode_record
from hotplug.core.startup.bind import Bound, bind
from hotplug.core.startup.mode_record import ModeRecord

EAGER, CAPTURE = ExecMode.EAGER, ExecMode.CAPTURE
PLATFORM = FakePlatform(facts=limits(exec_modes=(CAPTURE, EAGER), accelerator=False))
SLOW_CAPTURE = ModeRecord({CAPTURE: {"a": 10.0, "b": 40.0}, EAGER: {"a": 50.0, "b": 50.0}})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOTPLUG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def bound(model: Path, **options: object) -> Bound:
    config = EngineConfig.from_mapping({"model": str(model), "load_format": "dummy", **options})
    return bind(config, meta=True, candidates=candidates(PLATFORM))


def choice(model: Path, **options: object) -> tuple[str, str]:
    report = bound(model, **options).report()
    return report["exec"], report["exec_because"]


def keep(model: Path, record: ModeRecord, **options: object) -> Path:
    """Write a record for what `bound` would bind; returns its file."""
    found = bound(model, **options)
    path = mode_record.record_file(found.config, found.placement.selection, found.checkpoint.config)
    mode_record.write(path, record, mode_record.key(found.config, found.placement.selection, found.checkpoint.config))
    return path


def test_without_a_record_the_platforms_order_decides(tiny_model: Path) -> None:
    mode, reason = choice(tiny_model)
    assert mode == "capture"
    assert "hotplug tune --modes" in reason


def test_a_record_decides_and_the_report_says_by_how_much(tiny_model: Path) -> None:
    keep(tiny_model, SLOW_CAPTURE)  # rates of 20 and 50 in the geometric mean
    assert choice(tiny_model) == ("eager", "fastest as measured here (eager 1.00, capture 0.40)")


def test_what_is_asked_for_wins_over_a_record(tiny_model: Path) -> None:
    keep(tiny_model, SLOW_CAPTURE)
    assert choice(tiny_model, exec="capture") == ("capture", "asked for")


def test_traced_ops_run_op_by_op(tiny_model: Path) -> None:
    keep(tiny_model, ModeRecord({CAPTURE: {"a": 2.0}, EAGER: {"a": 1.0}}))
    assert choice(tiny_model, trace_ops=True) == ("eager", "ops are timed one by one")


@pytest.mark.parametrize(
    "options", [{"kv_cache_dtype": "float32"}, {"quantization": "none"}, {"force": ("rms_norm=reference",)}]
)
def test_a_record_of_other_options_is_not_taken(tiny_model: Path, options: dict[str, object]) -> None:
    keep(tiny_model, SLOW_CAPTURE)
    assert choice(tiny_model, **options)[0] == "capture"


def test_a_record_of_another_model_is_not_taken(tiny_model: Path, tiny_moe_model: Path) -> None:
    keep(tiny_moe_model, SLOW_CAPTURE)
    assert choice(tiny_model)[0] == "capture"


def test_modes_that_the_platform_no_longer_has_are_passed_over(tiny_model: Path) -> None:
    keep(tiny_model, ModeRecord({ExecMode.COMPILE: {"a": 9.0}, **SLOW_CAPTURE.figures}))
    assert choice(tiny_model)[0] == "eager"


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', '{"schema": 1, "figures": {"fast": {}}, "failed": {}}',
                                  '{"schema": 1, "figures": {"eager": {"a": 0}}, "failed": {}}',
                                  '{"schema": 1, "figures": {"eager": {"a": 1e999}}, "failed": {}}',
                                  '{"schema": 1, "figures": {"eager": {"a": NaN}}, "failed": {}}',
                                  '{"schema": 1, "figures": ' + "[" * 100_000])  # fmt: skip
def test_a_damaged_record_is_an_error_that_names_the_file(tiny_model: Path, text: str) -> None:
    path = keep(tiny_model, SLOW_CAPTURE)
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        bound(tiny_model)
    assert str(path) in str(caught.value) and "tune --modes" in str(caught.value)


def test_the_command_measures_every_mode_and_the_next_start_takes_the_fastest(tiny_model: Path, cache: Path) -> None:
    model = [str(tiny_model), "--load-format", "dummy", "--device", "cpu", "--kv-cache-memory", "64MiB"]
    done = CliRunner().invoke(app, ["tune", *model, "--modes", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert {"eager", "capture"} <= document["modes"].keys() | document["failed"].keys()
    assert document["fastest"] == next(iter(document["modes"]))
    for figures in document["modes"].values():
        assert figures.keys() == {"decode_alone", "decode_batch", "prompt"} and min(figures.values()) > 0
    assert Path(document["file"]).parent == cache / "modes"
    shown = json.loads(CliRunner().invoke(app, ["explain", *model, "--json"]).stdout)
    assert shown["exec"] == document["fastest"]
    assert "as measured here" in shown["exec_because"]


@pytest.mark.parametrize("wrong", [["--exec", "eager"], ["--seconds", "5"]])
def test_the_command_refuses_what_does_not_go_together(tiny_model: Path, wrong: list[str]) -> None:
    done = CliRunner().invoke(app, ["tune", str(tiny_model), "--load-format", "dummy", "--modes", *wrong])
    assert done.exit_code == 2
    assert "--modes" in done.output
