"""One side of a comparison: a tree's processes of one family, asked for one small measurement at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from track.load import Load
from track.probes.places import CannotError
from track.trees import Tree

BENCH = Path(__file__).parents[1]


class Side(Protocol):
    plan_hash: str | None

    def measure(self, probe: str, core: int | None = None) -> dict[str, float]:
        """Run a probe once: values of its figures, in their units. Raises CannotError.

        `core` is the only one that the thread, or the process that is started for it, may use.
        """
        ...

    def close(self) -> None:
        """End its processes."""
        ...


@dataclass(frozen=True)
class Models:
    """What the probes run: folders or names that `--model` takes."""

    real: str
    null: str
    """For the device that computes nothing."""


def open_side(tree: Tree, family: str, models: Models) -> Side:
    """Start a family's processes in a tree, ready when it returns. Raises CannotError."""
    if family == "http":
        return ServerSide(tree, models)
    if family == "start":
        return StartSide(tree, models)
    return WorkerSide(tree, family, models)


def environment(tree: Path, null_folder: Path) -> dict[str, str]:
    """Variables of a process that imports hotplug and the null device from `tree`, and probes from this checkout."""
    example = tree / "examples" / "null-device"
    if (example / "pyproject.toml").exists():
        _install(example, null_folder)
    path = [tree, null_folder, example, BENCH]
    own = {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONHASHSEED": "0", "NULL_DEVICE_STEP_MS": "0",
           "NULL_DEVICE_TOKEN_US": "0", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    return {**os.environ, **own}


def _install(example: Path, folder: Path) -> None:
    """Write to `folder` what an installed distribution of the example would have: its name and entry points."""
    project = tomllib.loads((example / "pyproject.toml").read_text())["project"]
    info = folder / f"null_device-{project['version']}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


class _Processes:
    """What every side has: a scratch folder, an environment, a log."""

    plan_hash: str | None = None

    def __init__(self, tree: Tree) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="hotplug-track-")
        self.environment = environment(tree.path, Path(self._scratch.name))
        self.tree = tree
        self.log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the side)

    def last_words(self) -> str:
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"

    def close(self) -> None:
        self.log.close()
        self._scratch.cleanup()


class WorkerSide(_Processes):
    """A process that holds engines or kernels (`track.probes.worker`)."""

    def __init__(self, tree: Tree, family: str, models: Models) -> None:
        super().__init__(tree)
        options = {"family": family, "model": models.real, "null_model": models.null}
        command = [sys.executable, "-m", "track.probes.worker", family, json.dumps(options)]
        self._process = subprocess.Popen(command, cwd=tree.path, env=self.environment, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=self.log, text=True)  # fmt: skip
        try:
            self.plan_hash = self._answer().get("plan_hash")
        except CannotError:
            self.close()
            raise

    def measure(self, probe: str, core: int | None = None) -> dict[str, float]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(probe + ("" if core is None else f" {core}") + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise CannotError(f"the process has ended: {self.last_words()}") from None
        values: dict[str, float] = self._answer()["values"]
        return values

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise CannotError(f"the process ended with {self._process.wait()}: {self.last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "cannot" in answer:
            raise CannotError(answer["cannot"])
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        super().close()


class StartSide(_Processes):
    """Starts of a process that ends after its first token (`track.probes.start`)."""

    def __init__(self, tree: Tree, models: Models) -> None:
        super().__init__(tree)
        self._command = [sys.executable, "-m", "track.probes.start", models.real]

    def measure(self, probe: str, core: int | None = None) -> dict[str, float]:
        command = [*self._command, *([] if core is None else [str(core)])]
        begin = time.perf_counter()
        process = subprocess.Popen(command, cwd=self.tree.path, env=self.environment, stdout=subprocess.PIPE,
                                   stderr=self.log, text=True)  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - begin
        process.stdout.close()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if not line:
            raise CannotError(f"the process ended with {process.returncode}: {self.last_words()}")
        if probe == "start-cpu":
            return {"start-cpu": usage.ru_utime + usage.ru_stime}
        return {"start": seconds, "rss": json.loads(line)["rss_mib"]}


class ServerSide(_Processes):
    """`hotplug serve` on the null device, and the load on it, which is in this process."""

    ARGUMENTS: Sequence[str] = (
        "--load-format", "dummy", "--served-model-name", "bench", "--device", "null_device", "--max-num-seqs", "64",
        "--max-model-len", "4096", "--kv-cache-memory", "1GiB", "--no-enable-prefix-cache",
    )  # fmt: skip

    def __init__(self, tree: Tree, models: Models) -> None:
        from served import Served

        super().__init__(tree)
        try:
            self._served = Served(models.null, *self.ARGUMENTS, log=self.log, environment=self.environment)
        except RuntimeError as e:
            reason = f"{e}: {self.last_words()}"
            super().close()
            raise CannotError(reason) from e
        self._load = Load(self._served.url)

    def measure(self, probe: str, core: int | None = None) -> dict[str, float]:
        try:
            return {probe: self._load.tokens_a_second() if probe == "stream" else self._load.first_token_ms()}
        except (OSError, EOFError, ValueError) as e:
            raise CannotError(f"{type(e).__name__}: {e}") from e

    def close(self) -> None:
        self._load.close()
        self._served.stop()
        super().close()
