"""The embedded default model as a Hugging Face folder, so that transformers can load the very same weights.

The tests compare tokens with it, the benchmark compares speed.
"""

from __future__ import annotations

import json
from pathlib import Path


def write_hf_folder(source: Path, folder: Path) -> None:
    """Write the Llama checkpoint at `source` to `folder`: float32 safetensors, config.json, the tokenizer.

    Load it with `AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)`.
    """
    from safetensors.torch import save_file

    from hotplug.core.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(source)
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
    write_tokenizer(source, folder)


def write_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer of the checkpoint at `source`, with its chat template, as Hugging Face's files."""
    from hotplug.core.text.tokenizer_files import load_tokenizer

    tokenizer = load_tokenizer(source)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": tokenizer.chat_template,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
