"""What a configuration asks of a platform, checked against its `Limits` before any weight is read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from hotplug.core.config import EngineConfig, check_budget
from hotplug.core.errors import FeatureError
from hotplug.core.platform.base import ExecMode, Feature, KVLayout, Limits

_STATE = "state"
"""The kind of layers that keep all of a sequence in a state of fixed size."""
EXEC_MODES = (ExecMode.EAGER, ExecMode.CAPTURE, ExecMode.COMPILE)
"""The executable makers that this core has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The choices that the configuration left open, settled for one platform and checkpoint. Dtypes by name."""

    dtype: str
    kv_dtype: str
    block_size: int
    kv_layout: KVLayout
    exec_mode: ExecMode
    static_steps: bool
    """Whether steps may run in static shapes, where kernels cannot read lengths on the host."""
    max_num_seqs: int
    max_num_batched_tokens: int
    speculates: bool = False
    """Whether requests can speculate."""


def resolve(
    config: EngineConfig,
    limits: Limits,
    *,
    platform: str,
    checkpoint_dtype: str,
    fastest: ExecMode | None = None,
    step_requests: int | None = None,
    step_tokens: int | None = None,
    kv_kinds: Collection[str] = (),
) -> Resolved:
    """Settle dtypes, block size and execution mode. Raises FeatureError with every reason at once.

    `fastest` is the mode that `exec=auto` takes; None is the first of the platform's. `step_requests` and
    `step_tokens` stand in for those of the limits. `kv_kinds` are those of the model's layers.
    """
    reasons: list[str] = []
    built = [mode for mode in limits.exec_modes if mode in EXEC_MODES]
    if config.tensor_parallel_size > 1:
        built = [mode for mode in built if mode is not ExecMode.COMPILE]
    asked = "eager" if config.trace_ops else config.exec
    mode = ExecMode(asked) if asked != "auto" else fastest or (built or [ExecMode.EAGER])[0]
    limits = limits.within(mode)
    dtype = compute_dtype(config, limits, checkpoint_dtype)
    if dtype not in limits.dtypes:
        reasons.append(f"dtype {dtype} is not among {', '.join(limits.dtypes)}")
    kv_dtype = dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    kv_dtypes = limits.kv_dtypes or limits.dtypes
    if kv_dtype not in kv_dtypes:
        reasons.append(f"kv_cache_dtype {kv_dtype} is not among {', '.join(kv_dtypes)}")
    if kv_dtype.startswith("fp8") and Feature.FP8_KV not in limits.features:
        reasons.append(f"kv_cache_dtype {kv_dtype} needs the feature {Feature.FP8_KV}, which is not declared")
    if config.speculative is not None and Feature.SPECULATIVE not in limits.features:
        reasons.append(f"speculative {config.speculative} needs the feature {Feature.SPECULATIVE}, "
                       "which is not declared")  # fmt: skip
    reasons += _parallel_faults(config, limits, mode)
    block_size = config.block_size or limits.block_sizes[0]
    if block_size not in limits.block_sizes:
        reasons.append(f"block_size {block_size} is not among {', '.join(map(str, limits.block_sizes))}")
    reasons += _kv_kind_faults(config, limits, mode, kv_kinds)
    scheme = config.quantization or "none"
    if scheme not in limits.quantization and (scheme == "none" or "*" not in limits.quantization):
        reasons.append(f"quantization {scheme} is not among {', '.join(limits.quantization)}")
    beside = ExecMode.EAGER if mode is ExecMode.CAPTURE else mode  # captured decodes go with eager prompt chunks
    for needed in dict.fromkeys((mode, beside)):
        if needed not in limits.exec_modes:
            why = f": {limits.compiled.refusal}" if needed is ExecMode.COMPILE and limits.compiled.refusal else ""
            reasons.append(f"exec {needed} is not among {', '.join(limits.exec_modes)}{why}")
    if reasons:
        raise FeatureError("the platform does not serve this configuration", where=f"platform {platform}",
                           why=reasons, hint="Change these options or choose another --device.")  # fmt: skip
    seqs, tokens = _step_size(config, step_requests or limits.step_requests, step_tokens or limits.step_tokens)
    return Resolved(dtype=dtype, kv_dtype=kv_dtype, block_size=block_size, kv_layout=limits.kv_layouts[0],
                    exec_mode=mode, static_steps=_static(mode, limits), max_num_seqs=seqs,
                    max_num_batched_tokens=tokens,
                    speculates=Feature.SPECULATIVE in limits.features and _STATE not in kv_kinds)  # fmt: skip


def _parallel_faults(config: EngineConfig, limits: Limits, mode: ExecMode) -> list[str]:
    """Why several ranks cannot be served, every reason."""
    size, faults = config.tensor_parallel_size, []
    if size > 1 and Feature.TENSOR_PARALLEL not in limits.features:
        faults.append(f"tensor_parallel_size {size} needs the feature {Feature.TENSOR_PARALLEL}, which is not declared")
    if size > 1 and mode is ExecMode.COMPILE:
        faults.append("exec compile cannot go with tensor_parallel_size above 1: programs have no collectives")
    return faults


def _kv_kind_faults(config: EngineConfig, limits: Limits, mode: ExecMode, kinds: Collection[str]) -> list[str]:
    """Why what the model's layers keep of a sequence cannot be served, every reason."""
    faults = [
        f"the model's layers keep KV of the kind {kind}, which is not among {', '.join(limits.kv_kinds)}"
        for kind in kinds
        if kind not in limits.kv_kinds
    ]
    if _STATE in kinds and config.speculative is not None:
        faults.append(f"speculative {config.speculative} cannot go with layers that keep a state: it has no way back")
    if _STATE in kinds and mode is ExecMode.COMPILE:
        faults.append("exec compile cannot go with layers that keep a state: programs have no views of pages")
    return faults


def _static(mode: ExecMode, limits: Limits) -> bool:
    return mode is ExecMode.CAPTURE or (mode is ExecMode.COMPILE and not limits.compiled.dynamic)


def _step_size(config: EngineConfig, requests: int, step_tokens: int) -> tuple[int, int]:
    """(requests, tokens) that a step may hold; what the user set bounds what he left open."""
    seqs, tokens = config.max_num_seqs, config.max_num_batched_tokens
    if seqs is None:
        seqs = requests if tokens is None else min(requests, tokens)
    if tokens is None:
        tokens = max(step_tokens, seqs)
    check_budget(tokens, seqs)
    return seqs, tokens


def compute_dtype(config: EngineConfig, limits: Limits, checkpoint_dtype: str) -> str:
    """The dtype that `dtype` stands for, or asks for."""
    if config.dtype != "auto":
        return config.dtype
    if limits.auto_dtype is not None:
        return limits.auto_dtype
    return checkpoint_dtype if checkpoint_dtype in limits.dtypes else limits.dtypes[0]
