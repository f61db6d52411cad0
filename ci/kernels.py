#!/usr/bin/env python3
"""Compiles every Triton kernel of the CUDA platform ahead of time, for GPUs that this machine need not have.

`--write` records registers, spills and shared memory in ci/kernels_record/, a file for each version of Triton that a
supported torch asks for. `--check` compares with the record of the version that runs, and fails where a kernel no
longer compiles, spills or needs more than the target has. What is compiled are the launches that the platform's own
functions make for the call sites of `hotplug.platforms.cuda.kernels.variants`: the functions run on tensors without
memory (torch's meta device), with Triton's launcher replaced by one that compiles.

`--triton VERSION` takes another Triton than the environment's: it is installed beside it, into .triton/, once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels below are imported: this is about the compiler

ROOT = Path(__file__).parent.parent
RECORDS = Path(__file__).with_name("kernels_record")
KIB = 1024


@dataclass(frozen=True)
class Target:
    """A GPU to compile for."""

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int
    """Bytes of shared memory that a program may take."""
    cores: int
    """Multiprocessors, which grids and splits are chosen by."""


TARGETS = (
    Target("sm_80", "cuda", 80, 32, 163 * KIB, 108),
    Target("sm_90", "cuda", 90, 32, 227 * KIB, 132),
    Target("sm_100", "cuda", 100, 32, 227 * KIB, 148),
    Target("gfx942", "hip", "gfx942", 64, 64 * KIB, 304),
    Target("gfx950", "hip", "gfx950", 64, 160 * KIB, 256),
    Target("gfx1100", "hip", "gfx1100", 32, 64 * KIB, 96),
)

Figures = dict[str, int]
Record = dict[str, dict[str, dict[str, Figures]]]
"""Kernel -> how it was specialized -> target -> what it takes."""


# --- recording and compiling, in a process of its own ---------------------------------------------


@dataclass
class Launch:
    """One compiled specialization, or the error that it ended with."""

    kernel: str
    special: str
    target: str
    figures: Figures
    error: str = ""


def compile_variant(index: int, name: str) -> list[Launch]:
    """Every launch that the kernels of a variant's op make at its call site on a target."""
    from hotplug.core.ops.builtin import builtin_registry
    from hotplug.core.ops.registry import Bucket, SiteSpec
    from hotplug.platforms.cuda.kernels import KERNELS
    from hotplug.platforms.cuda.kernels.variants import VARIANTS

    variant, target = VARIANTS[index], next(t for t in TARGETS if t.name == name)
    op = builtin_registry().op(variant.op)
    spec = SiteSpec(op.name, "aot", variant.dtype, name, variant.facts)
    found: list[Launch] = []
    for kernel in (k for k in KERNELS if k.op == op.name and k.check(spec).ok):
        args = _arguments(variant)
        bucket = op.bucket(*args) if op.bucket is not None else Bucket(len(args[0]), len(args[0]))
        if kernel.accepts is not None and not kernel.accepts(bucket):
            continue
        with _compiling(target, found):
            kernel.make(spec)(*args)
    return found


def _arguments(variant: Any) -> tuple[Any, ...]:
    """The conformance kit's call of the op, with no memory behind its tensors."""
    import torch

    from hotplug.plugins.conformance.cases import Builder

    with torch.device("meta"):
        builder = Builder(variant.dtype, "int32", 0)
        builder.random = None  # a generator belongs to a device, and this one has none
        call = builder.call(variant.op, variant.facts, variant.lens, view=True)
    if call is None:
        raise SystemExit(
            f"the conformance kit has no arguments for the op {variant.op!r} (plugins/conformance/cases.py)"
        )
    return call.args


