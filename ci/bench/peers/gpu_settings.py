"""How hotplug and vLLM are started on a GPU: at their defaults, and as their own documentation recommends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peers.settings import DEFAULTS, TUNED

SETTINGS = (DEFAULTS, TUNED)


@dataclass(frozen=True)
class GpuSetting:
    """Options of the offline API, and arguments of the server besides."""

    offline: dict[str, Any] = field(default_factory=dict)
    server: tuple[str, ...] = ()
    said: str = "nothing but the model"
    source: str = "-"


GPU: dict[str, dict[str, GpuSetting]] = {
    "hotplug": {
        DEFAULTS: GpuSetting(),
        TUNED: GpuSetting(
            {"max_num_seqs": 512}, ("--max-num-seqs", "512", "--frontends", "4"),
            "512 requests at once; over HTTP four front ends", "docs/host.md, docs/benchmarks.md",
        ),
    },
    "vLLM": {
        DEFAULTS: GpuSetting(),
        TUNED: GpuSetting(
            {"max_num_seqs": 512, "max_num_batched_tokens": 16384},
            ("--max-num-seqs", "512", "--max-num-batched-tokens", "16384", "--api-server-count", "4"),
            "512 requests at once, steps of 16,384 tokens (more than 8,192 for throughput); over HTTP four API servers",
            "vLLM, \"Optimization and Tuning\" (Chunked Prefill, Performance Tuning; API server scale-out)",
        ),
    },
}  # fmt: skip


def offline_options(engine: str, model: str, context: int, setting: str, tiny: bool) -> dict[str, Any]:
    """What makes the engine's `LLM`; `tiny` is for the CPU of a dry run."""
    options = GPU[engine][setting].offline
    if engine == "hotplug":
        common = {"model": model, "load_format": "dummy", "max_model_len": context, "enable_prefix_cache": False}
        return {**common, "device": "cpu" if tiny else "cuda", **({"kv_cache_memory": "64MiB"} if tiny else {}),
                **options}  # fmt: skip
    common = {"model": model, "load_format": "dummy", "max_model_len": context, "enable_prefix_caching": False}
    return {**common, **({"dtype": "float32"} if tiny else {}), **options}


def server_command(engine: str, python: str, model: str, context: int, setting: str, tiny: bool) -> list[str]:
    """What starts the engine's server, but for its port. The model is served as "bench"."""
    arguments = [*GPU[engine][setting].server, "--load-format", "dummy", "--max-model-len", str(context),
                 "--served-model-name", "bench", "--host", "127.0.0.1"]  # fmt: skip
    if engine == "hotplug":
        device = ("--device", "cpu", "--kv-cache-memory", "64MiB") if tiny else ("--device", "cuda")
        return [python, "-m", "hotplug.cli", "serve", model, *arguments, *device, "--no-enable-prefix-cache"]
    dtype = ("--dtype", "float32") if tiny else ()
    return [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *arguments, *dtype,
            "--no-enable-prefix-caching"]  # fmt: skip
