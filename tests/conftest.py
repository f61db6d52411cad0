"""Fixtures every test may use: the embedded default model, as shipped and as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, fetched once into the project's cache."""
    from hotplug.core.weights.source import resolve

    return resolve("smollm2")


@pytest.fixture(scope="session")
def smollm2_hf_dir(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as float32 safetensors with config.json and tokenizer.json: transformers' reference.

    Load with `AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)`.
    """
    from safetensors.torch import save_file

    from hotplug.core.text.tokenizer import load_tokenizer
    from hotplug.core.weights.checkpoint import open_checkpoint

    folder = tmp_path_factory.mktemp("smollm2-hf")
    checkpoint = open_checkpoint(smollm2_path)
    config = checkpoint.config
    save_file(
        {name: tensor.float().contiguous() for name, tensor in checkpoint.tensors()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    document = {
        "architectures": [config.architecture],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(document))
    tokenizer = load_tokenizer(smollm2_path)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": tokenizer.chat_template}
                   | special)
    )  # fmt: skip
    return folder
