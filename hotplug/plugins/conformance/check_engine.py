"""Engines of whole models: captured and compiled steps, and what the platform declares."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import FeatureError
from hotplug.core.platform.base import DTYPES, KV_DTYPES, ExecMode, Feature
from hotplug.core.platform.optional import HasCompile
from hotplug.core.request import Request, SamplingParams
from hotplug.core.startup.bind import bind
from hotplug.plugins.conformance.engine_runs import (
    artifacts,
    config,
    first_difference,
    generate,
    prompts,
    small_model,
    start,
    trusted,
)
from hotplug.plugins.conformance.report import Report, Skipped
from hotplug.plugins.conformance.target import Target

RANDOM_STEPS = 1000


def executables(target: Target, report: Report) -> None:
    """Captured and compiled steps give the op-by-op tokens in every shape, and never compile while serving."""
    modes = [mode for mode in target.limits.exec_modes if mode is not ExecMode.EAGER]
    if not modes:
        raise Skipped("the platform runs op by op only")
    model = small_model(target.folder)
    # Op by op on the platform itself where it can, so that a wrong kernel is not held against the executable.
    eager = (
        config(target, model, exec="eager") if ExecMode.EAGER in target.limits.exec_modes else trusted(target, model)
    )
    with artifacts(target):
        for mode in modes:
            _mode(target, report, mode, eager, config(target, model, exec=str(mode)))


def _mode(target: Target, report: Report, mode: ExecMode, eager: EngineConfig, whole: EngineConfig) -> None:
    tokens = 6 if target.options.quick else 16
    core, plain = start(target, whole), start(target, eager)
    shapes = core.report()["shapes"]
    report.data[str(mode)] = {"shapes": shapes}
    for num_tokens, num_requests in shapes:
        # Prompts of other lengths each time: what a recording baked in would show.
        for seed in (num_tokens, num_tokens + 1):
            asked = prompts(num_requests, longest=min(max(num_tokens - num_requests, 20), 90), seed=seed)
            want, got = generate(plain, asked, tokens), generate(core, asked, tokens)
            report.cases += 1
            if difference := first_difference(got, want, target.limits.dtypes[0]):
                report.fail(
                    f"{mode}: steps of shape ({num_tokens}, {num_requests}) give other tokens than op by op "
                    f"({difference}); a value of the first run, such as a length, may be baked in"
                )
                break
    before = _compiled(target)
    steps = _random_load(core, RANDOM_STEPS // 20 if target.options.quick else RANDOM_STEPS)
    report.data[str(mode)]["steps"] = steps
    recompiles = max(core.stats().recompiles, _compiled(target) - before)
    if recompiles:
        report.fail(
            f"{mode}: {recompiles} compilations while serving {steps} random steps: a step must compile nothing"
        )
    if mode is ExecMode.COMPILE:
        before = _compiled(target)
        start(target, whole)
        if _compiled(target) != before:
            report.fail(f"{mode}: a second start compiled {_compiled(target) - before} programs again, with all "
                        "artifacts in the cache folder")  # fmt: skip


def _compiled(target: Target) -> int:
    return target.platform.num_compiled() if isinstance(target.platform, HasCompile) else 0


def _random_load(core: EngineCore, steps: int) -> int:
    """Run requests that come at random until so many steps are done."""
    rng = random.Random(0)
    begin, number = core.stats().steps, 0
    while core.stats().steps - begin < steps:
        for _ in range(rng.choice((0, 0, 1, 3))):
            params = SamplingParams(temperature=rng.choice((0.0, 0.8)), max_tokens=rng.randint(1, 20), ignore_eos=True)
            prompt = [rng.randrange(1, 300) for _ in range(rng.randint(1, 90))]
            core.add(Request(id=f"random-{number}", prompt_token_ids=prompt, sampling=params))
            number += 1
        core.step()
    while core.has_work:
        core.step()
    return core.stats().steps - begin


def features(target: Target, report: Report) -> None:
    """What is declared works; what is not is refused before weights load."""
    model = small_model(target.folder)
    limits = target.limits
    asked = prompts(3, longest=40)
    for option, value in _declared(target):
        report.cases += 1
        words = f"{option} {value}"
        try:
            wanted = trusted(target, model, **{option: value} if option != "exec" else {})
            got = generate(start(target, config(target, model, **{option: value})), asked, 6)
        except Exception as e:
            report.fail(f"{words} is declared but does not work: {type(e).__name__}: {e}")
            continue
        dtype = str(value) if option == "dtype" else limits.dtypes[0]
        loose = "bfloat16" if str(value).startswith(("fp8", "bfloat", "float16")) else dtype
        want = generate(start(target, wanted), asked, 6)
        if difference := first_difference(got, want, loose):
            report.fail(f"{words} is declared but gives other tokens than the references: {difference}")
    if Feature.TENSOR_PARALLEL in limits.features:
        _ranks(target, report, model)
    for option, value in _undeclared(target):
        report.cases += 1
        try:
            bind(config(target, model, **{option: value}), meta=True, candidates=target.candidates)
        except FeatureError:
            continue
        report.fail(f"{option} {value} is not declared and yet not refused")
    if Feature.FP8_KV in limits.features and "fp8_e4m3" not in limits.kv_dtypes:
        report.fail("the feature fp8_kv is declared, but fp8_e4m3 is not among kv_dtypes")


def _ranks(target: Target, report: Report, model: Path) -> None:
    """Two ranks give the references' tokens, where there are devices for them."""
    asked = prompts(3, longest=40)
    core = None
    try:
        core = start(target, config(target, model, tensor_parallel_size=2))
        got = generate(core, asked, 6)
    except FeatureError as e:
        report.note(f"two ranks were not tried: {'; '.join(e.why)}")
        return
    except Exception as e:
        report.fail(f"tensor_parallel is declared but does not work: {type(e).__name__}: {e}")
        return
    finally:
        if core is not None:
            core.close()
    report.cases += 1
    want = generate(start(target, trusted(target, model)), asked, 6)
    if difference := first_difference(got, want, target.limits.dtypes[0]):
        report.fail(f"two ranks give other tokens than the references: {difference}")


def _declared(target: Target) -> list[tuple[str, Any]]:
    limits = target.limits
    sizes = limits.block_sizes[:2] if target.options.quick else limits.block_sizes
    kv = [("kv_cache_dtype", dtype) for dtype in limits.kv_dtypes[: 1 if target.options.quick else None]]
    modes = [("exec", str(mode)) for mode in limits.exec_modes]
    dtypes = [("dtype", dtype) for dtype in limits.dtypes[: 1 if target.options.quick else None]]
    return [*dtypes, *kv, *(("block_size", size) for size in sizes), *modes]


def _undeclared(target: Target) -> list[tuple[str, Any]]:
    limits = target.limits
    kv_dtypes = limits.kv_dtypes or limits.dtypes
    return [
        *(("dtype", dtype) for dtype in DTYPES if dtype not in limits.dtypes),
        *(("kv_cache_dtype", dtype) for dtype in KV_DTYPES if dtype not in kv_dtypes),
        *(("block_size", size) for size in (3, 16, 48, 512) if size not in limits.block_sizes),
        *(("exec", str(mode)) for mode in ExecMode if mode not in limits.exec_modes),
        *([] if Feature.SPECULATIVE in limits.features else [("speculative", "ngram")]),
        *([] if Feature.TENSOR_PARALLEL in limits.features else [("tensor_parallel_size", 2)]),
    ]
