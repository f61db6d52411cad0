"""The engines of the CPU comparison as data: defaults, a tuned setting that the engine's own documentation recommends,
and which engines are not run, with the reason found by trying.

Each engine is measured with nothing set but the model, and as tuned. What a load needs to run at all (16 sequences,
enough cache for them) is no tuning and is given in both where the engine has no default for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
ENVIRONMENTS = ROOT / ".peers"
DEFAULTS, TUNED = "defaults", "tuned"


@dataclass(frozen=True)
class Setting:
    """How an engine is started."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    """Of the engine's module in `cpu_engines`."""
    variables: dict[str, str] = field(default_factory=dict)
    """Of the environment of its process."""
    said: str = "nothing but the model"
    """What is set, in words."""
    source: str = ""
    """The page of the engine's documentation that recommends it."""


@dataclass(frozen=True)
class Engine:
    """An engine, the forms of the weights that it is measured with, and its settings."""

    name: str
    module: str
    """`cpu_engines/engine_MODULE.py`."""
    environment: str
    """Folder in `.peers` with its virtual environment; empty: the environment that runs the comparison."""
    weights: dict[str, tuple[str, ...]]
    """Form of the weights -> names of the settings that it is measured at. The first is what a user would start."""
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Absent:
    """An engine that is not measured."""

    name: str
    tried: str
    reason: str


def tcmalloc() -> str:
    """The TCMalloc library that `make bench-peers` unpacked beside vLLM, or the system's; empty where none is."""
    unpacked = (ENVIRONMENTS / "vllm" / "tcmalloc").rglob("libtcmalloc_minimal.so.4")
    found = [str(path) for path in (*unpacked, *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))]
    return found[0] if found else ""


HOTPLUG = Engine(
    "hotplug", "hotplug", "",
    {"Q4_1": (DEFAULTS, TUNED), "Q4_0": (DEFAULTS,), "Q8_0": (DEFAULTS,), "float32": (DEFAULTS,)},
    (
        Setting(DEFAULTS),
        Setting(
            TUNED,
            {"max_num_seqs": 16, "max_model_len": 2048, "max_num_batched_tokens": 2048, "kv_cache_memory": "256MiB"},
            said="the load's limits: 16 requests, 2,048 tokens of context and of a step, 256 MiB of KV cache",
            source="docs/cpu.md, \"Memory and start\"",
        ),
    ),
)  # fmt: skip
OPENVINO = Engine(
    "OpenVINO GenAI", "openvino", "openvino",
    {"Q4_1": (DEFAULTS, TUNED), "F16": (TUNED,)},
    (
        Setting(DEFAULTS),
        Setting(
            TUNED,
            {"scheduler": {"max_num_batched_tokens": 2048, "max_num_seqs": 16, "cache_size": 1,
                           "enable_prefix_caching": True},
             "properties": {"PERFORMANCE_HINT": "LATENCY"}},
            said="steps of 2,048 tokens, 1 GB of cache made at the start, prefix caching, the hint LATENCY",
            source="OpenVINO Model Server, \"Efficient LLM Serving\"; OpenVINO, \"Performance Hints and Thread "
                   "Scheduling\"",
        ),
    ),
)  # fmt: skip
TRANSFORMERS = Engine(
    "transformers", "transformers", "",
    {"float32": (DEFAULTS,), "bfloat16": (TUNED,)},
    (
        Setting(DEFAULTS, {"dtype": "auto"}, said="`generate` with nothing but the model"),
        Setting(
            TUNED, {"dtype": "bfloat16"}, said="`generate` in bfloat16",
            source="transformers, \"Loading models\" (Model data type)",
        ),
    ),
)  # fmt: skip


