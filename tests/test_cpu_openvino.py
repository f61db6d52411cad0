"""The CPU platform's compiled steps: the tokens of its op-by-op steps, whatever the steps hold."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from prompts import PROMPTS

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import FeatureError, PlatformError
from hotplug.core.request import Request, SamplingParams
from hotplug.core.startup.bind import bind
from hotplug.platforms.cpu import CpuPlatform, openvino
from hotplug.platforms.cpu.native.linear import pack
from hotplug.platforms.cpu.openvino.store import FORMAT
from hotplug.plugins.conformance.engine_runs import VOCAB, small_model

ARCH = CpuPlatform().probe()[0].arch
if not openvino.refusal(ARCH):
    from hotplug.platforms.cpu.openvino.graph import Graph, Weight
    from hotplug.platforms.cpu.openvino.operations import TRANSLATIONS

needs_openvino = pytest.mark.skipif(bool(openvino.refusal(ARCH)), reason=openvino.refusal(ARCH))

Prompts = Mapping[str, Sequence[int]]


@pytest.fixture(scope="module")
def cache(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for recipes, one for all tests that compile the same; the model is fetched into the usual one first."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("recipes")
        patch.setenv("HOTPLUG_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("small"))


def engine(model: Path | str, mode: str, **options: Any) -> EngineCore:
    fixed = {"device": "cpu", "dtype": "float32", "max_num_seqs": 8, "max_model_len": 192, "kv_cache_memory": "16MiB",
             "block_size": 32, "quantization": "none"}  # fmt: skip
    core = EngineCore(EngineConfig(model=str(model), exec=mode, **{**fixed, **options}))
    core.wait_until_compiled()
    return core


def prompts(count: int, longest: int = 90, seed: int = 0) -> dict[str, list[int]]:
    draw = random.Random(seed)
    lengths = [1, longest, *(draw.randint(2, longest) for _ in range(count))][:count]
    return {str(i): [draw.randrange(1, VOCAB) for _ in range(n)] for i, n in enumerate(lengths)}


def generate(core: EngineCore, asked: Prompts, tokens: int = 12, **params: Any) -> dict[str, list[int]]:
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, **params})
    for name, ids in asked.items():
        core.add(Request(id=name, prompt_token_ids=list(ids), sampling=sampling))
    return finish(core)


def finish(core: EngineCore) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    while core.has_work:
        for delta in core.step():
            assert delta.finish_reason != "error", delta.error
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    return found


def prompt_scores(core: EngineCore, ids: Sequence[int]) -> list[float]:
    """Log-probabilities of a prompt's tokens from the second on."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    core.add(Request(id="scored", prompt_token_ids=list(ids), sampling=params))
    deltas = []
    while core.has_work:
        deltas += core.step()
    return [entry.logprobs[0] for d in deltas for entry in d.prompt_logprobs or () if entry is not None]


def only_compiled(core: EngineCore) -> bool:
    """Whether no step ran op by op."""
    return core._executor.worker.executable.eager_steps == 0


# --- the same tokens ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(model: Path, cache: Path) -> EngineCore:
    return engine(model, "compile")


@needs_openvino
def test_steps_of_every_size_give_the_op_by_op_tokens(model: Path, compiled: EngineCore) -> None:
    asked = prompts(8)
    assert generate(compiled, asked) == generate(engine(model, "eager"), asked)
    assert only_compiled(compiled)


@needs_openvino
@pytest.mark.parametrize("options", [{"max_num_seqs": 1}, {"max_num_seqs": 1, "max_model_len": 32}])
def test_one_request_at_a_time_and_one_block(model: Path, cache: Path, options: dict[str, int]) -> None:
    asked = prompts(3, longest=18)
    expected = generate(engine(model, "eager", **options), asked)
    assert generate(engine(model, "compile", **options), asked) == expected


@needs_openvino
def test_a_cached_prefix_is_attended_to(model: Path, compiled: EngineCore) -> None:
    asked = prompts(4, longest=150, seed=1)
    first = generate(compiled, asked)
    hits = compiled.stats().prefix_hits
    assert generate(compiled, asked) == first
    assert compiled.stats().prefix_hits > hits


@needs_openvino
def test_prompts_in_chunks_beside_decodes(model: Path, cache: Path) -> None:
    asked = prompts(6, seed=2)
    core = engine(model, "compile", max_num_batched_tokens=16)
    assert generate(core, asked) == generate(engine(model, "eager"), asked)
    assert only_compiled(core)


@needs_openvino
def test_preempted_requests(model: Path, compiled: EngineCore) -> None:
    asked = prompts(8, longest=12, seed=3)
    size = compiled.bound.kv.block_bytes
    core = engine(model, "compile", kv_cache_memory=10 * size)
    assert generate(core, asked, 64) == generate(compiled, asked, 64)
    assert core.stats().preemptions > 0


