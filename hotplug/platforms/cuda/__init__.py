"""The CUDA platform: NVIDIA GPUs of compute capability 8.0 and up, with paged kernels in Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from hotplug.vendor import DeviceInfo, ExecMode, Feature, KVLayout, Limits, MemoryInfo, PlatformError

if TYPE_CHECKING:
    import torch

    from hotplug.platforms.cuda.compile import Compiler
    from hotplug.platforms.cuda.nvml import Gpu, Nvml
    from hotplug.vendor import OpRegistry, SiteSpec, StepProgram, TuningResult, TuningSummary


class CudaPlatform:
    """NVIDIA GPUs."""

    name = "cuda"
    torch_device = "cuda"
    api_version = "2.0"

    def __init__(self) -> None:
        self._nvml: Nvml | None = None
        self._gpus: list[Gpu] = []
        self._pool: Any = None
        self._capturing: Any = None
        self._graphs: WeakSet[Any] = WeakSet()
        self._compiler: Compiler | None = None

    def probe(self) -> Sequence[DeviceInfo]:
        from hotplug.platforms.cuda.machine import LEAST
        from hotplug.platforms.cuda.nvml import NoNvmlError, Nvml, NvmlError

        try:
            self._nvml = Nvml()
            self._gpus = self._nvml.gpus()
        except NoNvmlError:  # `diagnose` says which part is missing
            return []
        except NvmlError as e:
            hint = "After an upgrade of the driver, load it anew or restart the machine."
            raise PlatformError(f"the NVIDIA driver answers with an error ({e})", hint=hint) from e
        return [
            DeviceInfo(index=gpu.index, name=gpu.name, arch=f"sm_{gpu.capability[0]}{gpu.capability[1]}",
                       cores=gpu.multiprocessors, details=f"driver {gpu.driver}")
            for gpu in self._gpus if gpu.capability >= LEAST
        ]  # fmt: skip

    def diagnose(self) -> Sequence[str]:
        from hotplug.platforms.cuda.machine import LEAST, absence, faults
        from hotplug.platforms.cuda.nvml import NoNvmlError, Nvml, NvmlError

        try:
            nvml = Nvml()
            usable = any(gpu.capability >= LEAST for gpu in nvml.gpus())
            return [*absence(nvml), *(faults(nvml.driver(), nvml.driver_cuda()) if usable else ())]
        except NoNvmlError as e:
            return [str(e)]
        except NvmlError as e:
            return [f"the NVIDIA driver answers with an error ({e}); is it loaded, and does it match its libraries?"]

    def limits(self, device: DeviceInfo) -> Limits:
        self._refuse_faults(device)
        return Limits(
            dtypes=("bfloat16", "float16", "float32"),
            block_sizes=(64, 16, 32, 128),
            kv_layouts=(KVLayout.NHD,),
            index_dtype="int32",
            exec_modes=(ExecMode.CAPTURE, ExecMode.EAGER, ExecMode.COMPILE),
            step_tokens=16384 + 512,  # as many of prompts while 512 requests decode beside them
            step_requests=256,
            capture_prompt_tokens=1024,  # of a small model, the host launches longer than the device computes
            asynchronous=True,
            features=frozenset({Feature.SPECULATIVE, Feature.TENSOR_PARALLEL}),
        )

    def _refuse_faults(self, device: DeviceInfo) -> None:
        """Raise PlatformError where a probed GPU cannot be used by what is installed."""
        from hotplug.platforms.cuda.machine import faults

        if self._nvml is None:  # asked about a device that is not here
            return
        wrong = faults(self._nvml.driver(), self._nvml.driver_cuda())
        if wrong:
            raise PlatformError(f"{device.name} is here, but what is installed cannot use it",
                                where=f"platform {self.name}", why=wrong)  # fmt: skip

    def step_sizes(self, device: DeviceInfo) -> Path | None:
        from hotplug.platforms.cuda.tuning import file_name

        file = Path(__file__).parent / "step_sizes" / file_name(device.name)
        return file if file.exists() else None

    def memory(self, device: DeviceInfo) -> MemoryInfo:
        assert self._nvml is not None
        gpu = next(gpu for gpu in self._gpus if gpu.index == device.index)
        free, total = self._nvml.memory(gpu)
        return MemoryInfo(free=free + _cached(device.index), total=total)

    def register(self, ops: OpRegistry) -> None:
        from hotplug.platforms.cuda.kernels import KERNELS

        for kernel in KERNELS:
            ops.add(kernel)

    def capture(self, step: Callable[[], Any], device: DeviceInfo) -> Callable[[], Any]:
        import torch

        # Graphs share a memory pool, since they never run at once; it ends with the last graph in it.
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
            self._capturing = torch.cuda.Stream(device.index)
        graph = torch.cuda.CUDAGraph()
        stream = self._capturing
        stream.wait_stream(torch.cuda.current_stream(device.index))
        # Not torch.cuda.graph: it collects garbage and empties the allocator's cache every time.
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(device.index).wait_stream(stream)
        self._graphs.add(graph)
        replay: Callable[[], Any] = graph.replay
        return replay

    def warm_up(self, steps: Callable[[], Any], device: DeviceInfo) -> None:
        import torch

        from hotplug.platforms.cuda.warmup import compile_launches

        compile_launches(steps, torch.device("cuda", device.index))

    def buckets(self, max_tokens: int, max_requests: int) -> Sequence[tuple[int, int]]:
        from hotplug.platforms.cuda import compile as inductor

        return inductor.buckets(max_tokens, max_requests)

    def compile(self, program: StepProgram, device: DeviceInfo, cache: Path) -> Callable[..., Sequence[torch.Tensor]]:
        import torch

        from hotplug.platforms.cuda.compile import Compiler

        if self._compiler is None:
            self._compiler = Compiler(self.capture)
        with torch.cuda.device(device.index):
            return self._compiler.compile(program, device, cache)

    def fingerprint(self) -> str:
        from hotplug.platforms.cuda import compile as inductor

        return inductor.fingerprint([f"{gpu.name} (driver {gpu.driver})" for gpu in self._gpus])

    def num_compiled(self) -> int:
        return self._compiler.num_compiled if self._compiler is not None else 0

    def tune(
        self, device: DeviceInfo, sites: Sequence[SiteSpec], seconds: float, report: Callable[[TuningResult], None],
        output: Path | None,
    ) -> TuningSummary:  # fmt: skip
        import torch

        from hotplug.platforms.cuda.kernels import TUNABLES
        from hotplug.platforms.cuda.tuner import CompileAhead, graph_time, tune
        from hotplug.platforms.cuda.tuning import file_name, own_folder

        own, properties = torch.device("cuda", device.index), torch.cuda.get_device_properties(device.index)
        with torch.cuda.device(own), CompileAhead(own) as ahead:
            return tune(
                TUNABLES, sites, device=own, device_name=properties.name, seconds=seconds, report=report,
                output=output or own_folder() / file_name(properties.name), timer=graph_time,
                cache_bytes=properties.L2_cache_size, compile_ahead=ahead,
            )  # fmt: skip

    def set_device(self, device: DeviceInfo) -> None:
        import torch

        torch.cuda.set_device(device.index)

    def event(self) -> Any:
        import torch

        return torch.cuda.Event()

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        import torch

        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)


def _cached(index: int) -> int:
    """Bytes that PyTorch holds back from the driver, free for the next tensor of this process.

    Those in the pools of recorded graphs are not: the graphs write there when they run.
    """
    import sys

    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    segments = torch.cuda.memory_snapshot()
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in segments
        if segment["device"] == index and tuple(segment["segment_pool_id"]) == (0, 0)
    )