def llama_cpp(cores: int) -> Engine:
    """llama.cpp on so many physical cores."""
    return Engine(
        "llama.cpp", "llama_cpp", "llama",
        {"Q4_1": (DEFAULTS,), "Q4_0": (TUNED,), "F16": (TUNED,)},
        (
            Setting(
                DEFAULTS, {"threads": cores},
                said="what its own programs start with: a thread a core, batches of 2,048, micro-batches of 512, "
                     "flash attention left to it",
            ),
            Setting(
                TUNED, {"threads": cores, "micro_batch": 2048, "flash_attention": True},
                said="a thread a physical core, flash attention on, micro-batches of 2,048",
                source="docs/development/token_generation_performance_tips.md (threads); tools/server/README.md "
                       "(--flash-attn, --ubatch-size)",
            ),
        ),
    )  # fmt: skip


def vllm(cores: list[int]) -> Engine:
    """vLLM's CPU build, bound to one processor of each physical core."""
    space, preload = {"VLLM_CPU_KVCACHE_SPACE": "1"}, tcmalloc()
    return Engine(
        "vLLM", "vllm", "vllm",
        {"float32": (DEFAULTS,), "bfloat16": (TUNED,)},
        (
            Setting(
                DEFAULTS, {"dtype": "float32"}, space,
                said="nothing but the model and the checkpoint's type; 1 GiB of cache, so that engines fit beside "
                     "each other",
            ),
            Setting(
                TUNED, {"dtype": "bfloat16", "max_model_len": 2048, "max_num_seqs": 16},
                {**space, "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
                 **({"LD_PRELOAD": preload} if preload else {})},
                said="bfloat16, a thread bound to each physical core, TCMalloc where `make bench-peers` could unpack "
                     "it, 16 requests of 2,048 tokens",
                source="vLLM, \"CPU\" (Performance tips, Related runtime environment variables)",
            ),
        ),
    )  # fmt: skip


def engines(cores: list[int]) -> tuple[Engine, ...]:
    """What is measured on a machine where these physical cores, one processor of each, may be used."""
    return HOTPLUG, llama_cpp(len(cores)), OPENVINO, vllm(cores), TRANSFORMERS


NOT_RUN = (
    Absent(
        "transformers' continuous batching",
        "`generate_batch` of 5.23 in bfloat16 with paged SDPA, one manager for all batches (its page \"Continuous "
        "batching\")",
        "did not come back from a later batch in the time of the run",
    ),
    Absent(
        "SGLang's CPU build",
        "`pip install sglang==0.5.23`; its wheel without what it asks for, in an environment with the CPU's torch, "
        "`SGLANG_USE_CPU_ENGINE=1`",
        "the one wheel is for CUDA (it asks for sglang-kernel, FlashInfer and NVIDIA's libraries) and its import ends "
        "in `operator torchvision::nms does not exist`; the CPU's kernels are built from a checkout "
        "(its page \"CPU Servers\") and are on no package index",
    ),
    Absent(
        "TGI's CPU build", "`pip install text-generation-server`",
        "no such distribution; `text-generation` is its client, and the CPU build is a container image "
        "(its page \"Using TGI with Intel CPUs\")",
    ),
)  # fmt: skip
"""Engines that were tried on a CPU, and why they are not measured."""
GPU_NOT_RUN = (
    Absent(
        "TensorRT-LLM", "its newest release on the package index, 1.2.1",
        "the index has a stub alone, whose wheel is fetched from elsewhere; it asks for torch below 2.10 and Triton "
        "3.5.1, and the machine has torch 2.11",
    ),
    Absent(
        "SGLang", "sglang 0.5.23 and its parts from the package index",
        "asks for torch 2.14.1 by sglang-kernel 0.4.10 (a wheel of 373 MB, above what can be carried at once), "
        "FlashInfer 0.7.2 and CUTLASS's Python package; the machine has torch 2.11",
    ),
    Absent(
        "LMDeploy", "lmdeploy 0.18.0 from the package index",
        "its wheel (107 MB, above what can be carried at once) is built for CUDA 12 and asks for NVIDIA's CUDA 12 "
        "libraries, hundreds of MB more; the machine has CUDA 13",
    ),
)  # fmt: skip
"""Engines that were looked at for a GPU machine without a network, and why they were not brought there."""
