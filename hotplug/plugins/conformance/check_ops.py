"""Every kernel against its op's reference, over generated call sites and steps; and whether `check` is honest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hotplug.core.ops.collective import OPS as COLLECTIVES
from hotplug.core.ops.compare import Comparison, compare, dtypes_through, leaves
from hotplug.core.ops.reference import all_arguments, bound_reference, call_parameters
from hotplug.core.ops.registry import REFERENCE, Bucket, Fact, Fn, Impl, Op, SiteSpec
from hotplug.plugins.conformance.cases import LOST_OPS, Builder, Call, Lens
from hotplug.plugins.conformance.faults import name_fault, name_stray_writes
from hotplug.plugins.conformance.grid import Fuzz, call_sites, steps
from hotplug.plugins.conformance.report import Report
from hotplug.plugins.conformance.target import Target

HOST = torch.device("cpu")
FUZZED = 1000
"""Call sites by chance; fewer in a quick run."""
TRIES = 4
"""Draws for one of them, until the check says yes: a kernel that refuses most sites is run as often as others."""
LOST = "; with NaN and infinities where they must have no effect"
INTEGER_OPS = ("prepare_inputs", "prepare_step", "reject_sample")
FLOAT_OPS = ("argmax", "sample", "sample_rows", "logprobs", "penalties")
"""Ops whose call sites have a dtype of their own, not the model's."""


@torch.inference_mode()
def ops(target: Target, report: Report) -> None:
    """Each kernel, and each reference where the device is not the host, gives what the reference gives there."""
    covered: dict[str, int] = {}
    for op, impl in _candidates(target):
        label = f"{op.name} -> {impl.provider}"
        for spec, step_name, lens, view in _calls(target, op):
            if impl.provider != REFERENCE and not impl.check(spec)[0]:
                continue
            for lost in (False, True) if op.name in LOST_OPS and lens else (False,):
                ran = _try(target, report, op, impl, spec, lens, view=view, lost=lost, step_name=step_name)
                covered[label] = covered.get(label, 0) + ran
        if not covered.get(label):
            report.note(f"{label}: no generated call site is claimed, so it was not run")
    report.cases = sum(covered.values())
    report.data["cases"] = covered


def _candidates(target: Target) -> Iterator[tuple[Op, Impl]]:
    together = {op.name for op in COLLECTIVES}  # `check_comm` has several ranks
    for name in target.registry.names:
        if name in together:
            continue
        op = target.registry.op(name)
        for impl in target.registry.impls(name):
            yield op, impl
        if target.torch_device.type not in (HOST.type, "meta"):
            yield op, Impl(name, REFERENCE, make=partial(_reference, op))


def _reference(op: Op, spec: SiteSpec) -> Fn:
    return bound_reference(op, spec.facts)


def _calls(target: Target, op: Op) -> Iterator[tuple[SiteSpec, str, Lens, bool]]:
    quick, arch = target.options.quick, target.device.arch
    for facts in call_sites(op.name, target.limits, quick=quick):
        for dtype in _dtypes(op.name, target.limits.dtypes):
            spec = SiteSpec(op.name, "conform", dtype, arch, facts)
            for i, (step_name, lens) in enumerate(steps(op.name, facts, quick=quick)):
                if quick or not lens:
                    yield spec, step_name, lens, bool(i % 2)
                else:
                    yield from ((spec, step_name, lens, view) for view in (False, True))


def _dtypes(op: str, dtypes: tuple[str, ...]) -> tuple[str, ...]:
    return ("int",) if op in INTEGER_OPS else ("float32",) if op in FLOAT_OPS else dtypes


def _try(
    target: Target, report: Report, op: Op, impl: Impl, spec: SiteSpec, lens: Lens, *, view: bool, step_name: str,
    lost: bool = False, promise: str = "",
) -> bool:  # fmt: skip
    """Run one call on the device and on the host. False where the kernel does not take the step's shape."""
    seed = hash((op.name, str(sorted(spec.facts.items(), key=str)), str(lens), view)) % 2**31
    dtype = spec.dtype if spec.dtype.startswith(("float", "bfloat")) else "float32"
    call = Builder(dtype, target.limits.index_dtype, seed).call(op.name, spec.facts, lens, view=view, lost=lost)
    if call is None or not _accepts(op, impl, call):
        return False
    where = f"{_words(spec)}; {step_name}: {_lens_words(lens)}{', strided' if view else ''}{LOST if lost else ''}"
    given, kept = [to(a, target.torch_device) for a in call.args], [to(a, HOST) for a in call.args]
    try:
        result = impl.make(spec)(*given)
    except Exception as e:
        report.fail(f"{op.name} -> {impl.provider}: {promise}it raises {type(e).__name__}: {e} ({where})")
        return True
    expected = _reference(op, spec)(*kept)
    what, worst = _worst(op, spec, call, (result, given), (expected, kept))
    if worst.ok:
        return True
    fault = _fault(op, spec, call, result, given, kept)
    report.fail(f"{op.name} -> {impl.provider}: {promise}{fault or 'differs from its reference'} "
                f"({what}: {worst.reason}; {where})")  # fmt: skip
    return True


