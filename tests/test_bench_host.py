"""The benchmark of the host's cost: cheap rows, run very small, and the table that is made of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import host as bench
import pytest
from host_engines import null_package, servers
from host_engines.model import SMALL_VOCAB, VOCAB, write_config, write_model

TINY = ["--repeat", "2", "--steps", "5", "--requests", "40", "--open-requests", "10", "--idle-seconds", "0.5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


def measure(model: Path, folder: Path, *rows: str, arguments: tuple[str, ...] = ()) -> dict[str, bench.Found]:
    options = bench.parser().parse_args([*TINY, "--model", str(model), *arguments])
    return bench.Bench(options, folder).measure([row for row in bench.ROWS if row.name in rows])


def test_rows_of_an_engine_are_measured_in_processes_of_their_own(model: Path, tmp_path: Path) -> None:
    found = measure(model, tmp_path, "loop-64", "prepare", "steady", "soak-growth", "soak-blocks", "soak-chains")
    assert not any(one.cannot for one in found.values()), found
    assert 0 < max(found["loop-64"].values) < 50 and len(found["loop-64"].values) == 2
    assert 0 < max(found["prepare"].values) < 50
    assert 10 < max(found["steady"].values) < 150  # % of the ceiling, of a few steps on a machine that may be busy
    assert found["soak-blocks"].values == found["soak-chains"].values == [0]


@pytest.mark.slow
def test_rows_of_a_server_are_measured_over_http(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    found = measure(model, tmp_path, "ttft-p50", "ttft-p99", "idle")
    assert not any(one.cannot for one in found.values()), found
    for low, high in zip(found["ttft-p50"].values, found["ttft-p99"].values, strict=True):
        assert 0 < low <= high
    assert 0 <= max(found["idle"].values) < 100


def test_a_row_that_cannot_be_measured_says_why(model: Path, tmp_path: Path) -> None:
    rows = ("vllm-loop-64", "stream")
    nowhere = str(tmp_path / "nowhere")
    found = measure(model, tmp_path, *rows, arguments=("--peers", nowhere, "--load", nowhere))
    assert not any(one.values for one in found.values())
    assert "make bench-peers" in found["vllm-loop-64"].cannot
    assert "--load" in found["stream"].cannot


def test_a_worker_that_fails_gives_its_last_words(model: Path, tmp_path: Path) -> None:
    options = bench.parser().parse_args(TINY)
    options.model = str(tmp_path / "no-model")
    found = bench.Bench(options, tmp_path).measure([row for row in bench.ROWS if row.name == "prepare"])
    assert "prepare.py ended with 1" in found["prepare"].cannot and "no-model" in found["prepare"].cannot


def test_a_server_that_does_not_start_is_told_of(tmp_path: Path) -> None:
    with (
        pytest.raises(servers.CannotError, match="before it was ready"),
        servers.vllm(Path(sys.executable), tmp_path, 4),
    ):  # the interpreter here has no vLLM
        pass


def test_the_table_says_what_is_met(tmp_path: Path) -> None:
    rows = (
        bench.Row("a", "at most", "ms", 2.0),
        bench.Row("b", "at least", "tok/s", 100, most=False),
        bench.Row("c", "beside", "ms"),
        bench.Row("d", "not here", "ms", 1),
    )
    found = {
        "a": bench.Found([1.0, 2.0, 9.0], note="a note"),
        "b": bench.Found([99.0]),
        "c": bench.Found([5.0]),
        "d": bench.Found(cannot="no GPU"),
    }
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in bench.table(rows, found).splitlines()[2:]]
    assert lines == [
        ["a", "at most", "2 ms", "<= 2", "met", "1 to 9; a note"],
        ["b", "at least", "99 tok/s", ">= 100", "missed", "99 to 99"],
        ["c", "beside", "5 ms", "-", "beside", "5 to 5"],
        ["d", "not here", "-", "<= 1", "not measured", "no GPU"],
    ]
    plain = json.loads(json.dumps(bench.document(rows, found)))["rows"]
    assert [row["met"] for row in plain] == [True, False, None, None]


def test_every_row_has_one_measurement(tmp_path: Path) -> None:
    options = bench.parser().parse_args(["--model", "anything"])
    named = [name for names, _ in bench.Bench(options, tmp_path).measurements() for name in names]
    assert sorted(named) == sorted(row.name for row in bench.ROWS)


def test_processes_find_the_null_device(tmp_path: Path) -> None:
    null_package.lay_out(tmp_path)
    environment = null_package.environment(tmp_path, step_ms=1.5)
    assert environment["NULL_DEVICE_STEP_MS"] == "1.5"
    assert (tmp_path / "null_device-1.0.0.dist-info" / "entry_points.txt").read_text() == (
        "[hotplug.platforms]\nnull_device = null_device:NullDevice\n"
    )


def test_the_model_is_small_and_its_vocabulary_real(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (2, 128, VOCAB)
    assert (model / "tokenizer.json").exists()
    write_config(tmp_path, SMALL_VOCAB)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == SMALL_VOCAB