@contextlib.contextmanager
def _compiling(target: Target, found: list[Launch]) -> Iterator[None]:
    """Within, a launch of a Triton kernel compiles it for `target` and adds to `found`."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.compiler import compile as compile_source
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from hotplug.platforms.cuda.kernels import gpu, pdl

    compiled_for = GPUTarget(target.backend, target.arch, target.warp)
    backend = make_backend(compiled_for)

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bind = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        options, signature, constants, attributes = self._pack_args(backend, kwargs, bound, specialization, options)
        names = list(signature)
        constant = {names[path[0]]: value for path, value in constants.items()}
        special = _describe(signature, constant, kwargs)
        try:
            source = (GluonASTSource if self.is_gluon() else ASTSource)(self, signature, constants, attributes)
            compiled = compile_source(source, target=compiled_for, options=options.__dict__)
            figures, error = _figures(compiled, target), ""
        except Exception as e:  # a compiler may fail in any way; the others go on
            figures, error = {}, f"{type(e).__name__}: {str(e).strip().splitlines()[-1]}"
        found.append(Launch(self.__name__, special, target.name, figures, error))

    cuda = target.backend == "cuda"
    capability = divmod(target.arch, 10) if isinstance(target.arch, int) else (0, 0)
    properties = SimpleNamespace(multi_processor_count=target.cores, name=target.name, warp_size=target.warp)
    with contextlib.ExitStack() as stack:
        # what a kernel may ask of its device, answered as the target would
        for where, attribute, answer in (
            (JITFunction, "run", launch),
            (pdl, "_overlaps", lambda device: cuda and capability >= (9, 0)),
            (gpu, "capability", lambda device: capability),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
        ):
            stack.enter_context(mock.patch.object(where, attribute, answer))
        yield


def _describe(signature: Mapping[str, str], constants: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """A specialization in words: dtypes of the pointers, compile-time constants, warps and stages."""
    dtypes = [kind.lstrip("*") for kind in dict.fromkeys(v for v in signature.values() if v.startswith("*"))]
    descriptors = [re.sub(r",\w+\(.*\)", "", kind) for kind in dict.fromkeys(signature.values())
                   if kind.startswith("tensordesc")]  # fmt: skip
    parts = ["/".join(dtypes), *descriptors]
    parts += [f"{name}={getattr(value, '__name__', value)}" for name, value in constants.items() if name != "PDL"]
    parts += [f"{name}={options[name]}" for name in ("num_warps", "num_stages") if name in options]
    return " ".join(part for part in parts if part)


def _figures(compiled: Any, target: Target) -> Figures:
    """Registers of a thread; bytes (NVIDIA) or registers (AMD) spilled to memory; bytes of shared memory.

    Scalar registers of AMD spill to vector registers, which is cheap: recorded, no fault.
    """
    if target.backend == "cuda":
        usage = _resource_usage(compiled.asm["cubin"])
        return {
            "registers": usage["REG"],
            "spilled": usage["STACK"] + usage["LOCAL"],
            "shared": compiled.metadata.shared,
        }
    text = compiled.asm["amdgcn"]
    value = {key: int(number) for key, number in re.findall(r"^\s*\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    shared = max(value["group_segment_fixed_size"], compiled.metadata.shared)
    return {"vgprs": value["vgpr_count"], "sgprs": value["sgpr_count"], "spilled": value["vgpr_spill_count"],
            "sgprs_spilled": value["sgpr_spill_count"], "shared": shared}  # fmt: skip


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump, which comes with Triton, says of the only kernel in a binary."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [str(knobs.nvidia.cuobjdump.path), "-res-usage", file.name]
        text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    return {key: int(number) for key, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


# --- the record -----------------------------------------------------------------------------------


def gather(launches: Iterable[Launch]) -> Record:
    """Launches by kernel, specialization and target; of equal ones the most that any takes."""
    found: Record = {}
    for one in launches:
        if one.error:
            continue
        figures = found.setdefault(one.kernel, {}).setdefault(one.special, {}).setdefault(one.target, one.figures)
        figures.update({key: max(value, one.figures[key]) for key, value in figures.items()})
    return found


def faults(launches: Iterable[Launch], before: Record) -> list[str]:
    """What makes a kernel unfit: it does not compile, does not fit, or spills more than is recorded."""
    limit = {t.name: t.shared for t in TARGETS}
    found: dict[str, None] = {}
    for one in launches:
        where = f"{one.kernel} [{one.special}] {one.target}"
        if one.error:
            found[f"{where}: does not compile: {one.error}"] = None
            continue
        known = before.get(one.kernel, {}).get(one.special, {}).get(one.target, {}).get("spilled", 0)
        if one.figures["spilled"] > known:
            found[f"{where}: spills {one.figures['spilled']}, recorded {known}"] = None
        if one.figures["shared"] > limit[one.target]:
            found[f"{where}: takes {one.figures['shared']} bytes of shared memory, there are {limit[one.target]}"] = (
                None
            )
    return list(found)


def differences(before: Record, now: Record) -> list[str]:
    """Every figure that changed, appeared or went, one line each."""
    old, new = dict(_flat(before)), dict(_flat(now))
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) == new.get(key):
            continue
        was, is_now = (", ".join(f"{v} {k}" for k, v in side.get(key, {}).items()) or "absent" for side in (old, new))
        lines.append(f"{key}: {was} -> {is_now}")
    return lines


def _flat(record: Record) -> Iterator[tuple[str, Figures]]:
    for kernel, specials in record.items():
        for special, targets in specials.items():
            for target, figures in targets.items():
                yield f"{kernel} [{special}] {target}", figures


def dump(record: Record, triton: str) -> str:
    """The JSON document, a line a target."""
    order = [t.name for t in TARGETS]
    text = json.dumps({"triton": triton, "kernels": {
        kernel: {special: {t: f"\0{json.dumps(targets[t])}\0" for t in order if t in targets}
                 for special, targets in sorted(specials.items())}
        for kernel, specials in sorted(record.items())
    }}, indent=1)  # fmt: skip
    return re.sub(r'"\\u0000(.*?)\\u0000"', lambda m: m[1].replace('\\"', '"'), text) + "\n"


def never_compiled(record: Record) -> list[str]:
    """Kernels of the platform that no variant launches and no other kernel calls or gives to warps of its own.

    `pdl` has parts of kernels only.
    """
    from triton.runtime.jit import JITFunction

    from hotplug.platforms.cuda import kernels
    from hotplug.platforms.cuda.kernels import pdl

    functions: dict[str, Any] = {}
    for module in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + "."):
        for value in vars(importlib.import_module(module.name)).values() if module.name != pdl.__name__ else ():
            if isinstance(value, JITFunction) and value.__module__.startswith(kernels.__name__):
                functions[value.__name__] = value
    called = {name for name in functions
              if any(re.search(rf"\b{name}[(,]", f.src) for k, f in functions.items() if k != name)}  # fmt: skip
    return sorted(functions.keys() - record.keys() - called)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare with the record")
    action.add_argument("--write", action="store_true", help="write the record")
    parser.add_argument("--target", action="append", choices=[t.name for t in TARGETS], help="only this; repeatable")
    parser.add_argument("--op", action="append", help="only variants of this op; repeatable")
    parser.add_argument("--triton", metavar="VERSION", help="this version of Triton; default: the environment's")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if options.triton and options.triton != metadata.version("triton"):
        return run_with(options.triton)  # where it is the one that runs

    import triton

    file = RECORDS / f"{triton.__version__}.json"
    if options.check and not file.exists():
        known = ", ".join(sorted(each.stem for each in RECORDS.glob("*.json")))
        print(f"nothing is recorded for triton {triton.__version__} (there is: {known}): `make kernels` records it")
        return 1

    from hotplug.platforms.cuda.kernels.variants import VARIANTS

    begin, excluded = time.perf_counter(), []
    whole = not options.target and not options.op
    tasks = []
    for index, variant in enumerate(VARIANTS):
        for target in TARGETS:
            reason = next((r for t, r in variant.excluded.items() if target.name.startswith(t)), "")
            if reason:
                excluded.append(f"{variant.op} {dict(variant.facts)} is not for {target.name}: {reason}")
            elif (not options.target or target.name in options.target) and (not options.op or variant.op in options.op):
                tasks.append((index, target.name))
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        launches = [one for found in pool.map(compile_variant, *zip(*tasks, strict=True)) for one in found]
    record = gather(launches)
    before: Record = json.loads(file.read_text())["kernels"] if file.exists() else {}
    if not whole:  # only what was compiled is compared
        names = {key for key, _ in _flat(record)}
        before = _only(before, names)
    wrong = faults(launches, {} if options.write else before)
    if whole:
        wrong += [f"{name}: no variant launches it (hotplug/platforms/cuda/kernels/variants.py)"
                  for name in never_compiled(record)]  # fmt: skip
    changed = differences(before, record)
    print("\n".join(excluded + changed + wrong))
    seconds = time.perf_counter() - begin
    print(f"triton {triton.__version__}: {len(list(_flat(record)))} kernels compiled for "
          f"{len({n for _, n in tasks})} targets in {seconds:.0f} s: "
          f"{len(changed)} changed, {len(wrong)} at fault")  # fmt: skip
    if options.write:
        if not whole:
            parser.error("--write takes all targets and ops")
        file.write_text(dump(record, triton.__version__))
        return int(any("spills" not in line for line in wrong))
    if changed:
        print("If that is meant, record it: make kernels")
    return int(bool(changed or wrong))


def run_with(version: str) -> int:
    """Run this command again with Triton `version`, installed beside the environment's; its exit code."""
    folder = ROOT / ".triton" / version
    if str(folder) in sys.path:
        raise SystemExit(f"{folder} holds triton {metadata.version('triton')}: remove it")
    if not folder.is_dir():
        partial = folder.with_name(f"{version}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(partial),
                   f"triton=={version}"]  # fmt: skip
        if subprocess.run(command, check=False).returncode:
            print(f"triton {version} cannot be installed")
            return 1
        partial.rename(folder)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, *sys.argv], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, check=False
    ).returncode


def _only(record: Record, names: set[str]) -> Record:
    found: Record = {}
    for kernel, specials in record.items():
        for special, targets in specials.items():
            for target, figures in targets.items():
                if f"{kernel} [{special}] {target}" in names:
                    found.setdefault(kernel, {}).setdefault(special, {})[target] = figures
    return found


if __name__ == "__main__":
    sys.exit(main())
