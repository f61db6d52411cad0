"""Counts of small fixed scenarios against `ci/counts.json`: `python -m track.counts --check` or `--write`.

Unlike times, counts are the same on a busy machine, so a change that moves one fails until it is accepted with
`make counts`. What cannot be counted on this machine is named and left out of the comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from track import load, sides
from track.probes.places import CannotError
from track.trees import LIBRARY, NATIVE

ROOT = Path(__file__).parents[3]
RECORD = ROOT / "ci" / "counts.json"
KERNELS = ROOT / "ci" / "kernels_record"
STREAM_STEP_MS = 10.0
"""So long that every token is an event of its own."""
TIMEOUT = 120


@dataclass(frozen=True)
class Count:
    """A counted figure. It may rise and fall by `share` of the recorded value, or by `least`, whichever is more."""

    name: str
    title: str
    share: float
    least: float
    why: str
    """The tolerance."""
    only: tuple[str, ...] = ()
    """Facts of the machine (`circumstances`) that must be those of the record."""


_EXACT = "the same in every run"
COUNTS = (
    Count("loop.python_calls_a_step", "Python functions called a step of the loop, 64 requests", 0.01, 0.5,
          "a message may be there or not when the loop looks", ("python",)),
    Count("loop.c_calls_a_step", "C functions called a step of the loop, 64 requests", 0.01, 1.0,
          "as above, and the device's clock is read until it is ready", ("python",)),
    Count("loop.registry_lookups", "calls of the registry of operations in 64 steady steps", 0.0, 0.0, _EXACT),
    Count("loop.blocks_kept_a_step", "blocks of Python's memory kept a step", 0.05, 3.0,
          "lists and dictionaries grow in jumps", ("python",)),
    Count("loop.bytes_sent_a_token", "bytes from engine to front end a token, 64 requests", 0.02, 0.1,
          "times are numbers of varying length"),
    Count("stream.bytes_a_token", "bytes on the socket a token of a streamed completion", 0.01, 0.0,
          "two tokens may share an event on a busy machine"),
    Count("cpu.native_calls_a_step", "native calls of a recorded decode step, SmolLM2", 0.0, 0.0, _EXACT, ("isa",)),
    Count("cpu.replays_a_step", "runs of native calls without a break in that step", 0.0, 0.0, _EXACT, ("isa",)),
    Count("cpu.recompiles", "steps compiled anew after the start", 0.0, 0.0, _EXACT),
    Count("cpu.modules", "Python modules imported from the start to the first token", 0.005, 2,
          "a library may import some on use", ("python", "packages")),
    Count("native.linear", "instructions of products Q4_1 576 -> 960 of 1 and 16 rows, AVX2", 0.002, 0.0,
          "which code the compiler makes depends on it alone", ("compiler", "valgrind")),
    Count("native.attention", "instructions of attention of 4 decodes at 96, AVX2", 0.002, 0.0,
          "as above", ("compiler", "valgrind")),
)  # fmt: skip
"""Those of the kernels' records come beside (`kernel_counts`), with no tolerance."""


@dataclass(frozen=True)
class Counted:
    """What was counted here, and why the rest was not."""

    values: dict[str, float]
    cannot: dict[str, str]
    circumstances: dict[str, str]


def circumstances() -> dict[str, str]:
    """Facts that some counts depend on."""
    from track import machine

    known = machine.versions()
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "packages": " ".join(f"{name} {known[name]}" for name in ("torch", "transformers") if name in known),
        "isa": " ".join(machine.facts()["isa"]),
        "compiler": _version(os.environ.get("CXX", "g++")),
        "valgrind": _version("valgrind"),
    }


def _version(command: str) -> str:
    if shutil.which(command) is None:
        return "none"
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0] if done.stdout else "unknown"


def kernel_counts(folder: Path = KERNELS) -> dict[str, float]:
    """Registers and spilled bytes of all recorded kernels together, a version of Triton and an architecture each."""
    found: dict[str, float] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        for variants in record["kernels"].values():
            for by_architecture in variants.values():
                for architecture, taken in by_architecture.items():
                    place = f"kernels.{record['triton']}.{architecture}"
                    registers = taken.get("registers", taken.get("vgprs", 0))
                    for name, value in (("registers", registers), ("spilled", taken["spilled"])):
                        found[f"{place}.{name}"] = found.get(f"{place}.{name}", 0) + value
    return found


def count(model: str = "smollm2") -> Counted:
    """Count everything, scenarios side by side."""
    from host_engines.model import model_folder

    null = str(model_folder())
    work: dict[str, Callable[[], dict[str, float]]] = {
        "loop.": lambda: _scenario("loop", null),
        "cpu.": lambda: _scenario("cpu", model),
        "stream.": lambda: _stream(null),
        "native.": _instructions,
    }
    values, cannot = kernel_counts(), {}
    with ThreadPoolExecutor(2) as pool:
        for prefix, one in {prefix: pool.submit(act) for prefix, act in work.items()}.items():
            try:
                values |= one.result()
            except (CannotError, subprocess.TimeoutExpired) as e:
                cannot |= {c.name: str(e) for c in COUNTS if c.name.startswith(prefix)}
    return Counted(values, cannot, circumstances())