def _accepts(op: Op, impl: Impl, call: Call) -> bool:
    if impl.accepts is None:
        return True
    first = call.args[0]
    bucket = op.bucket(*call.args) if op.bucket is not None else Bucket(len(first), len(first))
    return bool(impl.accepts(bucket))


def _worst(op: Op, spec: SiteSpec, call: Call, got: Any, want: Any) -> tuple[str, Comparison]:
    """The worst tensor among the results and the arguments, by name."""
    names = call_parameters(op)
    through = dtypes_through(spec)
    triples = [("output", got[0], want[0]), *zip(names, got[1], want[1], strict=False)]
    worst = ("output", Comparison(0.0))
    for name, actual, expected in triples:
        given = dict(leaves(name, actual))
        for part, tensor in leaves(name, expected):
            if part not in given:
                return part, Comparison(float("inf"), reason="not a tensor, the reference gives one")
            rows = call.rows if name == "output" else None
            found = compare(given[part].to(HOST)[:rows], tensor[:rows], through=through)
            if found.excess > worst[1].excess:
                worst = (part, found)
    return worst


def _fault(op: Op, spec: SiteSpec, call: Call, result: Any, given: list[Any], kept: list[Any]) -> str:
    names = call_parameters(op)
    if "slots" in names:  # it writes to the caches
        slots, layout = call.args[names.index("slots")], spec["layout"]
        caches = (names.index("k_cache"), names.index("v_cache"))
        return next((words for i in caches
                     if (words := name_stray_writes(call.args[i], given[i], kept[i], slots, layout))), "")  # fmt: skip
    return name_fault(op.name, all_arguments(op, call.args, spec.facts), result, call.rows)


def to(value: Any, device: torch.device) -> Any:
    """A copy on `device`, with the strides that it has."""
    if isinstance(value, Tensor):
        if value.is_contiguous():
            return value.to(device, copy=True)
        reach = value.storage_offset() + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
        flat = value.as_strided((max(reach, 0),), (1,), 0).to(device, copy=True)
        return flat.as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, list):
        return [to(item, device) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to(getattr(value, f.name), device) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return value


def _words(spec: SiteSpec) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in spec.facts.items())
    return f"{spec.dtype}, {facts}"


def _lens_words(lens: Lens) -> str:
    return ", ".join(f"{q} of {s}" for q, s in lens) or "nothing"


@torch.inference_mode()
def honesty(target: Target, report: Report) -> None:
    """What `check` says of call sites by chance: yes must run and be right, no must come with a reason."""
    limits = target.limits
    fuzz = Fuzz(limits, seed=1)
    kernels = [(op, impl) for op, impl in _candidates(target) if impl.provider != REFERENCE]
    if not kernels:
        report.note("the platform has no kernel")
        return
    said_yes = 0
    for i in range(FUZZED // 5 if target.options.quick else FUZZED):
        op, impl = kernels[i % len(kernels)]
        for _ in range(TRIES):
            facts: dict[str, Fact] = fuzz.facts(op.name, op.facts)
            dtype = fuzz.dtype() if _dtypes(op.name, ("model",)) == ("model",) else _dtypes(op.name, ())[0]
            spec = SiteSpec(op.name, f"layers.{i}.conform", dtype, target.device.arch, facts)
            report.cases += 1
            if _verdict(report, impl, spec):
                said_yes += 1
                _try(target, report, op, impl, spec, fuzz.lens(static=bool(facts.get("static"))), view=bool(i % 2),
                     step_name="by chance", lost=op.name in LOST_OPS and i % 3 == 0,
                     promise="its check says yes and ")  # fmt: skip
                break
    report.data["said_yes"] = said_yes


def _verdict(report: Report, impl: Impl, spec: SiteSpec) -> bool:
    label = f"{impl.op} -> {impl.provider}"
    answers = []
    for _ in range(2):
        try:
            answers.append(tuple(impl.check(spec)))
        except Exception as e:
            report.fail(f"{label}: its check raises {type(e).__name__}: {e} ({_words(spec)})")
            return False
    (ok, reason), again = answers
    if (ok, reason) != again:
        report.fail(f"{label}: its check says one thing and then another ({_words(spec)})")
    if not ok and not reason:
        report.fail(f"{label}: its check refuses without a reason ({_words(spec)})")
    return bool(ok)
