"""The tool around the measurements: trees of commits, turns, the history, verdicts and exit statuses.

Most tests measure stand-ins: a commit's file `speed.json` says which values its probes give.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from track import __main__ as tool
from track import compare, detect, machine, records, sides, suite, trees
from track.compare import Bench
from track.probes.places import CannotError
from track.probes.worker import MODULES
from track.sides import Models
from track.store import History

FIGURES = ("loop-64", "loop-256", "stream")
MODELS = Models("none", "none")


class StandIn:
    """Values of `speed.json`, with a little noise; null stands for a probe that cannot be run."""

    plan_hash = "plan"
    opened: list[str]
    taken: list[tuple[str, str]]

    def __init__(self, tree: trees.Tree, family: str, models: Models) -> None:
        self._role = tree.path.name.split("-")[0]
        self._speed = json.loads((tree.path / "speed.json").read_text())
        if family in self._speed.get("broken", ()):
            raise CannotError("the family does not start")
        name = f"{family} {self._role}"
        # Each process has a bias of its own, and a test's draws are the same in every run.
        self._draw = random.Random(f"{name} {StandIn.opened.count(name)}")
        self._bias = self._draw.gauss(0, 0.004)
        StandIn.opened.append(name)

    def measure(self, probe: str, core: int | None = None) -> dict[str, float]:
        StandIn.taken.append((probe, self._role))
        if self._speed[probe] is None:
            raise CannotError("there is no such kernel")
        return {probe: self._speed[probe] * (1 + self._bias + self._draw.gauss(0, 0.003))}

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    StandIn.opened, StandIn.taken = [], []
    monkeypatch.setattr(compare, "PAUSE", 0.0)  # stand-ins have no threads that have to fall asleep


class Repository:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.git("init", "-q", "-b", "main")

    def git(self, *arguments: str) -> str:
        own = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", "-C", str(self.folder), *own, *arguments], check=True, capture_output=True,
                              text=True).stdout.strip()  # fmt: skip

    def commit(self, subject: str, **speed: Any) -> str:
        values = {"loop-64": 0.25, "loop-256": 0.6, "stream": 20_000.0, **speed}
        (self.folder / "speed.json").write_text(json.dumps(values))
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", subject)
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    (tmp_path / "repository").mkdir()
    return Repository(tmp_path / "repository")


Use = Callable[..., int]


@pytest.fixture
def use(repository: Repository, tmp_path: Path) -> Use:
    """Runs the tool in the repository with these arguments; returns its exit status."""

    def run(*arguments: str) -> int:
        options = tool.parser().parse_args(["--figures", *FIGURES, "--quick", *arguments])
        history = History(tmp_path / "history.sqlite")
        bench = Bench(MODELS, options.quick, StandIn)
        try:
            return tool.Tool(options, history, bench, repository.folder, tmp_path / "cache").run()
        finally:
            history.close()

    return run


def stored(tmp_path: Path) -> list[records.Record]:
    history = History(tmp_path / "history.sqlite")
    try:
        return history.records()
    finally:
        history.close()


def test_a_slower_commit_is_found_and_named_and_ends_with_1(repository: Repository, use: Use, capsys) -> None:
    fast = repository.commit("fast")
    assert use("--noise", "10") == 0
    slow = repository.commit("slow", **{"loop-256": 0.6 * 1.05})
    assert use("--base", fast, "--head", slow, "--check") == 1
    told = capsys.readouterr().out
    assert "worse: loop-256\n" in told and slow[:12] in told
    (row,) = [line for line in told.splitlines() if line.startswith("| loop-256") and "worse" in line]
    assert "1.05" in row or "1.04" in row
    assert use("--base", slow, "--head", fast, "--check") == 0
    assert "| better" in capsys.readouterr().out
    assert use("--base", fast, "--head", slow) == 0  # a regression is told, and fails nothing unasked


def test_a_commit_beside_itself_raises_no_alarm(repository: Repository, use: Use) -> None:
    same = repository.commit("same")
    use("--noise", "10")
    assert [use("--base", same, "--head", same, "--check") for _ in range(10)] == [0] * 10


def test_what_stands_out_is_measured_again_by_fresh_processes_and_alone(repository: Repository, use: Use) -> None:
    fast = repository.commit("fast")
    use("--noise", "5")
    slow = repository.commit("slow", stream=15_000.0)
    StandIn.opened = []
    use("--base", fast, "--head", slow)
    assert sorted(StandIn.opened) == sorted(
        ["loop base", "loop head", "http base", "http head", "http base", "http head"]
    )


def test_trees_take_turns_and_pairs_are_kept_as_they_were_taken(
    repository: Repository, use: Use, tmp_path: Path
) -> None:
    one = repository.commit("one")
    use("--base", one, "--head", one)
    turns = [role for probe, role in StandIn.taken if probe == "stream"][4:]  # those that warm up are first
    assert turns[:8] == ["base", "head", "head", "base", "head", "base", "base", "head"]
    quads = next(probe.quick for probe in suite.PROBES if probe.name == "stream")
    assert len(turns) == 4 * quads
    (record,) = [r for r in stored(tmp_path) if r.figure == "stream"]
    assert record.against is not None and len(record.samples) == len(record.against.samples) == 2 * quads
    assert record.plan_hash == "plan" and record.machine == machine.machine_class(machine.facts())


@pytest.mark.parametrize(
    ("placement", "cores", "expected"),
    [
        ("apart", {4, 7}, [("base", 4), ("head", 7), ("head", 4), ("base", 7)]),
        ("shared", {4, 7}, [("base", 4), ("head", 4), ("head", 7), ("base", 7)]),
        ("shared", {4}, [("base", 4), ("head", 4), ("head", 4), ("base", 4)]),
        ("apart", {4}, [("base", None), ("head", None), ("head", None), ("base", None)]),
        ("turns", {4, 7}, [("base", None), ("head", None), ("head", None), ("base", None)]),
    ],
)
def test_each_tree_gets_each_core_once(
    placement: Any, cores: set[int], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = {"shared": 2, "apart": len(cores)}.get(placement, 1)
    together = threading.Barrier(at_once, timeout=20)
    asked = []

    class One:
        plan_hash = None

        def __init__(self, role: str) -> None:
            self.role = role

        def measure(self, probe: str, core: int | None = None) -> dict[str, float]:
            together.wait()
            asked.append((self.role, core))
            return {self.role: 1.0}

        def close(self) -> None:
            pass

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
    probe = suite.Probe("start", "start", (), 1, 1, placement)
    order = ["base", "head", "head", "base"]
    found = Bench(MODELS)._run([One(role) for role in order], probe)
    assert [list(values) for values in found] == [[role] for role in order]
    assert sorted(asked, key=str) == sorted(expected, key=str)


def test_without_a_noise_floor_nothing_is_judged_and_the_way_to_one_is_told(
    repository: Repository, use: Use, capsys
) -> None:
    fast, slow = repository.commit("fast"), repository.commit("slow", stream=10_000.0)
    assert use("--base", fast, "--head", slow, "--check") == 0
    told = capsys.readouterr().out
    assert "not judged" in told and "--noise 10" in told


def test_what_an_older_tree_cannot_give_is_recorded_with_the_reason(
    repository: Repository, use: Use, tmp_path: Path
) -> None:
    old = repository.commit("old", **{"loop-256": None, "broken": ["http"]})
    new = repository.commit("new")
    assert use("--base", old, "--head", new) == 0
    found = {r.figure: r for r in stored(tmp_path)}
    assert found["loop-256"].not_measured == "on base: there is no such kernel"
    assert found["stream"].not_measured == "on base: the family does not start"
    assert found["loop-64"].samples and found["loop-64"].not_measured is None


def test_a_history_of_the_last_commits_is_filled_once_beside_the_oldest(
    repository: Repository, use: Use, tmp_path: Path
) -> None:
    commits = [repository.commit(f"commit {i}") for i in range(4)]
    repository.git("checkout", "-q", "-b", "side", commits[1])
    repository.commit("on the side")
    repository.git("checkout", "-q", "main")
    repository.git("merge", "-q", "-s", "ours", "-m", "merged", "side")
    assert use("--last", "3") == 0
    merged = repository.git("rev-parse", "HEAD")
    found = stored(tmp_path)
    assert list(dict.fromkeys(r.commit for r in found)) == [*commits[2:], merged]
    assert {r.against.commit for r in found if r.against is not None} == {commits[2]}
    assert found[-1].subject == "merged" and found[-1].parent == commits[3]
    use("--last", "3")
    assert len(stored(tmp_path)) == len(found)


def test_files_as_they_are_stand_for_a_commit_that_no_branch_has(repository: Repository, tmp_path: Path) -> None:
    head = repository.commit("head")
    assert trees.find_commit(repository.folder, trees.WORK_TREE).id == head
    (repository.folder / "new.txt").write_text("new")
    (repository.folder / ".gitignore").write_text("ignored\n")
    (repository.folder / "ignored").write_text("")
    commit = trees.find_commit(repository.folder, trees.WORK_TREE)
    assert commit.parent == head and "not committed" in commit.subject
    with trees.laid_out(repository.folder, tmp_path / "cache", commit, "head") as tree:
        assert (tree.path / "new.txt").read_text() == "new" and not (tree.path / "ignored").exists()
    assert not tree.path.exists()
    assert repository.git("diff", "--cached") == "" and repository.git("log", "--all", "--format=%H") == head


def test_a_native_library_is_built_once_for_the_same_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a builder that writes how often it was called."""
    for name in ("a", "b"):
        source = tmp_path / name / trees.NATIVE / "src"
        source.mkdir(parents=True)
        (source / "one.cpp").write_text("int one;")
        (source.parent / "build.py").write_text(
            "import pathlib, sys\ncount = pathlib.Path(sys.argv[3]).parent / 'count'\n"
            "count.write_text(count.read_text() + 'x' if count.exists() else 'x')\n"
            "pathlib.Path(sys.argv[3]).write_text('built')"
        )
    cache = tmp_path / "cache"
    first = trees.provide_native(tmp_path / "a", cache)
    assert trees.provide_native(tmp_path / "b", cache) == first
    assert (cache / "count").read_text() == "x"
    assert (tmp_path / "b" / trees.NATIVE / trees.LIBRARY).read_text() == "built"
    (tmp_path / "b" / trees.NATIVE / "src" / "one.cpp").write_text("int two;")
    assert trees.provide_native(tmp_path / "b", cache) != first
    assert trees.provide_native(tmp_path, cache) == ""


