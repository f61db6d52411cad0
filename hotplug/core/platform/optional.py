"""Optional platform protocols. The core looks for them with `isinstance`; absent means its own default.

Each is a small promise of its own: implement the ones that the hardware has something better for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from hotplug.core.platform.base import DeviceInfo

if TYPE_CHECKING:
    import torch

    from hotplug.core.ops.registry import SiteSpec, Verdict
    from hotplug.core.platform.program import StepProgram
    from hotplug.core.platform.rank_group import RankGroup
    from hotplug.core.platform.tuning import TuningResult, TuningSummary


class NotHandledType:
    """The type of `NotHandled`, the answer "let the default take this size"."""

    def __repr__(self) -> str:
        return "NotHandled"


NotHandled = NotHandledType()


@runtime_checkable
class HasDiagnosis(Protocol):
    """Say what is wrong with this machine, for `hotplug devices` and `hotplug doctor`."""

    def diagnose(self) -> Sequence[str]:
        """Findings, one sentence each: what is missing or mismatched and what to do; [] if all is well."""


@runtime_checkable
class HasRuntime(Protocol):
    """Events and pinned memory. Default: copies wait."""

    def set_device(self, device: DeviceInfo) -> None:
        """Make `device` current for this thread."""

    def event(self) -> Any:
        """A new event with `record()`, `synchronize()` and `query()`."""

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A host tensor that the device can copy from and to asynchronously."""


@runtime_checkable
class HasShare(Protocol):
    """Several ranks on one device, each in a process of its own. Default: each rank needs a device."""

    def share(self, device: DeviceInfo, rank: int, ranks: int) -> None:
        """From now on this process is `rank` of the `ranks` that `device` serves: take that part of its cores.

        Called before anything is computed, and with (0, 1) where rank 0 has the device for itself again.
        """


@runtime_checkable
class HasCapture(Protocol):
    """Record one step as a graph that replays without Python."""

    def capture(self, step: Callable[[], Any], device: DeviceInfo) -> Callable[[], Any]:
        """Run `step` once while recording; the answer replays it on the same tensors."""


@runtime_checkable
class HasWarmup(Protocol):
    """Compile kernels side by side, before the first step needs them."""

    def warm_up(self, steps: Callable[[], Any], device: DeviceInfo) -> None:
        """Have ready what `steps` launches.

        `steps` runs the steps of the engine's start, in this thread, with the bound kernels and tensors of torch's
        meta device: shapes, dtypes and strides are those of real steps, memory there is none, so nothing may be
        launched. Called in a thread of its own while the weights load; the first step waits for it. An error ends
        it and is reported with the start's figures (`EngineCore.report`); the engine goes on.
        """


@runtime_checkable
class HasCompile(Protocol):
    """Compile a whole step for a few fixed shapes."""

    def buckets(self, max_tokens: int, max_requests: int) -> Sequence[tuple[int, int]]:
        """(tokens, requests) shapes to compile: (n, n) for up to n decodes, more tokens for prompt chunks.

        One must hold `max_requests` decodes; the largest with prompt chunks bounds what the scheduler puts in a
        step. No more than `Limits.max_graph_shapes`.
        """

    def compile(self, program: StepProgram, device: DeviceInfo, cache: Path) -> Callable[..., Sequence[torch.Tensor]]:
        """A function from the program's inputs to its outputs, both in order.

        The caches given to it are not read again, so those it returns may be the same memory. Artifacts may be kept
        in the folder `cache`, which is this program's own: what is found there was made for an equal one. Another
        process may look at the same time, so move whole files there. May be called in a thread.
        """

    def fingerprint(self) -> str:
        """Changes whenever an artifact compiled earlier may no longer be used."""

    def num_compiled(self) -> int:
        """Programs compiled in this process so far, artifacts that were loaded not counted.

        Also what running a step compiled, which it should not: the core reports it.
        """


@runtime_checkable
class HasCompileCheck(Protocol):
    """Say before weights load what a compiled step cannot hold. Default: compiling finds out."""

    def check_compile(self, spec: SiteSpec) -> Verdict:
        """Whether a step with this call site can be compiled; a refusal with its reason.

        Of a site that can, the reason names what computes it in compiled steps, if that is not the site's own kernel.
        """


@runtime_checkable
class HasComm(Protocol):
    """Collectives of a named group. Default: torch.distributed. A method may answer `NotHandled`."""

    def all_reduce(self, tensor: torch.Tensor, group: RankGroup) -> torch.Tensor | NotHandledType:
        """The sum of `tensor` over the ranks of `group`. Where it is handled, `tensor` may be overwritten."""

    def all_gather(self, tensor: torch.Tensor, group: RankGroup) -> torch.Tensor | NotHandledType:
        """The tensors of the ranks of `group` in its order, concatenated along the last dimension."""


@runtime_checkable
class HasKV(Protocol):
    """KV memory of its own kind. Default: `torch.zeros` on the torch device, `Tensor.copy_`."""

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: DeviceInfo) -> torch.Tensor:
        """A zeroed tensor for KV blocks. Zeroed matters: masked positions are multiplied by zero."""

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy blocks between device and host, either way."""


@runtime_checkable
class HasWeights(Protocol):
    """Rearrange a weight once, at load, into the layout that its kernel wants."""

    def repack(self, weight: Sequence[torch.Tensor], spec: SiteSpec, provider: str) -> Sequence[torch.Tensor]:
        """The weight of the site `spec` as `provider`'s kernel of its op, which alone reads it, wants it in its place.

        `weight` holds all tensors of a product's weight in the order of the op's parameters: one matrix, or what a
        quantization scheme stores (scales among them); the bias is not among them. As many are returned, those that
        stay as they are themselves. They are filled, and may be read-only views of the checkpoint's file: they are not
        written to. What is not returned is let go of afterwards. Where a fused op was lowered, `spec` is that of the
        part that reads the weight.

        Weights are left as they are in the checkpoint, and kernels must take them so, where others read them too:
        where steps are compiled as a whole, in tests and in tools that compare kernels with references.
        """


@runtime_checkable
class HasStepSizes(Protocol):
    """Sizes of steps that were measured for models on the vendor's devices. Default: `Limits.step_requests` and
    `step_tokens` serve every model."""

    def step_sizes(self, device: DeviceInfo) -> Path | None:
        """A file for this kind of device, as `hotplug tune --defaults --output` writes it, or None."""


@runtime_checkable
class HasTuning(Protocol):
    """Measure configurations of the platform's kernels on a device and keep the fastest, for `hotplug tune`."""

    def tune(
        self,
        device: DeviceInfo,
        sites: Sequence[SiteSpec],
        seconds: float,
        report: Callable[[TuningResult], None],
        output: Path | None,
    ) -> TuningSummary:
        """Tune what serves `sites`, which differ in op, dtype or facts, within about `seconds`.

        `report` is called after each kernel and shape. `output` is the file to write; None is the platform's own
        place for this device, where its kernels find it.
        """
