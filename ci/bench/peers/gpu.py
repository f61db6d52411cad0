"""Measures hotplug and vLLM on one GPU, one after the other for each model, setting and way in.

Both do not fit on a device at once at the memory that they take by default, so an engine is started, given all its
cells, and ended before the next. What cannot be measured becomes a row with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_workloads import MODELS, WORKLOADS, model_folder

from peers import load
from peers.chat_load import Asked, batch
from peers.gpu_settings import offline_options, server_command
from peers.records import ROOT, Row, Run
from peers.servers import MODEL, CannotError, served, with_path
from peers.settings import GPU_NOT_RUN
from peers.tables import markdown

ENGINES = ("hotplug", "vLLM")
CHAT, HTTP = "chat", "http"
CHAT_REQUESTS, TINY_REQUESTS, TINY_TOKENS, TINY_VOCABULARY = 500, 8, 12, 256
TINY_MODEL = {
    **MODELS["llama1b"], "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 49152, "torch_dtype": "float32",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PER_TOKEN = ("decode1",)
"""Workloads of one request, told in milliseconds a token."""
WHOLE = ("long8", "one20k")
"""Workloads told in seconds."""
LOAD_UNITS = {"out tok/s": ("tok/s", "higher"), "tokens an event": ("tokens", "lower")}
"""Of the figures of a load; others are milliseconds, the fewer the better."""


@dataclass(frozen=True)
class Cells:
    """A model and what is measured of it."""

    model: str
    names: tuple[str, ...]
    tiny: bool = False

    @classmethod
    def parse(cls, text: str, tiny: bool = False) -> Cells:
        """From `MODEL` or `MODEL:CELL,...`. Raises ValueError where one is not known."""
        model, _, names = text.partition(":")
        if model not in MODELS and not tiny:
            raise ValueError(f"no model is named {model}; there are {', '.join(MODELS)}")
        found = tuple(names.split(",")) if names else (CHAT, HTTP)
        if unknown := [name for name in found if name not in (CHAT, HTTP, *WORKLOADS)]:
            raise ValueError(f"no cell is named {unknown[0]}; there are {', '.join((CHAT, HTTP, *WORKLOADS))}")
        return cls(model, found, tiny)

    @property
    def offline(self) -> list[str]:
        return [name for name in self.names if name != HTTP]

    @property
    def context(self) -> int:
        """Tokens that a request may have."""
        if self.tiny:
            return 256
        return 33024 if set(self.names) & set(WHOLE) else 8192

    def requests(self, cell: str, seed: int) -> list[Asked]:
        """The batch of a cell; another seed has the same lengths and other token ids."""
        if cell == CHAT:
            return (batch(TINY_REQUESTS, seed, TINY_TOKENS, TINY_VOCABULARY) if self.tiny
                    else batch(CHAT_REQUESTS, seed))  # fmt: skip
        workload = WORKLOADS[cell]
        return [Asked(0.0, prompt, workload.outputs) for prompt in workload.prompts(cell, seed)]


def figure(cell: str, requests: Sequence[Asked], seconds: float) -> tuple[float, str, str]:
    """What a batch that took so long is worth: value, unit, which is better."""
    outputs = sum(asked.outputs for asked in requests)
    if cell in PER_TOKEN:
        return seconds * 1e3 / outputs, "ms/token", "lower"
    if cell in WHOLE:
        return seconds, "s", "lower"
    if cell == "prefill":
        return sum(len(asked.prompt) for asked in requests) / seconds, "in tok/s", "higher"
    return outputs / seconds, "out tok/s", "higher"


class OfflineProcess:
    """`offline.py` with an engine. Raises CannotError, with its last words, where it ends instead of answering."""

    def __init__(self, engine: str, python: str, environment: dict[str, str], options: dict[str, Any]) -> None:
        self._engine = engine
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - read where the process ends
        self._process = subprocess.Popen(
            [python, str(Path(__file__).parent / "offline.py"), engine, json.dumps(options)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            first = self._read()
        except CannotError:
            self.stop()
            raise
        self.about: str = first["about"]
        self.plan_hash: str | None = first["plan_hash"]
        self.start_seconds: float = first["start_seconds"]

    def seconds(self, requests: Sequence[Asked]) -> float:
        """What a batch takes, all of its tokens counted. Raises CannotError where some are missing."""
        wanted = [asked.outputs for asked in requests]
        assert self._process.stdin is not None
        self._process.stdin.write(
            json.dumps({"prompts": [asked.prompt for asked in requests], "outputs": wanted}) + "\n"
        )
        self._process.stdin.flush()
        answer = self._read()
        if answer["tokens"] != wanted:
            raise CannotError(f"{self._engine} gave {sum(answer['tokens'])} tokens of {sum(wanted)}")
        seconds: float = answer["seconds"]
        return seconds

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            words = [text.strip() for text in self._log.read().splitlines() if text.strip()]
            raise CannotError(f"{self._engine} ended with {code}: {words[-1][:200] if words else 'it said nothing'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # engines have processes of their own
        self._process.wait()


class Bench:
    """One run: every model, setting and engine."""

    def __init__(self, run: Run, options: argparse.Namespace) -> None:
        """Options: those of `compare_gpu.py`."""
        self._run, self._options = run, options
        self._rows: list[Row] = []

    def measure(self, cells: Iterable[Cells]) -> list[Row]:
        for one in cells:
            folder = str(self._model(one))
            for setting in self._options.settings:
                for engine in ENGINES:
                    if one.offline:
                        self._offline(engine, one, folder, setting)
                for engine in ENGINES:
                    if HTTP in one.names:
                        self._http(engine, one, folder, setting)
        return self._rows

    def _model(self, cells: Cells) -> Path:
        """The model's folder: config and tokenizer, no weights."""
        if cells.tiny:
            folder = Path(tempfile.gettempdir()) / "hotplug-bench-models" / "tiny"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(TINY_MODEL))
        else:
            folder = model_folder(cells.model)
        if self._options.tokenizer is None:
            from reference_model import write_tokenizer

            from hotplug.core.weights.source import resolve

            write_tokenizer(resolve("smollm2"), folder)
        else:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (folder / name).write_bytes((self._options.tokenizer / name).read_bytes())
        return folder

    def _where(self, engine: str) -> tuple[str, dict[str, str]]:
        """The interpreter and the environment that have an engine."""
        if engine == "hotplug":
            return sys.executable, with_path(str(ROOT))
        o = self._options
        apart = o.vllm_site or o.vllm_python != sys.executable  # then no package of hotplug's may hide one of vLLM's
        environment = {**os.environ, **({"PYTHONPATH": o.vllm_site} if apart else {})}
        if o.dry_run:
            environment["VLLM_CPU_KVCACHE_SPACE"] = "1"
        return o.vllm_python, environment

    def _offline(self, engine: str, cells: Cells, folder: str, setting: str) -> None:
        process = None
        try:
            python, environment = self._where(engine)
            options = offline_options(engine, folder, cells.context, setting, cells.tiny)
            process = OfflineProcess(engine, python, environment, options)
            self._add(engine, cells, setting, "start", "s", "lower", [process.start_seconds], process)
            for cell in cells.offline:
                seconds = [process.seconds(cells.requests(cell, seed)) for seed in range(self._options.repeat + 1)][1:]
                values = [figure(cell, cells.requests(cell, 1), one) for one in seconds]
                _, unit, better = values[0]
                self._add(engine, cells, setting, cell, unit, better, [value for value, _, _ in values], process)
        except (CannotError, OSError) as e:
            done = {row["figure"] for row in self._rows
                    if (row["engine"], row["weights"], row["setting"]) == (engine, cells.model, setting)}  # fmt: skip
            for cell in cells.offline:
                if cell not in done:
                    _, unit, better = figure(cell, cells.requests(cell, 0), 1.0)
                    self._add(engine, cells, setting, cell, unit, better, [], process, str(e))
        finally:
            if process is not None:
                process.stop()

    def _http(self, engine: str, cells: Cells, folder: str, setting: str) -> None:
        o = self._options
        small = {"most": TINY_TOKENS, "vocabulary": TINY_VOCABULARY} if cells.tiny else {}
        left = [f"{rate:g} requests/s, chat lengths" for rate in o.rates]
        try:
            python, environment = self._where(engine)
            command = server_command(engine, python, folder, cells.context, setting, cells.tiny)
            with served(command, environment) as (url, seconds):
                print(f"{engine}'s server generated its first token after {seconds:.1f} s", file=sys.stderr, flush=True)
                warm_up = load.run(
                    url, "bench", o.rates[0], min(5.0, o.seconds), seed=1, processes=o.processes, **small
                )
                load.load_figures(warm_up)
                for rate in o.rates:
                    found = load.load_figures(load.run(url, MODEL, rate, o.seconds, processes=o.processes, **small))
                    for name, value in found.items():
                        unit, better = LOAD_UNITS.get(name, ("ms", "lower"))
                        self._add(engine, cells, setting, f"{left[0]}: {name}", unit, better, [value])
                    left.pop(0)
        except (CannotError, RuntimeError, OSError) as e:
            for rate in left:
                self._add(engine, cells, setting, f"{rate}: out tok/s", "tok/s", "higher", [], None, str(e))

    def _add(self, engine: str, cells: Cells, setting: str, name: str, unit: str, better: str, samples: list[float],
             process: OfflineProcess | None = None, reason: str | None = None) -> None:  # fmt: skip
        self._rows.append(self._run.row(
            engine=engine, weights=cells.model, setting=setting, figure=name, unit=unit, better=better, samples=samples,
            versions={"about": process.about} if process else None, plan_hash=process.plan_hash if process else None,
            not_measured=reason,
        ))  # fmt: skip
        print(f"{cells.model}, {setting}: {engine}, {name}: {reason or f'{samples[0]:.5g} {unit}'}", file=sys.stderr,
              flush=True)  # fmt: skip


def not_brought(rows: Iterable[Row]) -> str:
    """What has no figure: rows that failed, and engines that were not brought to the machine."""
    lines = [["not run", "tried", "why"]]
    for row in rows:
        if row["not_measured"] is not None:
            title = f"{row['engine']}, {row['weights']}, {row['setting']}, {row['figure']}"
            lines.append([title, "measured with the others", row["not_measured"].replace("|", "\\|")])
    lines += [[absent.name, absent.tried, absent.reason] for absent in GPU_NOT_RUN]
    return markdown(lines)