def test_an_unknown_commit_or_figure_is_refused_by_name(tmp_path: Path, capsys) -> None:
    own = ["--history", str(tmp_path / "h.sqlite")]
    assert tool.main([*own, "--base", "no-such-commit", "--figures", "loop-64"]) == tool.UNUSABLE
    assert "no-such-commit" in capsys.readouterr().err
    assert tool.main([*own, "--figures", "lop"]) == tool.UNUSABLE
    assert "'lop'" in capsys.readouterr().err


def test_the_history_goes_out_as_json_lines_and_comes_back_once(
    repository: Repository, use: Use, tmp_path: Path
) -> None:
    one = repository.commit("one", **{"loop-64": None})
    use("--base", one, "--head", one)
    lines, other = tmp_path / "lines.jsonl", tmp_path / "other.sqlite"
    assert tool.main(["--history", str(tmp_path / "history.sqlite"), "--export", str(lines)]) == 0
    assert len(lines.read_text().splitlines()) == len(FIGURES)
    for _ in range(2):
        assert tool.main(["--history", str(other), "--import", str(lines)]) == 0
    history = History(other)
    assert history.records() == stored(tmp_path) == records.read(lines)
    history.close()
    lines.write_text("{}\n")
    assert tool.main(["--history", str(other), "--import", str(lines)]) == tool.UNUSABLE


