"""A random Llama of three layers whose numbers overflow on one token: what a request with it computes is NaN."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

BAD = 5
"""The token."""
_HIDDEN, _WIDTH, _LAYERS, _HEADS, _KV_HEADS = 64, 96, 3, 4, 2


def write_overflowing_model(tiny: Path, folder: Path, dtype: str = "float16") -> Path:
    """A folder like `tiny`, with weights in `dtype`.

    In float16 the first layer drives one channel of the token over 65,504. Other types reach further: there its row of
    the embedding is NaN.
    """
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": _HIDDEN, "intermediate_size": _WIDTH, "num_hidden_layers": _LAYERS, "torch_dtype": dtype,
               "num_attention_heads": _HEADS, "num_key_value_heads": _KV_HEADS,
               "tie_word_embeddings": False}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(0)
    head = _HIDDEN // _HEADS

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random) * shape[-1] ** -0.5

    embedding = torch.randn((config["vocab_size"], _HIDDEN), generator=random)
    embedding[:, 0] = 0.0
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(_HIDDEN),
               "lm_head.weight": normal(config["vocab_size"], _HIDDEN)}  # fmt: skip
    for i in range(_LAYERS):
        layer = {
            "input_layernorm": torch.ones(_HIDDEN), "post_attention_layernorm": torch.ones(_HIDDEN),
            "self_attn.q_proj": normal(_HIDDEN, _HIDDEN), "self_attn.k_proj": normal(_KV_HEADS * head, _HIDDEN),
            "self_attn.v_proj": normal(_KV_HEADS * head, _HIDDEN), "self_attn.o_proj": normal(_HIDDEN, _HIDDEN),
            "mlp.gate_proj": normal(_WIDTH, _HIDDEN), "mlp.up_proj": normal(_WIDTH, _HIDDEN),
            "mlp.down_proj": normal(_HIDDEN, _WIDTH),
        }  # fmt: skip
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            layer[name][0] = 0.0  # the channel is the token's own
        tensors |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    if dtype == "float16":
        embedding[BAD, 0] = 60000.0
        tensors["model.layers.0.mlp.gate_proj.weight"][0] = torch.eye(_HIDDEN)[0] * 5.0
        tensors["model.layers.0.mlp.up_proj.weight"][0] = torch.eye(_HIDDEN)[0] * 50.0
        tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 4.0
    else:
        embedding[BAD] = float("nan")
    kind = getattr(torch, dtype)
    save_file({name: tensor.to(kind).contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder
