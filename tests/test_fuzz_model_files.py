"""Damaged model files: whatever they say, a start ends in a model or in an error of ours, soon and in little memory."""

from __future__ import annotations

import json
import random
import resource
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import model_mutants
import pytest
import torch

from hotplug.core.config import EngineConfig
from hotplug.core.errors import HotplugError
from hotplug.core.models.loader import load_weights
from hotplug.core.startup.bind import bind
from hotplug.core.text.tokenizer_files import load_tokenizer

SECONDS, BYTES = 2.0, 1 << 30
"""Of processor time, since other work on the machine is not the reader's, and of memory."""
SHORT, LONG = 60, 2_500
"""Mutants of each kind."""
KINDS = ("gguf-bpe", "gguf-spm", "folder", "config", "tokenizer")


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A Hugging Face folder in shards, with a tokenizer and every settings file."""
    import transformers

    path = tmp_path_factory.mktemp("seed")
    config = transformers.LlamaConfig(**{
        key: value for key, value in json.loads((tiny_model / "config.json").read_text()).items()
        if key not in ("architectures", "torch_dtype", "rope_theta")
    }, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}, head_dim=8)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path, max_shard_size="40KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((tiny_model / name).read_bytes())
    (path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<bos>"}, "eos_token": "<eos>"}')
    (path / "generation_config.json").write_text('{"eos_token_id": [1, 0], "bos_token_id": 0}')
    return model_mutants.read_folder(path)


def start(path: Path) -> None:
    """Everything of an engine's start that reads the files. A table that is not finite would be NaN in every answer."""
    config = EngineConfig(model=str(path), device="cpu", max_num_seqs=2, max_num_batched_tokens=64,
                          kv_cache_memory="1MiB")  # fmt: skip
    load_tokenizer(path).encode("a b")
    bound = bind(config)
    load_weights(bound.model.decoder, bound.checkpoint)
    assert torch.isfinite(bound.model.decoder.cos_sin).all()


def mutants(kind: str, folder: dict[str, bytes], where: Path, count: int) -> Iterator[Path]:
    """Paths of mutants, each written over the one before."""
    for seed in range(count):
        rng = random.Random(f"{kind}/{seed}")
        if kind.startswith("gguf"):
            base = model_mutants.small_gguf("gpt2" if kind == "gguf-bpe" else "llama")
            (where / "model.gguf").write_bytes(model_mutants.mutate_gguf(base, rng))
            yield where / "model.gguf"
        else:
            tokenizer, config = ({name: folder[name]} for name in ("tokenizer.json", "config.json"))
            others = {name: data for name, data in folder.items() if name != "tokenizer.json"}
            only = {"tokenizer": tokenizer, "config": config}.get(kind, others)
            model_mutants.write_folder(where, {**folder, **model_mutants.mutate_folder(only, rng)})
            yield where


def outcomes(kind: str, folder: dict[str, bytes], where: Path, count: int) -> dict[str, int]:
    """How many mutants started, and how many did not. Fails on any that ends otherwise."""
    found = {"started": 0, "refused": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed, path in enumerate(mutants(kind, folder, where, count)):
            taken, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
            try:
                start(path)
                found["started"] += 1
            except HotplugError as e:
                found["refused"] += 1
                assert len(str(e)) < 2000, f"{kind}/{seed} has a message of {len(str(e)):,} characters"
            except BaseException as e:
                pytest.fail(f"{kind}/{seed} ends in {type(e).__name__}: {str(e)[:300]}")
            seconds = time.process_time() - begin
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - taken) << 10
            assert seconds < SECONDS and grown < BYTES, f"{kind}/{seed}: {seconds:.1f} s, {grown >> 20} MiB"
    return found


def test_files_that_are_mutated_are_valid(folder: dict[str, bytes], tmp_path: Path) -> None:
    model_mutants.write_folder(tmp_path, folder)
    start(tmp_path)
    for model in ("gpt2", "llama"):
        (tmp_path / "m.gguf").write_bytes(model_mutants.small_gguf(model).encode())
        start(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_start_or_are_refused(kind: str, folder: dict[str, bytes], tmp_path: Path) -> None:
    found = outcomes(kind, folder, tmp_path, SHORT)
    assert found["refused"] > SHORT // 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_damaged_files_start_or_are_refused(kind: str, folder: dict[str, bytes], tmp_path: Path) -> None:
    found = outcomes(kind, folder, tmp_path, LONG)
    assert found["started"] > LONG // 50 and found["refused"] > LONG // 4