def test_names_of_figures_and_families_are_those_that_workers_know() -> None:
    names = [figure.name for probe in suite.PROBES for figure in probe.figures]
    assert len(names) == len(set(names))
    assert set(suite.FAMILIES) == set(MODULES) | {"http", "start"}
    assert [p.name for p in suite.PROBES if p.family.startswith("gpu-")] != []
    assert not any(p.family.startswith("gpu-") for p in suite.select([], gpu=False))
    assert sum(p.family.startswith("gpu-") for p in suite.select([], gpu=True)) == 6


def test_a_machine_class_is_of_the_processor_and_its_size() -> None:
    facts = machine.facts()
    assert facts["cores"] >= 1 and facts["memory_gib"] >= 1 and facts["cpu"]
    assert machine.machine_class(facts) == machine.machine_class(machine.facts())
    assert machine.machine_class({**facts, "cores": facts["cores"] + 1}) != machine.machine_class(facts)


def test_a_process_of_this_tree_measures_the_loop_and_says_what_it_cannot(smollm2_path: Path, tmp_path: Path) -> None:
    from host_engines.model import write_config

    write_config(tmp_path)
    commit = trees.Commit("0" * 40, datetime(2026, 1, 1, tzinfo=UTC), "", None)
    tree = trees.Tree(tool.ROOT, commit, "")
    side = sides.open_side(tree, "loop", Models("none", str(tmp_path)))
    try:
        assert 0.01 < side.measure("loop-64")["loop-64"] < 50
        with pytest.raises(CannotError, match="KeyError"):
            side.measure("no-such-probe")
        assert 0.01 < side.measure("loop-64")["loop-64"] < 50
    finally:
        side.close()
    with pytest.raises(CannotError):
        sides.open_side(tree, "cpu", Models(str(tmp_path / "no-model"), "none"))


