"""Engines on the null device: whole chains of tokens, whatever is asked of sampling, and no gap between steps."""

import json
import time

import pytest
from null_device import NullDevice
from null_device.clock import Clock
from null_device.tokens import chain

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.platform.discovery import Loaded, discover
from hotplug.core.request import Request, SamplingParams
from hotplug.vendor import Platform, optional

VOCAB = 1024
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "bos_token_id": 0,
    "eos_token_id": 1, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "vocab_size": VOCAB, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
MODELS = {
    "llama": LLAMA,
    "qwen3-moe": {
        **LLAMA, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "head_dim": 8,
    },
}  # fmt: skip


@pytest.fixture
def start(tmp_path):
    def make(model="llama", step=0.0, **options):
        (tmp_path / "config.json").write_text(json.dumps(MODELS[model]))
        platform = NullDevice()
        platform.clock = Clock(step)
        found = discover([Loaded("null_device", "null_device:NullDevice", "null-device 1.0.0", plugin=platform)])
        options = {"max_num_seqs": 16, "kv_cache_memory": "8MiB", **options}
        return EngineCore(EngineConfig(model=str(tmp_path), load_format="dummy", **options), candidates=found)

    return make


def run(core, prompts, **sampling):
    """Tokens of each prompt."""
    found = {}
    for i, prompt in enumerate(prompts):
        params = {"temperature": 0.0, "max_tokens": 8 + i, "ignore_eos": True, **sampling}
        core.add(Request(id=str(i), prompt_token_ids=prompt, sampling=SamplingParams(**params)))
    while core.has_work:
        for delta in core.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    return [found[str(i)] for i in range(len(prompts))]


PROMPTS = [[(7 * i + j) % VOCAB for j in range(5 + 40 * i)] for i in range(9)]


def chains(prompts):
    return [chain(prompt[-1], VOCAB, 8 + i) for i, prompt in enumerate(prompts)]


def test_it_is_a_platform_with_a_runtime():
    assert all(
        isinstance(NullDevice(), protocol)
        for protocol in (Platform, optional.HasRuntime, optional.HasCapture, optional.HasKV)
    )


@pytest.mark.parametrize("model", MODELS)
def test_no_reference_runs_in_a_plain_step(start, model):
    sites = start(model).report()["sites"]
    left = {site["op"] for site in sites if site["provider"] == "reference"}
    assert left <= {"penalties", "logprobs", "reject_sample"}


@pytest.mark.parametrize("options", [{}, {"exec": "eager"}, {"max_num_seqs": 2, "max_num_batched_tokens": 32},
                                     {"kv_cache_memory": "256KiB"}, {"speculative": "ngram"}])  # fmt: skip
@pytest.mark.parametrize("model", MODELS)
def test_each_request_gets_its_chain(start, model, options):
    assert run(start(model, **options), PROMPTS) == chains(PROMPTS)


@pytest.mark.parametrize("sampling", [{"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.3}, {"logprobs": 2},
                                      {"prompt_logprobs": 1}, {"min_tokens": 4}])  # fmt: skip
def test_sampling_parameters_leave_the_chain(start, sampling):
    assert run(start(), PROMPTS[:4], **sampling) == chains(PROMPTS[:4])


def test_a_forbidden_token_is_not_given(start):
    forbidden = chain(PROMPTS[0][-1], VOCAB, 1)[0]
    (tokens,) = run(start(), PROMPTS[:1], stop_token_ids=(forbidden,), min_tokens=2)
    assert tokens[0] != forbidden


def test_the_model_s_end_of_sequence_ends_a_request(start):
    before = next(t for t in range(VOCAB) if chain(t, VOCAB, 3)[2] == 1)
    core = start()
    core.add(Request(id="0", prompt_token_ids=[5, before], sampling=SamplingParams(), eos_token_ids=(1,)))
    deltas = []
    while core.has_work:
        deltas += core.step()
    assert [t for d in deltas for t in d.token_ids] == chain(before, VOCAB, 3)
    assert deltas[-1].finish_reason == "stop"


def test_the_device_has_no_gap_between_steps(start):
    core = start(step=0.004)
    run(core, PROMPTS[:4])  # records the sizes
    steps, best = core.stats().steps, 1.0
    for _ in range(3):
        begin = time.perf_counter()
        run(core, PROMPTS[:1] * 4, max_tokens=50)
        best = min(best, time.perf_counter() - begin)
    steps = (core.stats().steps - steps) / 3
    assert 50 <= steps <= 52
    assert 0.004 * 50 <= best <= 0.004 * steps * 1.2
