"""What a checkpoint says of its model, in one shape whatever the file format said it in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding parameters (Su et al., RoFormer; scaling: see `kind`).

    kind: "default"; "linear" (positions divided by `factor`); "llama3" (Llama 3.1's piecewise frequency
    scaling); "yarn" (Peng et al., YaRN). `freq_factors` divides each inverse frequency (GGUF's
    rope_freqs tensor, the same information as "llama3" in another form).
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    freq_factors: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of a decoder-only transformer. Sizes in elements, `eos_token_ids` as the model ends."""

    architecture: str
    """The Hugging Face class name, e.g. LlamaForCausalLM."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    activation: str = "silu"
    """Of the gated feed-forward layer: its op is this name with `_mul`."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Bias on q, k and v (Qwen2 has it by architecture; Llama by option)."""
    output_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    sliding_window: int | None = None
    """Tokens a query sees, itself included; None is full attention."""
    sliding_layers: frozenset[int] = frozenset()
    """Layers that use `sliding_window`; empty when it is None."""
    sliding_rope: RopeConfig | None = None
    """Rotary parameters of those layers, where they differ."""
    attention_scale: float | None = None
    """What scores are multiplied by; None is head_dim ** -0.5."""
    num_experts: int = 0
    """Of each sparse feed-forward layer; 0 in a dense model."""
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
    """Width of one expert."""
    norm_topk_prob: bool = False
    """Whether the weights of a token's experts are made to sum to 1."""
    sparse_layers: frozenset[int] = frozenset()
    """Layers whose feed-forward part is a mixture of experts."""
    dtype: str = "float32"
    """The checkpoint's dtype name; what `dtype=auto` starts from."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The source's own keys (config.json), for model plugins that need more."""