@needs_openvino
def test_blocks_swapped_to_the_host_and_back(model: Path, compiled: EngineCore) -> None:
    asked = prompts(8, longest=12, seed=4)
    size = compiled.bound.kv.block_bytes
    core = engine(model, "compile", kv_cache_memory=10 * size, swap_space=20 * size)
    assert generate(core, asked, 64) == generate(compiled, asked, 64)
    assert core.stats().blocks_swapped_in > 0


@needs_openvino
def test_sampled_requests_draw_the_same(model: Path, compiled: EngineCore) -> None:
    asked = prompts(6, seed=5)
    params = {"temperature": 0.8, "top_p": 0.9, "seed": 11, "repetition_penalty": 1.1}
    assert generate(compiled, asked, **params) == generate(engine(model, "eager"), asked, **params)


@needs_openvino
def test_log_probabilities_of_a_prompt_come_from_all_its_hidden_states(model: Path, compiled: EngineCore) -> None:
    ids = prompts(2, seed=6)["1"]
    found = prompt_scores(compiled, ids)
    assert len(found) == 89
    assert found == pytest.approx(prompt_scores(engine(model, "eager"), ids), abs=1e-3)
    assert only_compiled(compiled)


@needs_openvino
def test_a_cache_in_float16_is_read_by_both_ways_of_running(model: Path, cache: Path) -> None:
    asked = prompts(5, longest=120, seed=7)
    core = engine(model, "compile", kv_cache_dtype="float16")
    found = generate(core, asked)
    assert found == generate(engine(model, "eager", kv_cache_dtype="float16"), asked)
    executable = core._executor.worker.executable
    ready, executable._ready = executable._ready, ()  # as if it were still compiling
    assert generate(core, asked) == found  # op by op from blocks that compiled steps wrote
    assert executable.eager_steps > 0
    executable._ready = ready


@needs_openvino
def test_a_request_reads_blocks_that_another_fills_in_the_same_step(compiled: EngineCore) -> None:
    """Both are given at once: the second's first 32 tokens are the first's block, written in this very step."""
    ids = prompts(2, longest=40, seed=12)["1"]
    table = torch.tensor([[1, 2], [1, 3]])
    caches = [torch.zeros_like(cache) for blocks in compiled._executor.worker.executable._kv for cache in blocks]
    together = step(compiled, [*ids, *ids[32:]], [*range(40), *range(32, 40)], table, [0, 40, 48], [40, 40], caches)
    torch.testing.assert_close(together[0], together[1], atol=1e-4, rtol=1e-4)
    alone = step(compiled, ids, list(range(40)), table[:1], [0, 40], [40], [torch.zeros_like(c) for c in caches])
    torch.testing.assert_close(together[1], alone[0], atol=1e-4, rtol=1e-4)


