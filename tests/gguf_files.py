"""Small models as GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, INNER, HEADS, KV_HEADS, VOCAB, LAYERS = 256, 512, 4, 2, 96, 2
HEAD_DIM = HIDDEN // HEADS
KV = KV_HEADS * HEAD_DIM

QUANT = gguf.GGMLQuantizationType


def tensor_shapes(layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(layers):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (HIDDEN,), f"blk.{i}.ffn_norm.weight": (HIDDEN,),
            f"blk.{i}.attn_q.weight": (HIDDEN, HIDDEN), f"blk.{i}.attn_k.weight": (KV, HIDDEN),
            f"blk.{i}.attn_v.weight": (KV, HIDDEN), f"blk.{i}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.ffn_gate.weight": (INNER, HIDDEN), f"blk.{i}.ffn_up.weight": (INNER, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, INNER),
        }  # fmt: skip
    return shapes


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    *,
    architecture: str = "llama",
    quant: Any = None,
    others: Mapping[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    rope_freq_base: float = 50000.0,
) -> Path:
    """A small model as GGUF; matrices in `quant`, or as `others` says of a part of their name; vectors float32.

    `metadata` holds more scalars.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(rope_freq_base)
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
        add[type(value)](key, value)
    for name, values in tensors.items():
        kind = next((other for part, other in (others or {}).items() if part in name), quant)
        if kind is None or values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, stored(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(values: np.ndarray, quant: Any) -> np.ndarray:
    """Values in GGUF's bytes. The package cannot quantize to k-quants, so those get random valid blocks."""
    try:
        return gguf.quants.quantize(values, quant)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[quant]
        rng = np.random.default_rng(1)
        blocks = rng.integers(0, 256, (values.size // block, size), dtype=np.uint8)
        scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        for at in {"Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,)}.get(quant.name, (0, 2)):
            blocks[:, at : at + 2] = scale
        return blocks.reshape(*values.shape[:-1], -1)
