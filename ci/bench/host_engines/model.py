"""The model of the host's benchmark: two layers, 128 wide, random weights, and a real tokenizer.

Small enough that an engine which does compute it has little to compute; everything around it is of the usual size: a
vocabulary of 49,152 tokens, SmolLM2's tokenizer and chat template, a context of 8,192 tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

from reference_model import write_tokenizer

from hotplug.core.weights.source import cache_folder, resolve

VOCAB, MAX_LEN = 49152, 8192
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": MAX_LEN,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}


SMALL_VOCAB = 2048
"""For an engine that computes scores, where these would be most of a step."""


def write_config(folder: Path, vocab: int = VOCAB) -> None:
    """Write the configuration alone: for token ids in, token ids out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": vocab}))


def write_model(folder: Path) -> None:
    """Write what `--load-format dummy` needs, of hotplug and of vLLM, to `folder`."""
    write_config(folder)
    write_tokenizer(resolve("smollm2"), folder)


def model_folder() -> Path:
    """The model's folder in the cache, the tokenizer written if it is not there."""
    folder = cache_folder() / "bench-host" / "model"
    if not (folder / "tokenizer_config.json").exists():
        write_model(folder)
    write_config(folder)
    return folder