def test_cells_of_the_gpu_are_those_of_its_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the engine: a workload's time becomes its figure, with another seed each time."""
    import gpu as cells
    from track.probes import gpu

    class Core:
        plan_hash = "gpu-plan"

        def __init__(self, config: Any) -> None:
            self.config = config

    asked = []

    def run(core: Core, workload: str, seed: int) -> float:
        asked.append((workload, seed))
        return 2.0

    parts = {"EngineConfig": lambda **options: options, "EngineCore": Core}
    monkeypatch.setattr(gpu, "find", lambda name, *places: parts[name])
    monkeypatch.setattr(cells, "run", run)
    for probe in suite.PROBES:
        if probe.family.startswith("gpu-"):
            made = gpu.start({"family": probe.family})
            assert made.plan_hash == "gpu-plan" and made._core.config["device"] == "cuda"
            assert made.measure(probe.name).keys() == {probe.name} == made.measure(probe.name).keys()
    one = gpu.start({"family": "gpu-llama8b"})
    assert one.measure("gpu-llama8b-decode1") == {"gpu-llama8b-decode1": pytest.approx(2e3 / 256)}
    assert {workload for workload, _ in asked} == {"decode1", "decode64", "prefill", "mixed"}
    assert {seed for _, seed in asked} == {0, 1}


def test_the_threshold_is_of_the_figures_that_were_measured() -> None:
    assert detect.threshold(10, 3) < detect.threshold(10, 16)


def test_the_command_line_runs_the_checkouts_tool(tmp_path: Path) -> None:
    own = ["--history", str(tmp_path / "history.sqlite"), "--figures", "no-such-figure"]
    done = command("track", *own, folder=tmp_path)
    assert done.returncode == tool.UNUSABLE and "'no-such-figure'" in done.stderr
    assert "--noise RUNS" in command("track", "--help", folder=tmp_path).stdout


def test_without_a_checkout_the_command_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hotplug.cli import bench_track
    from hotplug.core.errors import ConfigError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_track.hotplug, "__file__", str(tmp_path / "site-packages" / "hotplug" / "__init__.py"))
    with pytest.raises(ConfigError, match="Clone the repository"):
        bench_track.checkout()
    monkeypatch.chdir(tool.ROOT / "docs")
    assert bench_track.checkout() == tool.ROOT


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "hotplug.cli", "bench", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(tool.ROOT)}
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("content", [b"garbage", b"SQLite format 3\0" + b"x" * 4000])
def test_a_file_that_is_no_history_is_an_error_that_names_it(tmp_path: Path, capsys, content: bytes):
    file = tmp_path / "history.sqlite"
    file.write_bytes(content)
    assert tool.main(["--history", str(file), "--export", str(tmp_path / "out")]) == tool.UNUSABLE
    assert f"{file} is no history" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--noise", "--last"])
@pytest.mark.parametrize("number", ["0", "-3", "x"])
def test_a_number_of_runs_is_at_least_one(tmp_path: Path, option: str, number: str):
    with pytest.raises(SystemExit):
        tool.main(["--history", str(tmp_path / "history.sqlite"), option, number])
