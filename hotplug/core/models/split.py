"""A model over several ranks (Shoeybi et al., Megatron-LM, 2019): each has some heads of every layer and a part of
the feed-forward width, of all experts where there are several, and a part of the vocabulary.

What comes out of a layer's attention and feed-forward part is a part of a sum, which the norm after it adds up.
"""

from __future__ import annotations

import dataclasses

from hotplug.core.layers.destination import Destination
from hotplug.core.layers.shard import OnFirstRank, shard
from hotplug.core.weights.config import ModelConfig

_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
"""Checkpoint matrices of which a rank has some rows, and entries of their biases."""
_COLUMNS = ("o_proj", "down_proj")
"""Those of which it has some columns. Their products are parts of a sum, to which one rank alone adds the bias."""
_DIVIDED = {
    "num_heads": "attention heads",
    "num_kv_heads": "key/value heads",
    "intermediate_size": "feed-forward width",
    "moe_intermediate_size": "width of an expert",
    "vocab_size": "vocabulary",
}


def split_faults(config: ModelConfig, ranks: int) -> list[str]:
    """Why a model cannot be split over `ranks` ranks, every reason."""
    return [
        f"the {words} ({getattr(config, name)}) cannot be divided by {ranks}"
        for name, words in _DIVIDED.items()
        if getattr(config, name) % ranks
    ]


def local_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """The config of what one rank computes in each layer. The vocabulary stays whole: all ranks see all scores."""
    divided = {name: getattr(config, name) // ranks for name in _DIVIDED if name != "vocab_size"}
    return config if ranks == 1 else dataclasses.replace(config, **divided)


def destination_of_rank(name: str, destination: Destination, rank: int, ranks: int) -> Destination:
    """Where the checkpoint tensor `name` goes on a rank: `destination` takes the rank's part of it, or all."""
    matrix, _, kind = name.rpartition(".")
    matrix = matrix.rpartition(".")[2]
    if ranks == 1 or matrix not in (*_ROWS, *_COLUMNS):
        return destination
    if matrix in _ROWS:
        return shard(destination, 0, rank, ranks)
    return OnFirstRank(destination, rank) if kind == "bias" else shard(destination, 1, rank, ranks)
