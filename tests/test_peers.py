"""The comparison with other engines: settings, kept rows, tables, and the tables that stand in the documentation."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import write_tables
from cpu_engines.workloads import Source
from peers import history, measure, pages, records, tables
from peers.records import KEYS, Run, merge, read
from peers.settings import DEFAULTS, GPU_NOT_RUN, NOT_RUN, TUNED, engines
from track import machine, series, trees
from track.store import History

FACTS = {"cpu": "x", "isa": ["avx2"], "cores": 2, "memory_gib": 4}


@pytest.fixture
def run() -> Run:
    return Run(FACTS)


def row(run: Run, engine: str, figure: str = "w1-decode", *samples: float, weights: str = "Q4_1",
        setting: str = DEFAULTS, better: str = "higher", reason: str | None = None) -> records.Row:  # fmt: skip
    return run.row(engine=engine, weights=weights, setting=setting, figure=figure, unit="tok/s", better=better,
                   samples=samples, not_measured=reason)  # fmt: skip


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", engines([0, 1]), ids=lambda e: e.name)
def test_every_engine_is_measured_at_its_defaults_and_as_its_documentation_recommends(engine):
    names = {setting.name: setting for setting in engine.settings}
    assert set(names) == {DEFAULTS, TUNED}
    assert {name for used in engine.weights.values() for name in used} == {DEFAULTS, TUNED}
    assert names[TUNED].source and names[TUNED].options and not names[DEFAULTS].source


def test_engines_that_are_not_run_say_what_was_tried_and_why():
    assert {absent.name for absent in NOT_RUN} == {
        "SGLang's CPU build", "TGI's CPU build", "transformers' continuous batching",
    }  # fmt: skip
    assert {absent.name for absent in GPU_NOT_RUN} == {"TensorRT-LLM", "SGLang", "LMDeploy"}
    assert all(absent.tried and absent.reason for absent in (*NOT_RUN, *GPU_NOT_RUN))


def test_an_environment_of_an_unknown_peer_is_refused_by_name():
    done = subprocess.run([records.ROOT / "ci" / "bench" / "peers.sh", "openvino", "nobody"], capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert (done.returncode, "no peer is named nobody" in done.stderr) == (2, True)


# --- rows -----------------------------------------------------------------------------------------


def test_a_row_says_who_was_measured_where_and_with_what(run):
    ours, theirs = row(run, "hotplug", "w1-decode", 1.0, 2.0), row(run, "vLLM", "w1-decode", 1.0)
    assert tuple(ours) == KEYS
    assert (ours["commit"], ours["peer"]) == (records.commit(), None)
    assert (theirs["commit"], theirs["peer"]) == (None, "vLLM")
    assert ours["run"] == theirs["run"] != Run(FACTS).row(
        engine="x", weights="", setting="", figure="f", unit="s", better="lower", samples=[1.0])["run"]  # fmt: skip
    assert ours["machine"] == machine.machine_class(FACTS) != machine.machine_class({**FACTS, "cores": 3})
    json.dumps(ours)


@pytest.mark.parametrize(("samples", "reason"), [((), None), ((1.0,), "it was there")])
def test_a_row_has_samples_or_the_reason_that_it_has_none(run, samples, reason):
    with pytest.raises(ValueError, match="vLLM, w1-decode"):
        row(run, "vLLM", "w1-decode", *samples, reason=reason)


def test_rows_in_a_history_are_a_commits_series_with_the_peers_as_lines(run, tmp_path: Path):
    """On the class of machine that commits are tracked on, at the commit; of a work tree that differs, peers alone."""
    rows = [row(run, "hotplug", "w1-decode", 2.0, 2.2), row(run, "hotplug", "w1-decode", 2.5, setting=TUNED),
            row(run, "vLLM", "w1-decode", 1.0), row(run, "vLLM", "w2-out", reason="it ended")]  # fmt: skip
    head = trees.find_commit(records.ROOT, "HEAD")
    rows = [{**one, "commit": one["commit"] and head.id} for one in rows]
    file = tmp_path / "history.sqlite"
    assert [history.keep(rows, file), history.keep(rows, file)] == [4, 0]
    with contextlib.closing(History(file)) as kept:
        (found,) = series.machines(kept.records(machine.machine_class(FACTS)), lambda values: [])
    decode = next(one for one in found.series if one.figure == "compared: w1-decode")
    assert [(c.id, c.subject) for c in found.commits] == [(head.id, head.subject)]
    assert [p.value.middle for p in decode.points] == [2.1]
    assert {p.name: p.value.middle for p in decode.peers} == {
        "hotplug Q4_1, tuned": 2.5, "vLLM Q4_1, defaults": 1.0,
    }  # fmt: skip
    changed = history.records([{**one, "commit": one["commit"] and head.id + "+"} for one in rows])
    assert [one.peer for one in changed] == ["hotplug Q4_1, tuned", "vLLM Q4_1, defaults", "vLLM Q4_1, defaults"]


def test_a_gpus_rows_are_named_after_their_model(run):
    facts = {**FACTS, "gpus": ["NVIDIA H200"]}
    (found,) = history.records([{**row(run, "vLLM", "chat", 5.0), "machine_facts": facts}])
    assert (found.figure, found.peer) == ("compared: Q4_1 chat", "vLLM defaults")


def test_rows_measured_again_take_the_place_of_the_same_engines(run, tmp_path: Path):
    file = tmp_path / "folder" / "rows.jsonl"
    merge(file, [row(run, "hotplug", "w1-decode", 1.0), row(run, "vLLM", "w1-decode", 2.0)])
    merge(file, [row(run, "vLLM", "w1-decode", 3.0)])
    assert [(r["engine"], r["samples"]) for r in read(file)] == [("hotplug", [1.0]), ("vLLM", [3.0])]


def test_a_row_without_a_key_is_refused_by_place(run, tmp_path: Path):
    good = row(run, "vLLM", "w1-decode", 1.0)
    bad = {key: value for key, value in good.items() if key != "machine"}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, (good, bad))))
    with pytest.raises(ValueError, match=r"row 2: machine missing"):
        read(tmp_path / "rows.jsonl")


# --- tables ---------------------------------------------------------------------------------------


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_the_cpus_table_has_medians_and_the_best_peer(run):
    rows = [
        row(run, "transformers", "w1-decode", 20.0), row(run, "transformers", "w1-first", 150.0, better="lower"),
        row(run, "hotplug", "w1-decode", 50.0, 60.0, 900.0), row(run, "hotplug", "w1-first", 100.0, better="lower"),
        row(run, "hotplug", "w1-decode", 999.0, setting=TUNED), row(run, "vLLM", "w1-decode", reason="it fell over"),
        row(run, "llama.cpp", "w1-decode", 30.0), row(run, "llama.cpp", "w1-first", 200.0, better="lower"),
    ]  # fmt: skip
    found = cells(tables.cpu_table(rows))
    assert found[0] == ["engine", "weights", "setting", "W1 first token, ms", "W1 tok/s"]
    assert [line[0] for line in found[2:-1]] == ["hotplug", "hotplug", "llama.cpp", "transformers"]
    assert found[2][3:] == ["100", "60"]
    assert found[-1] == ["best of the peers", "", "", "150", "30"]


def test_hotplugs_lead_is_that_of_the_rounds_in_turns_whatever_their_own_speed(run):
    """The second round ran at half the speed, for both."""
    make = {"engine": "vLLM", "weights": "float32", "setting": TUNED, "unit": "x"}
    rows = [
        run.row(**make, figure="w1-decode", better="higher", samples=[20.0, 10.0, 18.0], against=[40.0, 20.0, 40.0]),
        run.row(**make, figure="w1-first", better="lower", samples=[200.0, 400.0], against=[100.0, 200.0]),
        run.row(**make, figure="start", better="lower", samples=[90.0], against=[2.0, 4.0]),
        row(run, "hotplug", "w1-decode", 40.0),
    ]  # fmt: skip
    [title, _, *lines] = cells(tables.lead_table(rows))
    assert title[3:] == ["W1 first token", "W1 tok/s", "start"]
    assert lines == [["vLLM", "float32", TUNED, "2.00x", "2.00x", "30.00x"]]


def test_rows_that_were_measured_while_others_took_cores_are_marked(run):
    rows = [run.row(engine=engine, weights="F16", setting=TUNED, figure="w1-decode", unit="tok/s", better="higher",
                    samples=[1.0], against=[2.0], others=others)
            for engine, others in (("llama.cpp", 0.9), ("vLLM", 0.1), ("transformers", None))]  # fmt: skip
    for table in (tables.cpu_table, tables.lead_table):
        settings = {line[0]: line[2] for line in cells(table(rows))[2:]}
        assert [settings[name] for name in ("llama.cpp", "vLLM", "transformers")] == ["tuned (disturbed)", TUNED, TUNED]


def test_what_was_not_run_is_listed_once_with_its_reason(run):
    rows = [row(run, "vLLM", figure, reason="it fell | over") for figure in ("w1-decode", "w2-out")]
    listed = tables.not_run([*rows, row(run, "hotplug", "w1-decode", 1.0)])
    assert listed.count("vLLM Q4_1, defaults") == 1 and "it fell \\| over" in listed
    assert all(absent.name in listed and absent.reason in listed for absent in NOT_RUN)
    assert "hotplug" not in listed


def test_the_models_table_has_the_ratio_the_right_way_round(run):
    rows = [
        row(run, "hotplug", "decode1", 4.0, weights="M", better="lower"),
        row(run, "hotplug", "mixed", 1200.0, weights="M"),
        row(run, "vLLM", "decode1", 5.0, weights="M", better="lower"), row(run, "vLLM", "mixed", 1000.0, weights="M"),
        row(run, tables.ROOFLINE, "mixed", 2000.0, weights="M"),
    ]  # fmt: skip
    found = cells(tables.model_table(rows))
    assert found[0] == ["model", "workload", "hotplug", "vLLM", "ratio", "roofline"]
    assert found[2:] == [["M", "decode1", "4.00 tok/s", "5.00", "1.25x", "-"],
                         ["M", "mixed", "1,200 tok/s", "1,000", "1.20x", "2,000"]]  # fmt: skip


def test_settings_are_told_apart_where_there_are_several(run):
    rows = [row(run, "hotplug", "chat", v, weights="M", setting=s) for v, s in ((1.0, DEFAULTS), (2.0, TUNED))]
    assert [line[2] for line in cells(tables.model_table(rows))[2:]] == [DEFAULTS, TUNED]


def test_the_table_of_loads_has_a_line_a_load_and_server(run):
    servers = (("hotplug", DEFAULTS), ("hotplug", "`--frontends 4`"), ("vLLM", DEFAULTS))
    values = {"out tok/s": 4586.0, "first token p50": 4.75, "first token p99": 55.0, "gap p99": 29.0}
    rows = [row(run, engine, f"{rate} /s: {name}", value, weights="M", setting=setting)
            for rate in (20, 60) for engine, setting in servers for name, value in values.items()]  # fmt: skip
    found = cells(tables.load_table(rows))
    assert len(found) == 2 + 6
    assert found[3] == ["M", "20 /s", "hotplug, `--frontends 4`", "4,586", "4.8 / 55", "- / 29"]


# --- the documentation ----------------------------------------------------------------------------


def test_the_tables_in_the_documentation_are_what_the_kept_rows_give():
    assert pages.stale() == [], "run `make bench-tables`"


def test_every_table_stands_on_a_page_and_every_kept_row_is_whole():
    text = "".join(page.read_text() for page in pages.PAGES)
    assert [name for name in pages.TABLES if f"<!-- begin: {name} -->" not in text] == []
    files = sorted(records.RESULTS.glob("*.jsonl"))
    assert files and all(read(file) for file in files)
    assert sum(file.stat().st_size for file in files) < 300_000


def test_prose_outside_the_markers_stays(monkeypatch):
    monkeypatch.setitem(pages.TABLES, "one", lambda: "| new |")
    page = "before\n<!-- begin: one -->\n| old |\n<!-- end: one -->\nafter\n"
    assert pages.written(page) == page.replace("old", "new")


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- begin: none -->\n<!-- end: none -->", "no table is named none"),
        ("<!-- begin: cpu-engines -->\n", "no end"),
    ],
)
def test_a_marker_that_is_wrong_is_an_error(page, message):
    with pytest.raises(ValueError, match=message):
        pages.written(page)


def test_a_stale_page_fails_the_check_and_is_written(monkeypatch, tmp_path: Path, run, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- begin: cpu-engines -->\nold\n<!-- end: cpu-engines -->\n")
    measured = tmp_path / "cpu.jsonl"
    merge(measured, [row(run, "hotplug", "w1-decode", 61.0)])
    monkeypatch.setattr(pages, "PAGES", (page,))
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    for module in (pages, write_tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    arguments = ["write_tables.py", "--keep", str(measured)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--check"])
    with pytest.raises(SystemExit, match="make bench-tables"):
        write_tables.main()
    monkeypatch.setattr(sys, "argv", arguments)
    write_tables.main()
    assert "| hotplug | Q4_1 | defaults | 61 |" in page.read_text()
    monkeypatch.setattr(sys, "argv", [*arguments, "--check"])
    write_tables.main()


# --- measuring ------------------------------------------------------------------------------------


def test_each_row_of_an_engine_gets_its_form_of_the_weights():
    found = {(e.weights, e.setting): e.peer for engine in engines([0, 1]) for e in measure.entries(engine, Path("/m"))
             if engine.name in ("hotplug", "vLLM", "llama.cpp")}  # fmt: skip
    assert found["Q4_0", TUNED].options["model"] == "/m/Q4_0/model.gguf"
    assert found["bfloat16", TUNED].options["model"] == "/m/hf"
    assert found["bfloat16", TUNED].variables["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    ours = measure.entries(engines([0])[0], Path("/m"))
    assert ours[0].peer.options == {"model": "/m/Q4_1/model.gguf"}
    assert ours[-1].peer.options == {"model": "/m/Q4_1/model.gguf", "dtype": "float32", "quantization": "none"}


def test_holding_to_an_instruction_set_keeps_the_settings_variables():
    vllm = next(engine for engine in engines([0]) if engine.name == "vLLM")
    variables = measure.entries(vllm, Path("/m"), "avx2")[0].peer.variables
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "1" and variables["ONEDNN_MAX_CPU_ISA"] == "AVX2"


@pytest.fixture
def tiny(tiny_model: Path) -> measure.Entry:
    options = {"model": str(tiny_model), "load_format": "dummy", "kv_cache_memory": "64MiB", "device": "cpu"}
    return measure.Entry("hotplug", "Q4_1", DEFAULTS, measure.Peer("hotplug", "hotplug", "", options))


def test_an_engine_and_the_reference_are_measured_in_turns_and_failures_have_their_reason(tiny, run, monkeypatch):
    ours = engines([0])[0]
    peer = replace(ours, name="peer", module="other")
    wanted = [replace(tiny, engine="peer", values={}), replace(tiny, engine="peer", weights="broken", values={}),
              replace(tiny, engine="peer", weights="absent", values={})]  # fmt: skip
    wanted[1].peer = replace(tiny.peer, options={"model": "/nowhere"})
    wanted[2].peer = replace(tiny.peer, environment="no-such-peer")
    source = Source(lambda text: [5 + len(word) % 200 for word in text.split(" ")])
    rows = measure.Bench(run, source, lambda: replace(tiny, values={}), repeat=2, starts=0, seconds=0.0).measure(
        peer, wanted
    )
    by = {(r["weights"], r["figure"]): r for r in rows}
    assert len(by) == 3 * len(measure.FIGURES)
    for figure in measure.FIGURES:
        samples = by["Q4_1", figure]["samples"]
        assert len(samples) == (1 if figure in ("start", "rss") else 2) and min(samples) > 0
        assert len(by["Q4_1", figure]["against"]["samples"]) == len(samples)
        assert "ended with code 1" in by["broken", figure]["not_measured"]
        assert "make bench-peers" in by["absent", figure]["not_measured"]
    assert len(by["Q4_1", "w1-decode"]["plan_hash"]) == 16
