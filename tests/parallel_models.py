"""Small random models that several ranks can share, and a set of requests that uses all that an engine has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf_files import random_tensors, tensor_shapes, write_gguf

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.request import Request, SamplingParams, TokenDelta

SIZES = {
    "vocab_size": 258, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
EXPERTS = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "mlp_only_layers": [0]}),
    "gemma3": (
        "Gemma3",
        {"head_dim": 16, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}


def save(folder: Path, kind: str) -> Path:
    """A model of `MODELS` as transformers saves it, biases and norms away from 0 and 1; or "packed", a GGUF file."""
    if kind == "packed":
        return write_gguf(folder / "model.gguf", random_tensors(tensor_shapes()), quant=gguf.GGMLQuantizationType.Q8_0)
    import transformers

    family, options = MODELS[kind]
    torch.manual_seed(1)
    kind = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    config = kind(**{**SIZES, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def tokenizer(folder: Path) -> None:
    """Add a byte-level tokenizer to a folder."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))


GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, seed=11, max_tokens=24, ignore_eos=True)
PARAMS = [
    GREEDY,
    SAMPLED,
    SamplingParams(temperature=1.2, top_k=20, top_p=0.9, min_p=0.01, seed=5, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, max_tokens=24,
                   logit_bias={7: 2.0}, min_tokens=4),
    SamplingParams(temperature=0.7, seed=2, max_tokens=12, logprobs=2, prompt_logprobs=1, ignore_eos=True),
]  # fmt: skip
PROMPTS = [[5, 6, 7, 8] * 3, [9, 10], list(range(2, 60)), [5, 6, 7, 8] * 3 + [40], [30, 31, 32]]
"""One longer than the steps that tests allow, two with a prefix in common."""


def requests() -> list[Request]:
    return [
        Request(id=str(i), prompt_token_ids=prompt, sampling=params, eos_token_ids=(1,))
        for i, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))
    ]


def engine(model: Path, ranks: int, **options: Any) -> EngineCore:
    fixed = {"device": "cpu", "dtype": "float32", "max_model_len": 256, "kv_cache_memory": "1MiB", "block_size": 4,
             "max_num_seqs": 8, "max_num_batched_tokens": 24, "kv_cache_dtype": "float32"}  # fmt: skip
    return EngineCore(EngineConfig(model=str(model), tensor_parallel_size=ranks, **{**fixed, **options}))


def run(core: EngineCore, several: list[Request]) -> dict[str, list[TokenDelta]]:
    """What each request was given, by id."""
    found: dict[str, list[TokenDelta]] = {request.id: [] for request in several}
    for request in several:
        core.add(request)
    while core.has_work:
        for delta in core.step():
            found[delta.request_id].append(delta)
    return found


def tokens(found: dict[str, list[TokenDelta]]) -> dict[str, list[int]]:
    return {name: [token for delta in deltas for token in delta.token_ids] for name, deltas in found.items()}
