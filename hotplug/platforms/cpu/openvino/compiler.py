"""Compiles steps with OpenVINO's CPU plugin and runs them: one model for steps of every size, one infer request.

What is kept on disk is the recipe: tracing takes seconds, and it holds no weight. OpenVINO's own code is generated at
every start, since its export of a model holds the weights and loses what its paged attention needs to know.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hotplug.platforms.cpu.openvino import store, version
from hotplug.platforms.cpu.openvino.recipe import Recipe, recipe_of
from hotplug.vendor import PlatformError

if TYPE_CHECKING:
    from hotplug.vendor import StepProgram

_logger = logging.getLogger(__name__)


FAILED = "OpenVINO failed to compute a step"

_PRECISIONS = {"float32": "f32", "float16": "f16"}
"""Of the KV cache, as the plugin calls them."""


def fingerprint() -> str:
    """Of OpenVINO, and of the sources that recipes are made with."""
    here = Path(__file__).parent
    source = b"".join(file.read_bytes() for file in sorted(here.glob("*.py")))
    return f"openvino {version()}, recipe {store.FORMAT} {hashlib.sha256(source).hexdigest()[:12]}"


class Compiler:
    """Compiles steps, or loads them."""

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._core: Any = None
        self.num_compiled = 0

    def compile(self, program: StepProgram, arch: str, cache: Path) -> Callable[..., list[Tensor]]:
        """See `HasCompile.compile`. Raises PlatformError for what cannot be translated, or what OpenVINO refuses."""
        import openvino as ov

        from hotplug.platforms.cpu.openvino.build import build

        with self._busy, torch.no_grad():
            recipe = self._recipe(program, cache / "step.recipe")
            if self._core is None:
                self._core = ov.Core()
            kv_dtype = program.caches[0].dtype
            inputs = {given.name: len(given.dims) for given in program.inputs}
            model, memory = build(recipe, program.weights, inputs)
            try:
                compiled = self._core.compile_model(model, "CPU", _options(kv_dtype, arch))
            except RuntimeError as e:
                why = str(e).strip()
                raise PlatformError("OpenVINO cannot compile the step", why=why, hint="Use --exec eager.") from e
        return _Step(compiled, memory, list(inputs))

    def _recipe(self, program: StepProgram, path: Path) -> Recipe:
        """The recipe on disk, or a new one where there is none that is whole."""
        from hotplug.platforms.cpu.openvino.operations import TRANSLATIONS

        if path.exists():
            try:
                return store.load(path)
            except (OSError, ValueError, LookupError, TypeError) as e:
                _logger.warning("%s is made anew: %s", path, e)
        recipe = recipe_of(program.export(), frozenset(TRANSLATIONS))
        store.save(recipe, path)
        self.num_compiled += 1
        return recipe


class _Step:
    """A compiled step. What it answers holds until the next call."""

    def __init__(self, compiled: Any, memory: Sequence[Any], inputs: Sequence[str]) -> None:
        """`inputs` are the names of the program's inputs before the caches, in order."""
        from openvino import Tensor as OpenVINOTensor

        self._request = compiled.create_infer_request()
        self._memory = memory  # of the weights
        self._tensor = OpenVINOTensor
        read = {port.get_any_name() for port in compiled.inputs}
        self._inputs = [(i, name) for i, name in enumerate(inputs) if name in read]
        self._num_inputs = len(inputs)
        self._scores, self._kept = inputs.index("logit_indices"), inputs.index("kept")
        self._caches: list[Tensor] = []

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Hidden states, scores, and the caches given, written."""
        request, shared = self._request, self._tensor
        caches = tensors[self._num_inputs :]
        if len(caches) != len(self._caches) or any(a is not b for a, b in zip(caches, self._caches, strict=True)):
            self._caches = list(caches)
            for i, cache in enumerate(caches):
                request.set_tensor(f"cache_{i}", shared(cache.numpy(), shared_memory=True))
        held = [tensors[i].contiguous() for i, _ in self._inputs]
        for (_, name), tensor in zip(self._inputs, held, strict=True):
            request.set_tensor(name, shared(tensor.numpy(), shared_memory=True))
        try:
            request.infer()
        except RuntimeError as e:
            raise PlatformError(FAILED, why=str(e).strip(), hint="Use --exec eager.") from e
        hidden, logits = (torch.from_numpy(request.get_tensor(name).data) for name in ("hidden", "logits"))
        if (len(hidden), len(logits)) != (
            len(tensors[self._kept]),
            len(tensors[self._scores]),
        ):  # it does not report every failure
            raise PlatformError(FAILED, why=f"it gave {len(logits)} rows of scores for "
                                f"{len(tensors[self._scores])}", hint="Use --exec eager.")  # fmt: skip
        return [hidden, logits, *caches]


def _options(kv_dtype: torch.dtype, arch: str) -> dict[str, Any]:
    # The plugin looks for VNNI and finds it even where oneDNN is told to do without, and then products fail.
    rounded = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0} if arch == "avx2" else {}
    return {
        **rounded,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": physical_cores(),
        "ENABLE_CPU_PINNING": True,
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": _PRECISIONS[_name(kv_dtype)],
    }


def physical_cores() -> int:
    """Cores that the process may run on, hyper-threads of one counted once."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
