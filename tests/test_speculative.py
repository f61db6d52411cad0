"""Speculative decoding end to end: the tokens are those of one a step, with fewer steps; options, refusals, figures."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fake_platforms import FakePlatform, candidates, limits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hotplug import LLM
from hotplug.core.client.outputs import Completion
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import ConfigError, FeatureError, RequestError
from hotplug.core.logprobs import TokenLogprobs
from hotplug.core.ops.registry import Impl
from hotplug.core.ops.sampling import reject_sample
from hotplug.core.platform.base import DeviceInfo, ExecMode, Feature, Limits
from hotplug.core.request import Request, SamplingParams, TokenDelta
from hotplug.core.text.tokenizer_files import load_tokenizer

SPECULATES = frozenset({Feature.SPECULATIVE})
BLOCK = 2 * 2 * 16 * 2 * 8 * 4
"""Bytes of a block of the tiny model: layers, sides, tokens, heads, head dim, float32."""
VOCAB = 258


def facts(**changes: Any) -> Limits:
    return limits(**{"features": SPECULATES, "shared_host_memory": True, "accelerator": False, **changes})


def start(folder: Path, platform: Any = None, **options: Any) -> EngineCore:
    fixed = {"load_format": "dummy", "max_num_seqs": 8, "max_model_len": 256, "kv_cache_memory": "4MiB",
             "speculative_ngram_min": 2}  # fmt: skip
    platform = platform or FakePlatform(facts=facts())
    return EngineCore(EngineConfig(model=str(folder), **{**fixed, **options}), candidates=candidates(platform))


Asked = list[tuple[list[int], SamplingParams]]
Found = dict[str, tuple[list[int], str, int | None, list[Any]]]


def generate(core: EngineCore, asked: Asked, eos: tuple[int, ...] = ()) -> tuple[Found, int]:
    """What each request gave (tokens, reason, stop token, log-probabilities), and in how many steps."""
    before = core.stats().steps
    gave: dict[str, list[TokenDelta]] = {str(i): [] for i in range(len(asked))}
    for i, (prompt, params) in enumerate(asked):
        core.add(Request(id=str(i), prompt_token_ids=prompt, sampling=params, eos_token_ids=eos))
    while core.has_work:
        for delta in core.step():
            gave[delta.request_id].append(delta)
    found = {
        name: (
            [token for d in deltas for token in d.token_ids],
            str(deltas[-1].finish_reason),
            deltas[-1].stop_token,
            [(e.token_ids, e.rank) for d in deltas for e in d.logprobs or ()],
        )
        for name, deltas in gave.items()
    }
    assert core.stats().kv_blocks_used == 0
    return found, core.stats().steps - before


def asked_of(rng: random.Random, count: int) -> Asked:
    """Prompts with repetition; greedy and sampled requests with all that may go with speculation."""
    found: Asked = []
    for i in range(count):
        stem = [rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 9))]
        prompt = (stem * 6)[: rng.randint(1, 40)]
        params: dict[str, Any] = {"temperature": rng.choice([0.0, 0.0, 0.3, 1.0]), "seed": rng.randrange(2**40),
                                  "max_tokens": rng.randint(1, 60)}  # fmt: skip
        for name, values in {
            "top_k": [2, 5], "top_p": [0.2, 0.7], "min_p": [0.3], "logprobs": [0, 2], "min_tokens": [1],
            "logit_bias": [{5: 3.0, 9: -3.0}], "stop_token_ids": [tuple(range(2, VOCAB, 9))],
            "frequency_penalty": [0.5], "prompt_logprobs": [1], "speculative": [False],
        }.items():  # fmt: skip
            if rng.random() < 0.25:
                params[name] = rng.choice(values)
        if i % 3 == 0:
            params |= {"top_k": 1}  # the best token at any temperature: it repeats
        found.append((prompt, SamplingParams(**params)))
    return found


@pytest.fixture(scope="module")
def pair(tiny_model: Path) -> tuple[EngineCore, EngineCore]:
    """The same engine without and with speculation, both with few blocks and a prefix cache."""
    few = {"kv_cache_memory": 17 * BLOCK, "max_model_len": 128}
    return start(tiny_model, **few), start(tiny_model, speculative="ngram", **few)


@settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_outputs_are_those_without_it(pair: tuple[EngineCore, EngineCore], seed: int, count: int) -> None:
    plain, speculating = pair
    asked = asked_of(random.Random(seed), count)
    assert generate(speculating, asked, eos=(1,))[0] == generate(plain, asked, eos=(1,))[0]


def test_that_was_worth_testing(pair: tuple[EngineCore, EngineCore]) -> None:
    asked = asked_of(random.Random(1), 24)
    (_, steps), (_, fewer) = generate(pair[0], asked), generate(pair[1], asked)
    stats = pair[1].stats()
    assert fewer < steps
    assert stats.preemptions > 0
    assert 100 < stats.accepted_tokens < stats.proposed_tokens


@dataclass
class Capturing(FakePlatform):
    """Records a step as the function that made it, and counts the replays."""

    facts: Any = field(default_factory=lambda: facts(exec_modes=(ExecMode.CAPTURE, ExecMode.EAGER)))
    replays: int = 0

    def capture(self, step: Callable[[], Any], device: DeviceInfo) -> Callable[[], Any]:
        def replay() -> None:
            self.replays += 1
            step()

        return replay


PLATFORMS = {
    "asynchronous": lambda: FakePlatform(facts=facts(asynchronous=True)),
    "capturing": Capturing,
    "32-bit indices": lambda: FakePlatform(facts=facts(index_dtype="int32")),
    "steps that do not mix": lambda: FakePlatform(facts=facts(mixed_steps=False)),
}


@pytest.mark.parametrize("kind", PLATFORMS)
def test_outputs_are_those_without_it_on_platforms_of_other_facts(tiny_model: Path, kind: str) -> None:
    asked = asked_of(random.Random(2), 8)
    expected, _ = generate(start(tiny_model), asked)
    core = start(tiny_model, PLATFORMS[kind](), speculative="ngram")
    assert generate(core, asked)[0] == expected
    assert core.stats().accepted_tokens > 20


def test_steps_that_verify_are_captured_too(tiny_model: Path) -> None:
    platform = Capturing()
    core = start(tiny_model, platform, speculative="ngram", max_num_seqs=16)
    repeating = ([3, 4, 5] * 4, SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True))
    _, steps = generate(core, [repeating])
    assert core.stats().verifications > 3
    assert platform.replays == steps - 1  # all but the prompt's


def test_a_profiled_platform_has_run_a_step_that_verifies(tiny_model: Path) -> None:
    """Before it knows how much memory is left for the KV cache."""
    ran: list[int] = []

    def spy(tokens: Any, proposed: Any, first: Any) -> Any:
        ran.append(len(tokens))
        return reject_sample(tokens, proposed, first)

    own_memory = FakePlatform(facts=facts(shared_host_memory=False), total=64 << 20,
                              kernels=[Impl("reject_sample", "acme", make=lambda _: spy)])  # fmt: skip
    core = start(tiny_model, own_memory, kv_cache_memory=None, speculative="ngram")
    assert ran == [64]
    asked = asked_of(random.Random(3), 4)
    assert generate(core, asked)[0] == generate(start(tiny_model), asked)[0]


def test_it_is_refused_where_the_platform_does_not_declare_it(tiny_model: Path) -> None:
    undeclared = FakePlatform(facts=facts(features=frozenset()))
    with pytest.raises(FeatureError, match="speculative ngram needs the feature speculative, which is not declared"):
        start(tiny_model, undeclared, speculative="ngram")
    core = start(tiny_model, undeclared)
    assert not core.report()["speculative"]["available"]
    with pytest.raises(RequestError, match="speculative is refused"):
        core.add(Request(id="a", prompt_token_ids=[1, 2], sampling=SamplingParams(speculative=True)))


def test_a_request_has_it_without_the_servers_option(tiny_model: Path) -> None:
    core = start(tiny_model)
    ask = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, speculative=True)
    _, steps = generate(core, [([3, 4, 5] * 4, ask)])
    assert steps < 45
    report = core.report()["speculative"]
    assert report["available"] and report["default"] is None
    assert report["accepted_tokens"] == core.stats().accepted_tokens > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculative": "draft"}, "speculative must be one of ngram"),
        ({"speculative_tokens": 0}, "speculative_tokens must be between 1 and 63"),
        ({"speculative_ngram_min": 9}, r"speculative_ngram_min \(9\) is above speculative_ngram_max \(8\)"),
        ({"speculative_max_requests": 0}, "speculative_max_requests must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 6])
def test_a_stop_string_within_verified_tokens_cuts_text_and_tokens(tiny_model: Path, length: int) -> None:
    """The front end finds it; the completion is the one of a token a step, to the token."""
    llm = LLM(str(tiny_model), load_format="dummy", max_num_seqs=2, max_model_len=256, kv_cache_memory="4MiB",
              speculative="ngram", device="cpu")  # fmt: skip
    (x,) = llm.tokenizer.encode("x", add_special_tokens=False)
    params = SamplingParams(temperature=0.0, max_tokens=40, logit_bias={x: 100.0}, stop=("x" * length,), logprobs=0,
                            include_stop_str_in_output=True)  # fmt: skip
    (output,) = llm.generate("x" * 12, params, progress=False)[0].outputs
    assert (output.text, output.token_ids, output.stop_reason) == ("x" * length, [x] * length, "x" * length)
    assert output.logprobs is not None and len(output.logprobs) == length
    assert (llm.core.stats().accepted_tokens > 0) == (length > 1)


@settings(deadline=None, max_examples=200, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_completion_does_not_depend_on_how_many_tokens_come_at_once(tiny_model: Path, data: st.DataObject) -> None:
    tokenizer = load_tokenizer(tiny_model)
    text = data.draw(st.text("abé", min_size=1, max_size=30))
    tokens = tokenizer.encode(text, add_special_tokens=False)
    stop = tuple(data.draw(st.lists(st.text("abé", min_size=1, max_size=3), max_size=2)))
    include = data.draw(st.booleans())
    ended = data.draw(st.sampled_from([None, "length", "stop"]))
    params = SamplingParams(stop=stop, include_stop_str_in_output=include, stop_token_ids=(tokens[-1],))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(tokens)), max_size=8)) | {len(tokens)})

    def complete(ends: list[int]) -> tuple[Any, ...]:
        completion = Completion(0, params, tokenizer, (1,), [])
        whole: tuple[Any, ...] = ("", [], [], None, None)
        for begin, end in zip([0, *ends], ends, strict=False):
            last = end == len(tokens)
            delta = TokenDelta("r", tokens[begin:end], ended if last else None,
                               tokens[-1] if last and ended == "stop" else None,
                               [TokenLogprobs([t], [0.0], 1) for t in tokens[begin:end]])  # fmt: skip
            chunk = completion.push(delta)
            whole = (whole[0] + chunk.text, whole[1] + chunk.token_ids, whole[2] + (chunk.logprobs or []),
                     chunk.finish_reason, chunk.stop_reason)  # fmt: skip
            if completion.finished:
                break
        assert completion.num_tokens == len(whole[1]) == len(whole[2])
        return whole

    assert complete(cuts) == complete(list(range(1, len(tokens) + 1)))


REPEAT = (
    "The Amazon basin covers seven million square kilometres, of which five and a half million are covered by the "
    "rainforest. This region includes territory belonging to nine nations."
)


@pytest.mark.parametrize("quantization", [None, "packed"])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.5, "top_p": 0.9, "seed": 5}])
def test_smollm2_repeats_a_text_in_fewer_steps_and_the_same_words(
    smollm2_path: Path, quantization: str | None, sampling: dict[str, Any]
) -> None:
    llm = LLM(str(smollm2_path), dtype="float32", quantization=quantization, max_model_len=256, max_num_seqs=2,
              kv_cache_memory="128MiB", enable_prefix_cache=False)  # fmt: skip
    message = [{"role": "user", "content": f"Repeat the following text exactly:\n\n{REPEAT}"}]
    steps, texts = [], []
    for speculative in (False, True):
        before = llm.core.stats().steps
        params = SamplingParams(max_tokens=36, ignore_eos=True, speculative=speculative, **sampling)
        texts.append(llm.chat(message, params, progress=False)[0].outputs[0].token_ids)
        steps.append(llm.core.stats().steps - before)
    assert texts[1] == texts[0]
    assert steps[0] == 36
    if not sampling["temperature"]:
        assert steps[1] < 24
