"""Architectures and workloads of the GPU benchmark: public models' shapes with random weights, random token ids."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
    "bos_token_id": 128000, "eos_token_id": 128001, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "torch_dtype": "bfloat16", "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama8b": {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
    "llama1b": {**_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    "llama3b": {**_LLAMA, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    "qwen3moe": {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu",
                 "attention_bias": False, "bos_token_id": 151643, "eos_token_id": 151645, "rms_norm_eps": 1e-6,
                 "rope_theta": 1e6, "torch_dtype": "bfloat16", "vocab_size": 151936,
                 "max_position_embeddings": 131072, "tie_word_embeddings": False, "head_dim": 128,
                 "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
                 "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128,
                 "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen3-8b": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
                 "attention_bias": False, "bos_token_id": 151643, "eos_token_id": 151645, "rms_norm_eps": 1e-6,
                 "rope_theta": 1e6, "torch_dtype": "bfloat16", "vocab_size": 151936,
                 "max_position_embeddings": 40960, "tie_word_embeddings": False, "head_dim": 128,
                 "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip


class Workload(NamedTuple):
    """So many requests at once, each of `inputs` prompt tokens and `outputs` generated ones."""

    requests: int
    inputs: int
    outputs: int

    def prompts(self, name: str, seed: int, vocab: int = 100_000) -> list[list[int]]:
        """Random token ids, the same for the same name and seed."""
        draw = random.Random(f"{name}{seed}")
        return [[draw.randrange(1000, vocab) for _ in range(self.inputs)] for _ in range(self.requests)]


WORKLOADS = {
    "decode1": Workload(1, 128, 256),
    "decode64": Workload(64, 1024, 256),
    "decode256": Workload(256, 256, 256),
    "prefill": Workload(32, 4096, 1),
    "mixed": Workload(512, 512, 256),
    "long8": Workload(8, 32000, 128),
    "decode8": Workload(8, 512, 256),
    "decode32": Workload(32, 2048, 256),
    "one20k": Workload(1, 20000, 128),
}
"""The last three have no peer's figure: lengths and batches between those that are tuned for."""


def model_folder(name: str) -> Path:
    """A folder with the model's config.json."""
    folder = Path(tempfile.gettempdir()) / "hotplug-bench-models" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODELS[name]))
    return folder