def _scenario(name: str, model: str) -> dict[str, float]:
    """Of a process of its own. Raises CannotError with its last words."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "track.probes.counted", name, json.dumps({"model": model})]
        done = subprocess.run(command, env=sides.environment(ROOT, Path(folder)), capture_output=True, text=True,
                              check=False, timeout=TIMEOUT)  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise CannotError(f"the scenario ended with {done.returncode}: {lines[-1][:300]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _stream(model: str) -> dict[str, float]:
    """Of three streams the one with most bytes: whatever merges two tokens makes them less."""
    from served import Served

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        environment = {**sides.environment(ROOT, Path(folder)), "NULL_DEVICE_STEP_MS": str(STREAM_STEP_MS)}
        try:
            served = Served(model, *sides.ServerSide.ARGUMENTS, log=log, environment=environment)
        except RuntimeError as e:
            raise CannotError(str(e)) from e
        try:
            one = load.Load(served.url)
            most = max(one.stream_bytes() for _ in range(3))
            one.close()
        finally:
            served.stop()
    return {"stream.bytes_a_token": most / load.TOKENS}


def _instructions() -> dict[str, float]:
    """Of the native library, by callgrind, which knows no AVX-512 and no AMX: its AVX2 code is what is counted."""
    library = ROOT / NATIVE / LIBRARY
    if shutil.which("valgrind") is None:
        raise CannotError("valgrind is not installed")
    if not library.exists():
        raise CannotError("the native library is not built; `make native` does it")
    python = str(Path(sys.executable).resolve())
    script = Path(__file__).parent / "probes" / "native_calls.py"
    found = {}
    for part in ("linear", "attention"):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "callgrind"
            command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}",
                       python, "-I", "-S", str(script), str(library), part]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["it said nothing"]
                raise CannotError(f"valgrind ended with {done.returncode}: {lines[-1][:300]}")
            found[f"native.{part}"] = float(instructions_of(LIBRARY, out.read_text()))
        if done.stdout.strip() != "avx2":
            raise CannotError(f"below valgrind the library uses {done.stdout.strip()}, not avx2")
    return found


def instructions_of(object_name: str, profile: str) -> int:
    """Instructions that callgrind's file holds for an object, without those of what it calls."""
    names: dict[str, str] = {}
    total, inside, called = 0, False, False
    for line in profile.splitlines():
        if match := re.match(r"ob=\((\d+)\)(?: (.*))?$", line):
            number, name = match.groups()
            inside = names.setdefault(number, name or "").endswith(object_name)
        elif match := re.match(r"cob=\((\d+)\) (.*)$", line):
            names.setdefault(*match.groups())
        elif line.startswith("calls="):
            called = True
        elif match := re.match(r"[+*-]?[\dx*a-f]* ?(\d+)$", line):
            total += 0 if called or not inside else int(match[1])
            called = False
    return total


def compare(record: Mapping[str, Any], now: Counted, names: Iterable[Count] = COUNTS) -> tuple[list[str], list[str]]:
    """What moved, a line each, and what was not compared, with the reason."""
    known = {one.name: one for one in names}
    recorded: dict[str, float] = record["counts"]
    moved, left_out = [], []
    for name in sorted(recorded.keys() | now.values.keys() | now.cannot.keys()):
        one = known.get(name, Count(name, name, 0.0, 0.0, _EXACT))
        other = [fact for fact in one.only if record["circumstances"].get(fact) != now.circumstances[fact]]
        if name in now.cannot:
            left_out.append(f"{name}: {now.cannot[name]}")
        elif other:
            left_out.append(f"{name}: the record is of another {', '.join(other)}")
        elif name not in recorded:
            moved.append(f"{name}: {now.values[name]:g}, not in the record")
        elif name not in now.values:
            moved.append(f"{name}: {recorded[name]:g} in the record, not counted any more")
        elif abs(now.values[name] - recorded[name]) > max(one.share * abs(recorded[name]), one.least):
            was, value = recorded[name], now.values[name]
            share = f", {value / was - 1:+.1%}" if was else ""
            moved.append(f"{name}: {was:g} -> {value:g}{share} ({one.title}; tolerance {_tolerance(one)}: {one.why})")
    return moved, left_out


def _tolerance(one: Count) -> str:
    return (
        " or ".join(filter(None, [f"{one.share:.1%}" if one.share else "", f"{one.least:g}" if one.least else ""]))
        or "0"
    )


def document(now: Counted, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """The record. What cannot be counted here keeps its recorded value."""
    kept = {name: before["counts"][name] for name in now.cannot if before and name in before["counts"]}
    return {"circumstances": now.circumstances, "counts": dict(sorted({**kept, **now.values}.items()))}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="track.counts", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="compare with the record; 1 where something moved")
    what.add_argument("--write", action="store_true", help="make the record")
    parser.add_argument("--record", type=Path, default=RECORD, metavar="FILE")
    options = parser.parse_args(arguments)
    now = count()
    before = json.loads(options.record.read_text()) if options.record.exists() else None
    if options.write:
        options.record.write_text(json.dumps(document(now, before), indent=1) + "\n")
        print(f"{len(now.values)} counts written to {options.record}")
        for name, why in now.cannot.items():
            print(f"not counted: {name}: {why}")
        return 0
    if before is None:
        print(f"there is no {options.record}; `make counts` writes it", file=sys.stderr)
        return 2
    moved, left_out = compare(before, now)
    for line in left_out:
        print(f"not compared: {line}")
    for line in moved:
        print(f"moved: {line}")
    print(f"{len(now.values)} counts, {len(moved)} moved" + ("; `make counts` accepts them" if moved else ""))
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())
