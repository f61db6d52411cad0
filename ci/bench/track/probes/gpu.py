"""Cells of the GPU benchmark (`ci/bench/gpu.py`), of one model: its workloads with random weights, offline."""

from __future__ import annotations

import itertools
from typing import Any

from track.probes.places import find

KV_MEMORY = {"llama8b": "14GiB", "llama1b": "14GiB"}
"""Two trees' engines share the device, so neither may take what is free."""
OPTIONS: dict[str, Any] = {"device": "cuda", "load_format": "dummy", "max_num_seqs": 512, "max_model_len": 33024,
                           "enable_prefix_cache": False}  # fmt: skip


class Gpu:
    """Probes are named gpu-MODEL-WORKLOAD."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        from gpu_workloads import model_folder

        config, core = find("EngineConfig", "hotplug.core.config"), find("EngineCore", "hotplug.core.engine.core")
        self._core = core(config(model=str(model_folder(model)), kv_cache_memory=KV_MEMORY[model], **options))
        self.plan_hash: str | None = self._core.plan_hash
        self._seeds = itertools.count()

    def measure(self, probe: str) -> dict[str, float]:
        import gpu

        workload = probe.split("-")[2]
        return {probe: gpu.figure(workload, gpu.run(self._core, workload, next(self._seeds)))}


def start(options: dict[str, Any]) -> Gpu:
    return Gpu(options["family"].removeprefix("gpu-"), {**OPTIONS, **options.get("gpu_options", {})})
