"""The platform interface: six required members, and the facts the core plans with.

Everything here is importable without torch, so probing and listing devices stays instant; dtypes are
therefore written by name ("float32", "bfloat16", ...). A platform answers facts; it never sees a request.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from hotplug.core.errors import PlatformError, nearest

if TYPE_CHECKING:
    from hotplug.core.ops.registry import OpRegistry

API_VERSION = "2.0"
"""Version of this interface. Additions raise the minor number; the core serves majors N and N-1."""

DTYPES = ("float32", "bfloat16", "float16")
KV_DTYPES = (*DTYPES, "fp8_e4m3")
KV_KINDS = ("full", "window", "latent", "state")
INDEX_DTYPES = ("int32", "int64")
"""The names that `Limits` may hold."""


class ExecMode(enum.StrEnum):
    """How a step can run: op by op, as a recorded graph, or compiled as a whole."""

    EAGER = "eager"
    CAPTURE = "capture"
    COMPILE = "compile"


class KVLayout(enum.StrEnum):
    """Order of a KV block's axes, after the block id: N tokens in the block, H heads, D head dim."""

    NHD = "NHD"
    HND = "HND"


class Feature(enum.StrEnum):
    """What a platform must declare before a configuration may ask for it."""

    FP8_KV = "fp8_kv"
    SPECULATIVE = "speculative"
    """Steps that verify proposed tokens: decodes of which several are of one request, one position after the other."""
    TENSOR_PARALLEL = "tensor_parallel"
    """Several ranks, each with its part of every layer: each on a device of its own, or on one that is `HasShare`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """One device a probe found."""

    index: int
    name: str
    """What the vendor calls it."""
    arch: str
    """Architecture key that kernels check, e.g. an ISA or compute capability."""
    cores: int = 0
    details: str = ""


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Bytes of memory on a device, now."""

    free: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileLimits:
    """Where compiled steps differ from others. An empty tuple means what `Limits` says."""

    dynamic: bool = False
    """Whether a compiled step takes any number of tokens and requests up to its shape, so that nothing is padded."""
    refusal: str = ""
    """Why the platform, which can compile steps, cannot here: told to whom asks for it."""
    dtypes: tuple[str, ...] = ()
    kv_dtypes: tuple[str, ...] = ()
    quantization: tuple[str, ...] = ()
    block_sizes: tuple[int, ...] = ()
    kv_layouts: tuple[KVLayout, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the core plans with on one device. The first entry of each tuple is the preferred one."""

    dtypes: tuple[str, ...]
    """Compute dtypes."""
    auto_dtype: str | None = None
    """Dtype that `dtype=auto` takes instead of the checkpoint's, where the latter is correct but slow."""
    kv_dtypes: tuple[str, ...] = ()
    """Storage dtypes of the KV cache; empty means the compute dtypes."""
    quantization: tuple[str, ...] = ("none",)
    """Weight schemes served; "none" is plain floating point, "*" any other by its plain-PyTorch reference.

    With "packed" first, checkpoints whose matrices are in groups are served from them where nothing else is asked for
    and kernels read them; with anything else first, in floating point."""
    block_sizes: tuple[int, ...] = (16,)
    """Tokens in a KV block."""
    kv_layouts: tuple[KVLayout, ...] = (KVLayout.NHD,)
    kv_kinds: tuple[str, ...] = ("full", "window")
    """What layers may keep of a sequence: "full" and "window" attention, a "latent" vector a token, a "state" of fixed
    size. With "state", caches may be views of pages: dense blocks, one apart from the next by more than a block."""
    index_dtype: str = "int64"
    """Dtype of positions, slots and block tables on the device: int32 or int64."""
    exec_modes: tuple[ExecMode, ...] = (ExecMode.EAGER,)
    max_graph_shapes: int = 0
    """Most step shapes that may be captured or compiled; 0 = no such limit."""
    capture_on_use: bool = False
    """Whether recording a step costs about what running it does, and gives its results too: then each size is recorded
    when it is first needed, and none at start."""
    capture_prompt_tokens: int = 0
    """Most prompt tokens of a step that is recorded together with its prompt chunks, for devices that compute a short
    prompt faster than the host can launch it; 0: such steps run op by op."""
    compiled: CompileLimits = CompileLimits()
    """Where compiled steps differ."""
    step_tokens: int = 2048
    """Token budget of a step where the user sets none: the least that keeps the device's matrix units busy."""
    step_requests: int = 128
    """Most requests that run at once where the user sets none."""
    mixed_steps: bool = True
    """Whether one step may hold prompt chunks and decodes together."""
    shared_host_memory: bool = False
    """Whether the device's memory is the host's, so that the KV cache competes with everything else."""
    asynchronous: bool = False
    """Whether the device works beside the host: then a step is planned and launched before the tokens of the one
    before it are read."""
    accelerator: bool = True
    """Whether a plain-PyTorch reference op is worth a warning here; on a host processor it is the usual thing."""
    features: frozenset[Feature] = frozenset()

    def __post_init__(self) -> None:
        for field, known in (("dtypes", DTYPES), ("kv_dtypes", KV_DTYPES), ("kv_kinds", KV_KINDS)):
            for name in getattr(self, field):
                _check(name in known, field, f"{name!r} is none of {', '.join(known)}", nearest(str(name), known))
        _check(self.auto_dtype in (None, *self.dtypes), "auto_dtype", f"{self.auto_dtype!r} is not in dtypes")
        _check(self.index_dtype in INDEX_DTYPES, "index_dtype", f"{self.index_dtype!r} is neither int32 nor int64")
        _check(
            self.capture_prompt_tokens == 0 or not (self.capture_on_use or self.max_graph_shapes),
            "capture_prompt_tokens",
            "steps with prompts are recorded at start, and in many shapes",
        )
        _check(self.step_tokens >= self.step_requests > 0, "step_tokens", "a step holds a token of every request")
        _check(all(size > 0 for size in self.block_sizes), "block_sizes", "a block holds at least one token")
        for field in ("dtypes", "block_sizes", "kv_layouts", "exec_modes"):
            _check(bool(getattr(self, field)), field, "at least one is needed")

    def within(self, mode: ExecMode) -> Limits:
        """The limits of steps that run in `mode`."""
        if mode is not ExecMode.COMPILE:
            return self
        own = {name: getattr(self.compiled, name) for name in _OWN}
        return dataclasses.replace(self, **{name: values for name, values in own.items() if values})


_OWN = ("dtypes", "kv_dtypes", "quantization", "block_sizes", "kv_layouts")
"""Fields of `CompileLimits` that stand in for those of `Limits`."""


def _check(ok: bool, field: str, what: str, hint: str = "") -> None:
    if not ok:
        raise PlatformError(what, where=f"Limits.{field}", hint=hint)


@runtime_checkable
class Platform(Protocol):
    """A kind of device. Subclassing is not needed: an object with these six members is a platform."""

    name: str
    """Unique; also the provider name of its kernels."""
    torch_device: str
    """Torch's device type for its tensors; "meta" if it only compiles."""

    def probe(self) -> Sequence[DeviceInfo]:
        """The devices present. No context, no heavy import, safe before fork; [] means absent."""

    def limits(self, device: DeviceInfo) -> Limits:
        """Facts of a device. May import torch, must not allocate."""

    def memory(self, device: DeviceInfo) -> MemoryInfo:
        """Free and total bytes, now."""

    def register(self, ops: OpRegistry) -> None:
        """Add kernels with `ops.add(Impl(op, provider, make=...))`; may do nothing."""