def step(
    core: EngineCore, ids: list[int], positions: list[int], table: torch.Tensor, starts: list[int], lens: list[int],
    caches: list[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """Scores of each request's last token, by the compiled step itself."""
    (entry,) = core._executor.worker.executable._ready
    kept = torch.tensor(starts[1:]) - 1
    slots = torch.zeros(len(ids), dtype=torch.int64)
    run = entry.run(torch.tensor(ids), torch.tensor(positions), slots, table, torch.tensor(starts), torch.tensor(lens),
                    torch.arange(len(kept)), kept, *caches)  # fmt: skip
    return run[1].clone()


VARIANTS: dict[str, dict[str, Any]] = {
    "mistral with a window": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 20},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
    "tied": {"tie_word_embeddings": True},
    "one head a group": {"num_key_value_heads": 4},
}


@needs_openvino
@pytest.mark.parametrize("name", VARIANTS)
def test_architectures(name: str, tmp_path: Path, cache: Path) -> None:
    folder = variant(tmp_path, VARIANTS[name])
    asked = prompts(5, seed=8)
    core = engine(folder, "compile")
    assert generate(core, asked) == generate(engine(folder, "eager"), asked)
    assert only_compiled(core)


def variant(tmp_path: Path, changes: dict[str, Any]) -> Path:
    """The small model with another configuration, and weights drawn for it."""
    from unittest.mock import patch

    from hotplug.plugins.conformance import engine_runs

    with patch.dict(engine_runs._CONFIG, changes):
        return small_model(tmp_path)


@pytest.mark.slow
@needs_openvino
def test_smollm2(smollm2_path: Path, cache: Path) -> None:
    same_tokens(smollm2_path, PROMPTS[:3])


@needs_openvino
@pytest.mark.slow
def test_smollm2_with_all_prompts(smollm2_path: Path, cache: Path) -> None:
    same_tokens(smollm2_path, PROMPTS)


def same_tokens(path: Path, texts: Sequence[str]) -> None:
    from hotplug.core.text.tokenizer_files import load_tokenizer

    tokenizer = load_tokenizer(path)
    asked = {str(i): tokenizer.encode(text) for i, text in enumerate(texts)}
    options = {"max_model_len": 512, "kv_cache_memory": "128MiB"}
    core = engine(path, "compile", **options)
    assert generate(core, asked, 64) == generate(engine(path, "eager", **options), asked, 64)
    assert only_compiled(core)


class Failing:
    """An infer request of a plugin that fails with an error, or says nothing and gives no rows."""

    def __init__(self, error: str = "") -> None:
        self.error = error

    def set_tensor(self, name: str, tensor: Any) -> None: ...

    def infer(self) -> None:
        if self.error:
            raise RuntimeError(self.error)

    def get_tensor(self, name: str) -> Any:
        return type("Empty", (), {"data": np.zeros((0, 4), np.float32)})


@needs_openvino
@pytest.mark.parametrize(("error", "words"), [("no primitive", "no primitive"), ("", "it gave 0 rows of scores for 1")])
def test_a_step_that_fails_is_an_error_in_words(
    error: str, words: str, compiled: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry,) = compiled._executor.worker.executable._ready
    caches = [cache for blocks in compiled._executor.worker.executable._kv for cache in blocks]
    monkeypatch.setattr(entry.run, "_request", Failing(error))
    monkeypatch.setattr(entry.run, "_caches", [])  # which the request that comes back has to be given
    with pytest.raises(PlatformError, match=f"OpenVINO failed to compute a step: {words}"):
        step(compiled, [5], [0], torch.tensor([[1]]), [0, 1], [1], caches)


# --- matrices in groups ---------------------------------------------------------------------------


SCHEMES = ("Q4_0", "Q4_1", "Q8_0")


@needs_openvino
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("packed", [False, True], ids=["as in the file", "in the native kernels' layout"])
def test_products_with_groups(scheme: str, packed: bool) -> None:
    """Close to the values of the groups, in either layout that a matrix may come in."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=(48, 96)).astype(np.float32)
    data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[scheme])
    exact = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[scheme]).astype(np.float64)
    given = pack(scheme, data, 48, 96).tiles.unsqueeze(1) if packed else torch.from_numpy(data)
    x = rng.normal(size=(5, 96)).astype(np.float32)
    linear = TRANSLATIONS["hotplug::linear_packed"]
    found = run(lambda graph, x: linear(graph, "here", x, Weight("w", given, graph), None), x)
    assert np.linalg.norm(found - x @ exact.T) < 0.01 * np.linalg.norm(x @ exact.T)


@needs_openvino
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_a_table_in_groups(scheme: str) -> None:
    values = np.random.default_rng(4).normal(size=(40, 64)).astype(np.float32)
    data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[scheme])
    exact = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[scheme])
    ids = np.array([39, 0, 7], np.int64)
    found = run(lambda graph, x: TRANSLATIONS["hotplug::embed_packed"](
        graph, "here", x, Weight("w", torch.from_numpy(data), graph), 64), ids)  # fmt: skip
    np.testing.assert_allclose(found, exact[ids], rtol=1e-5, atol=1e-6)


def run(translate: Callable[..., Any], x: np.ndarray) -> np.ndarray:
    """What a graph of one operation makes of `x`."""
    import openvino as ov

    graph = Graph()
    kind = ov.Type.i64 if x.dtype == np.int64 else ov.Type.f32
    parameter = graph.parameter("x", (-1, *x.shape[1:]), kind)
    model = ov.Model([translate(graph, parameter)], list(graph.parameters.values()), "one")
    return ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({"x": x})[0]


@needs_openvino
def test_smollm2_in_the_groups_of_its_file(smollm2_path: Path, cache: Path) -> None:
    """As close to the same weights in float32 as the native kernels, which round activations to eight bits too."""
    ids = list(range(100, 160))
    options = {"max_model_len": 512, "kv_cache_memory": "128MiB"}
    exact, native, found = (
        np.array(prompt_scores(engine(smollm2_path, mode, quantization=scheme, **options), ids))
        for mode, scheme in (("eager", "none"), ("eager", "packed"), ("compile", "packed"))
    )
    assert len(found) == 59
    assert np.abs(found - exact).mean() < 1.5 * np.abs(native - exact).mean() + 0.01


# --- the recipe on disk ---------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOTPLUG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@needs_openvino
def test_a_second_start_traces_nothing(model: Path, own_cache: Path) -> None:
    core = engine(model, "compile")
    (recipe,) = own_cache.rglob("step.recipe")
    written = recipe.stat().st_mtime_ns
    assert recipe.stat().st_size < 100_000  # no weights
    again = engine(model, "compile", kv_cache_memory="8MiB")  # another number of blocks
    assert again.num_blocks < core.num_blocks
    assert list(own_cache.rglob("step.recipe")) == [recipe]
    assert recipe.stat().st_mtime_ns == written


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "a flipped bit": lambda path: path.write_bytes(path.read_bytes()[:-40] + b"\x07" + path.read_bytes()[-39:]),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00 " * 50),
    "empty": lambda path: path.write_bytes(b""),
    "another version": lambda path: path.write_text(path.read_text().replace(f"recipe {FORMAT}", "recipe 0", 1)),
}


@needs_openvino
def test_a_damaged_recipe_is_reported_and_made_anew(
    model: Path, compiled: EngineCore, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = prompts(3, seed=9)
    expected = generate(compiled, asked)
    engine(model, "compile")
    (path,) = own_cache.rglob("step.recipe")
    whole = path.read_bytes()
    for damage in DAMAGE.values():
        damage(path)
        caplog.clear()
        assert generate(engine(model, "compile"), asked) == expected
        assert f"{path} is made anew" in caplog.text
        assert path.read_bytes() == whole


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (None, "OpenVINO is not installed (pip install 'hotplug[cpu]')"),
        ("2025.3.0", "OpenVINO 2025.3.0 is too old, 2026.4 or later of 2026 is needed (pip install 'hotplug[cpu]')"),
        ("2027.0.0", "OpenVINO 2027.0.0 is too new, 2026.4 or later of 2026 is needed (pip install 'hotplug[cpu]')"),
    ],
)
def test_without_an_openvino_that_serves_compile_is_refused_and_eager_runs(
    version: str | None, words: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "version", lambda: version)
    with pytest.raises(FeatureError) as refused:
        engine(model, "compile")
    assert f"exec compile is not among capture, eager: {words}" in str(refused.value).replace(
        "among eager:", "among capture, eager:"
    )
    asked = prompts(2)
    assert len(generate(engine(model, "eager"), asked, 3)) == 2


def test_a_processor_without_avx2_is_refused_by_name() -> None:
    assert "needs a processor with AVX2, this one has neon" in openvino.refusal("neon")


@needs_openvino
def test_the_plan_says_what_computes_each_site_of_a_compiled_step(model: Path) -> None:
    options = {"model": str(model), "device": "cpu", "dtype": "float32"}
    sites = bind(EngineConfig(exec="compile", **options), meta=True).report()["sites"]
    whole = {site["op"] for site in sites if site["compiled_by"] == "OpenVINO"}
    assert {"embed", "rms_norm", "linear", "rope_kv_write", "attention", "logits"} <= whole
    assert {site["op"] for site in sites if not site["compiled_by"]} >= {"prepare_step", "sample", "argmax"}
    plain = bind(EngineConfig(exec="eager", **options), meta=True).report()["sites"]
    assert not any(site["compiled_by"] for site in plain)


def test_auto_is_not_compile() -> None:
    platform = CpuPlatform()
    (device,) = platform.probe()
    assert platform.limits(device).exec_modes[0] != "compile"


@needs_openvino
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block_size": 16}, "block_size 16 is not among 32"),
        ({"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype bfloat16 is not among float32, float16"),
        ({"dtype": "bfloat16", "kv_cache_dtype": "float32"}, "dtype bfloat16 is not among float32"),
    ],
)
def test_what_compiled_steps_have_not_is_refused_before_weights_load(
    options: dict[str, Any], reason: str, model: Path
) -> None:
    with pytest.raises(FeatureError, match=reason):
        engine(model, "compile", **options)


@needs_openvino
def test_a_model_with_an_op_that_has_no_translation_is_refused_by_op_and_site(tiny_moe_model: Path) -> None:
    config = EngineConfig(model=str(tiny_moe_model), load_format="dummy", exec="compile", max_model_len=64)
    with pytest.raises(PlatformError, match=r"layers\.1\.mlp\.\w+: no translation of moe_route to OpenVINO") as refused:
        bind(config, meta=True)
    assert "Use --exec eager" in str(refused.value)


def test_openvino_is_not_imported_before_something_compiles(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = ("import sys; from hotplug.platforms.cpu import CpuPlatform; p = CpuPlatform(); p.limits(p.probe()[0]); "
            "p.fingerprint(); sys.exit('openvino' in sys.modules)")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
