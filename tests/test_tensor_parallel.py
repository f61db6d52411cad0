"""Two ranks give the tokens of one: every family, way to sample and kind of step, on the CPU platform over gloo."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import parallel_models
import psutil
import pytest
import torch
from fake_platforms import FakePlatform, candidates, limits
from parallel_models import GREEDY, PROMPTS, SAMPLED, engine, requests, run, save, tokens

from hotplug import LLM, AsyncLLM
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import ConfigError, EngineDeadError, FeatureError
from hotplug.core.models.decoder import Qwen3Decoder
from hotplug.core.models.families import MODELS
from hotplug.core.parallel.mesh import Mesh
from hotplug.core.platform.base import DeviceInfo, Feature
from hotplug.core.quant.packed_scheme import PackedScheme
from hotplug.core.request import Request, SamplingParams, TokenDelta
from hotplug.core.startup.bind import Bound, bind
from hotplug.core.startup.ranks import check_ranks, packed_split_faults
from hotplug.core.startup.warmup import run_on_meta
from hotplug.core.startup.weight_format import WeightFormat

pytestmark = pytest.mark.timeout(180)
KINDS = [*parallel_models.MODELS, "packed"]
MANY = SamplingParams(temperature=0.8, seed=4, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = save(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return make


@pytest.fixture
def start() -> Iterator[Callable[..., EngineCore]]:
    """Starts engines, and closes them at the end."""
    cores: list[EngineCore] = []

    def make(*args: Any, **options: Any) -> EngineCore:
        cores.append(engine(*args, **options))
        return cores[-1]

    yield make
    for core in cores:
        core.close()


def logprobs(found: dict[str, list[TokenDelta]], request_id: str) -> list[float]:
    """Of a request's tokens and of its prompt's."""
    entries = [entry for delta in found[request_id] for entry in delta.logprobs or ()]
    entries += [entry for entry in found[request_id][0].prompt_logprobs or () if entry is not None]
    return [value for entry in entries for value in entry.logprobs]


# --- the same tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_the_tokens_of_one(kind: str, model: Callable[[str], Path], start: Any) -> None:
    """With chunked prefill (prompts are longer than a step), a shared prefix, penalties and log-probabilities."""
    one, two = start(model(kind), 1), start(model(kind), 2)
    several = requests() if kind != "packed" else [r for r in requests() if max(r.prompt_token_ids) < 96]
    expected, found = run(one, several), run(two, several)
    assert tokens(found) == tokens(expected)
    assert len({tuple(t) for t in tokens(expected).values()}) == len(several)
    for request in several:
        ours, theirs = logprobs(found, request.id), logprobs(expected, request.id)
        assert len(ours) == len(theirs)
        near = 2e-2 if kind == "packed" else 2e-4
        assert all(math.isclose(a, b, abs_tol=near) for a, b in zip(ours, theirs, strict=True))
    assert two.num_blocks == one.num_blocks
    assert two.stats().prefix_hits == one.stats().prefix_hits > 0
    assert two.bound.kv.block_bytes * 2 == one.bound.kv.block_bytes


@pytest.mark.parametrize(
    "options",
    [
        {"exec": "eager"},
        pytest.param({"dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}, marks=pytest.mark.slow),
        {"kv_cache_memory": "36KiB"},
        {"kv_cache_memory": "36KiB", "swap_space": "1MiB"},
        {"speculative": "ngram", "speculative_ngram_min": 1},
        pytest.param({"trace_ops": True}, marks=pytest.mark.slow),
    ],
    ids=["eager", "bfloat16", "preemption", "swap", "speculation", "trace"],
)
def test_ways_to_run(options: dict[str, Any], model: Callable[[str], Path], start: Any) -> None:
    one, two = start(model("llama"), 1, **options), start(model("llama"), 2, **options)
    several = requests()
    if "speculative" in options:
        several = several[:2]
    if "kv_cache_memory" in options:  # all fit with their prompts, and not with their output
        several = [Request(id=str(i), prompt_token_ids=[9 + i] * 6, sampling=MANY, eos_token_ids=()) for i in range(5)]
    expected, found = tokens(run(one, several)), tokens(run(two, several))
    if options.get("dtype") == "bfloat16":  # partial sums are rounded, so near ties may fall otherwise
        assert {name: len(ids) for name, ids in found.items()} == {name: len(ids) for name, ids in expected.items()}
        assert found["0"][:4] == expected["0"][:4]
        return
    assert found == expected
    stats = two.stats()
    assert (stats.preemptions > 0) == ("kv_cache_memory" in options)
    assert (stats.blocks_swapped_in > 0) == ("swap_space" in options)
    assert (stats.accepted_tokens > 0) == ("speculative" in options)
    if "trace_ops" in options:
        assert {"all_reduce", "all_gather"} <= {entry["op"] for entry in two.trace()["ops"]}


@pytest.mark.slow
def test_four_ranks_over_zmq_give_the_tokens_of_one(
    model: Callable[[str], Path], tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel_models.SIZES["num_key_value_heads"], before = 4, parallel_models.SIZES["num_key_value_heads"]
    parallel_models.SIZES["vocab_size"], vocab = 260, parallel_models.SIZES["vocab_size"]
    folder = save(tmp_path, "llama")
    parallel_models.SIZES |= {"num_key_value_heads": before, "vocab_size": vocab}
    monkeypatch.setattr("hotplug.core.startup.rank_processes.TRANSPORT", "zmq")
    assert tokens(run(start(folder, 4), requests())) == tokens(run(start(folder, 1), requests()))


@pytest.mark.slow
def test_three_ranks_share_smollm2_in_its_groups(smollm2_path: Path, start: Any) -> None:
    """Nine heads and three key/value heads; groups are split at their borders, so that logits differ by rounding."""
    params = SamplingParams(temperature=0.0, max_tokens=8)
    prompt = [504, 3575, 282, 4649, 314]  # "The capital of France is"
    request = Request(id="r", prompt_token_ids=prompt, sampling=params, eos_token_ids=(2,))
    options = {"kv_cache_memory": "64MiB", "block_size": 16, "max_num_batched_tokens": 64}
    one, three = start(smollm2_path, 1, **options), start(smollm2_path, 3, **options)
    assert three.bound.kernels.weights.name == one.bound.kernels.weights.name
    assert tokens(run(three, [request])) == tokens(run(one, [request]))


def test_llm_and_async_llm(model: Callable[[str], Path]) -> None:
    folder = model("llama")
    parallel_models.tokenizer(folder)
    options: dict[str, Any] = {"device": "cpu", "max_model_len": 256, "kv_cache_memory": "1MiB", "dtype": "float32"}
    params = [GREEDY, SAMPLED]
    expected = LLM(str(folder), **options).generate(PROMPTS[:2], params, progress=False)
    threads = torch.get_num_threads()
    llm = LLM(str(folder), tensor_parallel_size=2, **options)
    found = llm.generate(PROMPTS[:2], params, progress=False)
    with pytest.raises(ConfigError, match="group already"):
        LLM(str(folder), tensor_parallel_size=2, **options)
    llm.close()
    llm.close()
    assert torch.get_num_threads() == threads
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate([[1]], progress=False)

    async def served() -> list[Any]:
        front = AsyncLLM(EngineConfig(model=str(folder), tensor_parallel_size=2, **options))
        await front.start()
        try:
            await front.wait_ready()
            return await asyncio.gather(*(front.generate(p, s) for p, s in zip(PROMPTS[:2], params, strict=True)))
        finally:
            await front.close()

    ids = [output.outputs[0].token_ids for output in expected]
    assert [output.outputs[0].token_ids for output in found] == ids
    assert [output.outputs[0].token_ids for output in asyncio.run(served())] == ids


# --- what a rank has -------------------------------------------------------------------------------


def bound(folder: Path, rank: int = 0, ranks: int = 1, **options: Any) -> Bound:
    config = EngineConfig(model=str(folder), device="cpu", tensor_parallel_size=ranks, max_model_len=64, **options)
    return bind(config, meta=True, rank=rank)


def weight_bytes(part: Bound) -> int:
    return sum(p.nbytes for p in {id(p): p for p in part.model.decoder.parameters()}.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_has_half_of_the_weights(kind: str, model: Callable[[str], Path]) -> None:
    folder = model(kind)
    whole = weight_bytes(bound(folder))
    assert 0.5 <= weight_bytes(bound(folder, 0, 2)) / whole < 0.53
    assert weight_bytes(bound(folder, 1, 2)) == weight_bytes(bound(folder, 0, 2))


def test_all_ranks_bind_the_same_plan_and_its_collectives_are_in_it(model: Callable[[str], Path]) -> None:
    one, first, second = bound(model("llama")), bound(model("llama"), 0, 2), bound(model("llama"), 1, 2)
    assert first.kernels.plan.hash == second.kernels.plan.hash != one.kernels.plan.hash

    def collectives(part: Bound) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for choice in part.kernels.plan.choices:
            if choice.spec.op.startswith("all_"):
                found.setdefault(choice.spec.op, []).append(choice.spec.site)
        return found

    norms = ["layers.0.mlp_norm", "layers.1.attn_norm", "layers.1.mlp_norm", "norm"]
    assert collectives(one) == {}
    assert collectives(first) == {
        "all_reduce": ["embed.sum", *(f"{site}.sum" for site in norms)],
        "all_reduce_add_norm": norms,
        "all_gather": ["logits.gather"],
    }
    assert first.report()["ranks"] == 2


# --- what is refused -------------------------------------------------------------------------------


def test_what_does_not_divide_is_refused_with_every_reason(model: Callable[[str], Path]) -> None:
    with pytest.raises(FeatureError) as caught:
        bound(model("llama"), 0, 5)
    for reason in ("heads (4) cannot be divided by 5", "key/value heads (2)", "feed-forward width (128)",
                   "vocabulary (258)"):  # fmt: skip
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "ranks", "options", "reason"),
    [
        ("llama", 2, {"exec": "compile"}, "programs have no collectives"),
        ("packed", 4, {"quantization": "packed"}, "key/value heads"),
    ],
)
def test_what_several_ranks_cannot_do_is_refused_by_name(
    kind: str, ranks: int, options: dict[str, Any], reason: str, model: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError, match=reason):
        bound(model(kind), 0, ranks, **options)


def test_a_connector_a_plugins_model_a_plugins_scheme_and_comparisons_are_refused_together(
    model: Callable[[str], Path],
) -> None:
    part = bound(model("llama"))
    config = EngineConfig(tensor_parallel_size=2, kv_connector="folder:/somewhere")
    two = dataclasses.replace(part.placement, mesh=Mesh(tp=2))
    scheme = WeightFormat("int8", "asked for", PackedScheme("q8_0"))
    plugins = dataclasses.replace(scheme, scheme=object())  # type: ignore[arg-type]
    with pytest.raises(FeatureError) as caught:
        check_ranks(config, part.checkpoint.config, {"LlamaForCausalLM": Qwen3Decoder}, plugins, two,
                    observed=True)  # fmt: skip
    for reason in ("kv_connector", "plugin of LlamaForCausalLM", "quantization int8", "twice on one rank"):
        assert reason in str(caught.value)
    check_ranks(EngineConfig(tensor_parallel_size=2), part.checkpoint.config, MODELS, scheme, two,
                observed=False)  # fmt: skip


def test_groups_that_a_rank_would_have_in_part_are_refused_or_dequantized(model: Callable[[str], Path]) -> None:
    config = bound(model("packed")).checkpoint.config
    assert packed_split_faults(config, 2) == []
    assert packed_split_faults(config, 1) == []
    assert len(packed_split_faults(config, 32)) == 2


def test_a_platform_without_the_feature_or_the_devices_is_refused(
    model: Callable[[str], Path],
) -> None:
    config = EngineConfig(model=str(model("llama")), device="acme:1", tensor_parallel_size=2, max_model_len=64)
    devices = [DeviceInfo(index=i, name="Acme", arch="v1") for i in range(3)]
    with pytest.raises(FeatureError, match="needs the feature tensor_parallel"):
        bind(config, meta=True, candidates=candidates(FakePlatform(devices=devices)))
    facts = limits(features=frozenset({Feature.TENSOR_PARALLEL}))
    with pytest.raises(FeatureError, match="1 devices from acme:1 on"):
        bind(config, meta=True, candidates=candidates(FakePlatform(devices=devices[:2], facts=facts)))
    enough = candidates(FakePlatform(devices=devices, facts=facts))
    parts = [bind(config, meta=True, candidates=enough, rank=rank) for rank in range(2)]
    assert [(part.placement.device.index, part.placement.sharing) for part in parts] == [(1, 1), (2, 1)]
    assert {c.provider for c in parts[0].kernels.plan.choices if c.spec.op == "all_reduce"} == {"torch.distributed"}
    for part in parts:  # a warm-up's steps, which each rank runs for itself
        run_on_meta(part)


def test_workers_are_not_left_behind_by_a_failed_start(
    model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no such disk")

    monkeypatch.setattr("hotplug.core.startup.load.load_weights", fail)
    with pytest.raises(OSError, match="no such disk"):
        engine(model("llama"), 2)
    assert [p for p in psutil.Process().children() if "hotplug.core.engine.worker" in p.cmdline()] == []
    assert not torch.distributed.is_initialized()
