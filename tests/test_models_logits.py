"""Same logits as transformers, for every supported architecture and option, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_runs import ModelRun

from hotplug.core.models.families import MODELS

PROMPT = [(7 * i * i + 3 * i + 5) % 64 for i in range(23)]
TOLERANCE = 1e-4

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
}
# four frequencies: one kept, one blended, two stretched
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
GEMMA3 = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-no-gqa": ("Llama", {"num_key_value_heads": 6}),
    "llama-head-dim": ("Llama", {"head_dim": 16}),
    "llama-attention-bias": ("Llama", {"attention_bias": True}),
    "llama-mlp-bias": ("Llama", {"mlp_bias": True}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama-llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-yarn-rope": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-betas": ("Llama", {"rope_parameters": {**YARN, "beta_fast": 4.0, "beta_slow": 2.0}}),
    "llama-yarn-mscale": ("Llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen2-mixed-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "qwen3-bias": ("Qwen3", {"attention_bias": True}),
    "qwen3-window": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["sliding_attention"] * 2},
    ),
    "qwen3-moe": ("Qwen3Moe", EXPERTS),
    "qwen3-moe-unnormalized": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": False, "num_experts_per_tok": 1}),
    "qwen3-moe-dense-layer": ("Qwen3Moe", {**EXPERTS, "mlp_only_layers": [1], "attention_bias": True}),
    "qwen3-moe-sparse-step": ("Qwen3Moe", {**EXPERTS, "decoder_sparse_step": 2, "num_experts_per_tok": 8}),
    "gemma3": ("Gemma3", GEMMA3),
    "gemma3-scaled-rope": ("Gemma3", {**GEMMA3, "rope_parameters": GEMMA3_ROPE, "query_pre_attn_scalar": 10}),
    "qwen3-moe-window": ("Qwen3Moe", {**EXPERTS, "use_sliding_window": True, "sliding_window": 5}),
}


@pytest.fixture(scope="module", params=CASES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A saved random model and transformers' logits of PROMPT, float32 [len(PROMPT), vocab]."""
    import transformers

    family, options = CASES[request.param]
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    config = kind(**{**SIZES, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():  # transformers leaves biases 0 and norms 1, which would hide a mix-up
            parameter.normal_(0.0, 0.2) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
        logits = model(torch.tensor([PROMPT])).logits[0]
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, logits


def difference(reference: tuple[Path, torch.Tensor], chunks: list[int], **options: object) -> float:
    folder, expected = reference
    return (ModelRun(folder, **options).logits(PROMPT, chunks) - expected).abs().max().item()


def test_every_architecture_has_a_case() -> None:
    assert {f"{family}ForCausalLM" for family, _ in CASES.values()} == set(MODELS)


def test_logits_of_a_whole_prefill_equal_transformers(reference: tuple[Path, torch.Tensor]) -> None:
    assert difference(reference, [len(PROMPT)]) < TOLERANCE


def test_logits_of_a_prefill_in_chunks_equal_transformers(reference: tuple[Path, torch.Tensor]) -> None:
    assert difference(reference, [3, 9, 2, 9]) < TOLERANCE


def test_logits_of_step_by_step_decoding_equal_transformers(reference: tuple[Path, torch.Tensor]) -> None:
    assert difference(reference, [6, *[1] * (len(PROMPT) - 6)]) < TOLERANCE


def test_logits_of_the_references_alone_equal_transformers(reference: tuple[Path, torch.Tensor]) -> None:
    forced = ("attention=reference", "rms_norm=reference")
    assert difference(reference, [10, 5, *[1] * 8], force=forced, block_size=8) < TOLERANCE


def test_references_are_larger_than_the_tolerance(reference: tuple[Path, torch.Tensor]) -> None:
    assert reference[1].std().item() > 0.1
