"""A KV kind of its own: one tensor a block, with a token's keys and values beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hotplug.plugins import (
    Attention,
    BlockFormat,
    BlockTensor,
    Decoder,
    DecoderLayer,
    Extension,
    FullAttention,
    KVBlocks,
    KVSlot,
    KVSpec,
    ModelConfig,
    parse_hf_config,
)

ARCHITECTURE = "InterleavedLlamaForCausalLM"


@dataclass(frozen=True, kw_only=True)
class InterleavedAttention(FullAttention):
    """Keys and values of every token, in one tensor."""

    def tensors(self, form: BlockFormat) -> tuple[BlockTensor, ...]:
        keys, _ = super().tensors(form)
        return (
            BlockTensor((2, *keys.shape) if form.layout == "HND" else (keys.shape[0], 2, *keys.shape[1:]), keys.dtype),
        )


class InterleavedSlot(KVSlot):
    """A layer's keys and values as views of its tensor."""

    def caches(self, lane: KVBlocks) -> KVBlocks:
        (blocks,) = super().caches(lane)
        return blocks.unbind(1 if self.form.layout == "HND" else 2)

    def store(self, lanes: list[KVBlocks], written: KVBlocks) -> None:
        """Nothing: keys and values are written in place."""


class InterleavedLayer(DecoderLayer):
    class attention_class(Attention):  # noqa: N801  (an attribute of the layer)
        slot_class = InterleavedSlot


class InterleavedDecoder(Decoder):
    layer_class = InterleavedLayer

    @classmethod
    def kv_specs(cls, config: ModelConfig) -> list[KVSpec]:
        spec = InterleavedAttention(num_kv_heads=config.num_kv_heads, head_dim=config.head_dim)
        return [spec] * config.num_layers


def read_config(values: dict[str, Any], where: str, ends: tuple[int, ...]) -> ModelConfig:
    return parse_hf_config(values, where, (ARCHITECTURE,), ends)


def plugin() -> Extension:
    return Extension(models={ARCHITECTURE: InterleavedDecoder}, config_readers={ARCHITECTURE: read_config})
