"""SmolLM2 in float32 gives the tokens that transformers gives, however the engine batches, caches or preempts."""

from __future__ import annotations

import pytest
from prompts import PROMPTS

from hotplug import LLM, SamplingParams

NEW_TOKENS = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def expected(smollm2_hf_dir) -> list[list[int]]:
    """What `transformers.generate` gives for all prompts at once, padded on the left; alone it takes minutes."""
    import torch
    from transformers import AutoModelForCausalLM

    from hotplug.core.text.tokenizer_files import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2_hf_dir, dtype=torch.float32)
    tokenizer = load_tokenizer(smollm2_hf_dir)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    width = max(map(len, prompts))
    answers = model.generate(
        torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return answers[:, width:].tolist()


def engine(smollm2_path, **options) -> LLM:
    options = {"dtype": "float32", "quantization": "none", "max_model_len": 512, "kv_cache_memory": "512MiB", **options}
    return LLM(str(smollm2_path), **options)


def tokens(llm: LLM, prompts=PROMPTS, params=GREEDY) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, progress=False)]


@pytest.mark.slow
def test_one_at_a_time(smollm2_path, expected):
    llm = engine(smollm2_path, enable_prefix_cache=False)
    assert [tokens(llm, [prompt])[0] for prompt in PROMPTS] == expected


def test_sixteen_at_once_with_mixed_lengths_and_again_from_the_prefix_cache(smollm2_path, expected):
    llm = engine(smollm2_path, max_num_seqs=16)
    assert tokens(llm) == expected
    hits = llm.core.stats().prefix_hits
    assert tokens(llm) == expected
    assert llm.core.stats().prefix_hits > hits


@pytest.mark.slow
def test_with_a_token_budget_of_64(smollm2_path, expected):
    llm = engine(smollm2_path, max_num_batched_tokens=64, max_num_seqs=16)
    assert tokens(llm) == expected


@pytest.mark.slow
def test_with_a_pool_so_small_that_requests_are_preempted(smollm2_path, expected):
    # about 24 blocks of 16 tokens for sequences of 5 to 9 blocks each
    llm = engine(smollm2_path, max_num_seqs=16, max_model_len=256, kv_cache_memory=25 * 16 * 46080)
    assert tokens(llm) == expected
    assert llm.core.stats().preemptions > 0


@pytest.mark.slow
def test_with_speculation(smollm2_path, expected):
    llm = engine(smollm2_path, max_num_seqs=16, speculative="ngram", speculative_max_requests=16)
    assert tokens(llm) == expected
    assert llm.core.stats().accepted_tokens > 100


@pytest.mark.slow
def test_seeded_sampling_repeats_itself_across_batch_compositions(smollm2_path):
    llm = engine(smollm2_path, max_num_seqs=16)
    params = [SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=i, max_tokens=24) for i in range(len(PROMPTS))]
    together = tokens(llm, PROMPTS, params)
    alone = [tokens(llm, [prompt], [one])[0] for prompt, one in zip(PROMPTS[:6], params[:6], strict=True)]
    assert together[:6] == alone
    assert tokens(llm, PROMPTS[::-1], params[::-1]) == together[::-1]
