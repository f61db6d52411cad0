"""Engines for the checks that run whole models: a small model with weights that leave no greedy choice in doubt."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import FeatureError
from hotplug.core.platform.base import ExecMode
from hotplug.core.request import Request, SamplingParams
from hotplug.core.startup.bind import bind
from hotplug.core.weights.dummy import parameter_shapes
from hotplug.core.weights.hf_config import read_hf_config
from hotplug.plugins.conformance.target import TRUSTED, Target

VOCAB = 300
MAX_LEN = 192
MARGINS = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.5}
"""Log-probability by which the chosen token must lead: a choice closer than this is nobody's fault."""
_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 128,
    "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": MAX_LEN, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "float32", "eos_token_id": 0,
}  # fmt: skip


def small_model(folder: Path, *, window: int | None = None) -> Path:
    """A folder with a checkpoint of two layers, drawn so that its greedy output wanders. Made once."""
    import safetensors.torch

    path = folder / f"model-{window}"
    if path.exists():
        return path
    path.mkdir(parents=True)
    sliding = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    (path / "config.json").write_text(json.dumps({**_CONFIG, **(sliding if window else {})}))
    random_numbers = torch.Generator().manual_seed(7)
    tensors = {}
    for name, shape in parameter_shapes(read_hf_config(path)).items():
        tensor = torch.randn(shape, generator=random_numbers)
        sharp = 3.0 if "q_proj" in name or "k_proj" in name else 1.0  # attention that tells positions apart
        scale = 2.0 if "embed" in name else sharp * shape[-1] ** -0.5
        tensors[name] = tensor.abs() if len(shape) == 1 else tensor * scale
    safetensors.torch.save_file(tensors, path / "model.safetensors")
    return path


@dataclass
class Output:
    """Greedy tokens of one request, and by how much each led."""

    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)


def config(target: Target, model: Path, **options: Any) -> EngineConfig:
    """An engine of the target for up to eight requests."""
    limits = target.limits
    fixed: dict[str, Any] = {
        "model": str(model), "device": target.name, "dtype": limits.dtypes[0], "quantization": "none",
        "max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": MAX_LEN, "kv_cache_memory": "16MiB",
    }  # fmt: skip
    return EngineConfig(**{**fixed, **options})


def modes(target: Target) -> list[ExecMode]:
    """The execution modes that the platform declares, op by op first: what fails there fails in the others too."""
    return sorted(target.limits.exec_modes, key=lambda mode: mode is not ExecMode.EAGER)


def smallest_block(target: Target, model: Path, mode: ExecMode) -> int:
    """The least of the declared block sizes that steps of this mode serve. Raises the last refusal if none is."""
    for size in (sizes := sorted(target.limits.block_sizes)):
        try:
            bind(config(target, model, block_size=size, exec=str(mode)), meta=True, candidates=target.candidates)
        except FeatureError:
            if size == sizes[-1]:
                raise
        else:
            break
    return size


@contextmanager
def artifacts(target: Target) -> Iterator[None]:
    """While it lasts, compiled steps are kept in the target's own folder."""
    before = os.environ.get("HOTPLUG_CACHE")
    os.environ["HOTPLUG_CACHE"] = str(target.folder / "artifacts")
    try:
        yield
    finally:
        if before is None:
            del os.environ["HOTPLUG_CACHE"]
        else:
            os.environ["HOTPLUG_CACHE"] = before


def trusted(target: Target, model: Path, **options: Any) -> EngineConfig:
    """The same engine on the host's references."""
    return config(target, model, device=TRUSTED, exec="eager", **options)


def start(target: Target, engine_config: EngineConfig) -> EngineCore:
    """An engine whose shapes, if it compiles, are all ready."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reference ops are in the certificate
        core = EngineCore(engine_config, candidates=target.candidates)
    core.wait_until_compiled()
    return core


def generate(core: EngineCore, prompts: Mapping[str, Sequence[int]], max_tokens: int) -> dict[str, Output]:
    """Greedy outputs of prompts that run together."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=2)
    for name, prompt in prompts.items():
        core.add(Request(id=name, prompt_token_ids=list(prompt), sampling=params))
    outputs: dict[str, Output] = {name: Output() for name in prompts}
    while core.has_work:
        for delta in core.step():
            output = outputs[delta.request_id]
            output.tokens += delta.token_ids
            for entry in delta.logprobs or ():
                first, second = entry.logprobs[1], entry.logprobs[2]
                output.margins.append(first - second)
    return outputs


def prompts(count: int, *, longest: int = 100, seed: int = 3) -> dict[str, list[int]]:
    """Random prompts of one token to `longest`."""
    rng = random.Random(seed)
    lengths = [1, longest, *(rng.randint(2, longest) for _ in range(count))][:count]
    return {str(i): [rng.randrange(1, VOCAB) for _ in range(length)] for i, length in enumerate(lengths)}


def with_prefix(length: int, count: int, *, seed: int = 5) -> dict[str, list[int]]:
    """Prompts of one prefix of `length` tokens and 1 to `count` tokens of their own."""
    rng = random.Random(seed)
    shared = [rng.randrange(1, VOCAB) for _ in range(length)]
    return {str(i): shared + [rng.randrange(1, VOCAB) for _ in range(i + 1)] for i in range(count)}


def first_difference(got: Mapping[str, Output], want: Mapping[str, Output], dtype: str) -> str:
    """Where outputs part, in words; empty if they agree. After a choice that is too close no more is compared."""
    for name, expected in want.items():
        output = got[name]
        for i, token in enumerate(expected.tokens):
            if i < len(output.tokens) and output.tokens[i] == token:
                continue
            if expected.margins[i] < MARGINS[dtype]:
                break
            found = output.tokens[i] if i < len(output.tokens) else "none"
            return f"request {name}: output token {i} is {found}, the references give {token}"
    return ""
