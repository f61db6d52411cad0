"""Which stored tensor counts: tied tables, tables stored twice or once, an index that is old, tensors in two files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_runs import ModelRun
from safetensors.torch import load_file, save_file, save_model

from hotplug.core.errors import ModelError, WeightsError
from hotplug.core.weights.checkpoint import open_checkpoint

SIZES = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROMPT = list(range(20))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tied"), seed=0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("shards"), seed=1, shard="30KB")


def save(folder: Path, *, seed: int, tie: bool = True, shard: str = "1GB") -> Path:
    make(seed, tie).save_pretrained(folder, max_shard_size=shard)
    return folder


def make(seed: int, tie: bool = True) -> torch.nn.Module:
    import transformers

    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tie)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return model


def changed(folder: Path, into: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a folder of one file whose tensors are changed."""
    shutil.copytree(folder, into, dirs_exist_ok=True)
    tensors = load_file(into / "model.safetensors")
    change(tensors)
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return into


def theirs(folder: Path) -> torch.Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0]


def assert_same_as_transformers(folder: Path) -> None:
    found = ModelRun(folder).logits(PROMPT, [len(PROMPT)])
    torch.testing.assert_close(found, theirs(folder), rtol=1e-4, atol=1e-4)


def test_a_different_head_beside_a_tied_embedding_is_used(tied: Path, tmp_path: Path) -> None:
    folder = changed(tied, tmp_path, lambda t: t.update({HEAD: torch.randn_like(t[EMBED])}))
    assert not open_checkpoint(folder).config.tie_word_embeddings
    assert_same_as_transformers(folder)


def test_the_same_head_beside_a_tied_embedding_stays_tied(tied: Path, tmp_path: Path) -> None:
    folder = changed(tied, tmp_path, lambda t: t.update({HEAD: t[EMBED].clone()}))
    assert open_checkpoint(folder).config.tie_word_embeddings
    assert_same_as_transformers(folder)


def test_tied_tables_may_be_stored_as_the_head_alone(tied: Path, tmp_path: Path) -> None:
    folder = changed(tied, tmp_path, lambda t: t.update({HEAD: t.pop(EMBED)}))
    assert_same_as_transformers(folder)


def test_a_folder_saved_with_save_model_is_served(tied: Path, tmp_path: Path) -> None:
    shutil.copytree(tied, tmp_path, dirs_exist_ok=True)
    save_model(make(0), str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    assert HEAD in load_file(tmp_path / "model.safetensors")
    assert_same_as_transformers(tmp_path)


def test_a_table_that_is_nowhere_is_refused(tied: Path, tmp_path: Path) -> None:
    folder = changed(tied, tmp_path, lambda t: t.pop(EMBED))
    with pytest.raises(WeightsError, match=r"missing: model\.embed_tokens\.weight"):
        open_checkpoint(folder)


def test_a_head_that_is_neither_tied_nor_stored_is_refused(tied: Path, tmp_path: Path) -> None:
    shutil.copytree(tied, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(WeightsError, match=r"missing: lm_head\.weight"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_the_model_does_not_have_is_refused_by_name(tied: Path, tmp_path: Path) -> None:
    folder = changed(tied, tmp_path, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}))
    with pytest.raises(ModelError, match=r"not part of LlamaForCausalLM: .*q_proj\.bias"):
        ModelRun(folder)


@pytest.mark.parametrize("keep_shards", [True, False])
def test_a_whole_file_wins_over_an_old_index(keep_shards: bool, tied: Path, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    shutil.copy(tied / "model.safetensors", tmp_path)
    if not keep_shards:
        for shard in tmp_path.glob("model-*"):
            shard.unlink()
    assert_same_as_transformers(tmp_path)
    torch.testing.assert_close(theirs(tmp_path), theirs(tied))


def index_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def write_index(folder: Path, names: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def test_a_tensor_that_the_index_leaves_out_is_found_in_its_shard(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    names = index_of(tmp_path)
    del names[EMBED]
    write_index(tmp_path, names)
    assert_same_as_transformers(tmp_path)


@pytest.mark.parametrize("file", ["absent.safetensors", "../elsewhere.safetensors", "", "sub/m.safetensors", "a\0b"])
def test_an_index_that_names_no_file_beside_it_is_refused(file: str, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    write_index(tmp_path, {**index_of(tmp_path), HEAD: file})
    with pytest.raises(WeightsError, match=r"shards are missing: absent|must be the name of a file beside the index"):
        open_checkpoint(tmp_path)


def with_a_copy(folder: Path, value: torch.Tensor | None) -> None:
    """Store the embedding in another shard too, with other values if any are given."""
    names = index_of(folder)
    other = next(file for file in sorted(set(names.values()), reverse=True) if file != names[EMBED])
    tensors = load_file(folder / other)
    tensors[EMBED] = load_file(folder / names[EMBED])[EMBED] if value is None else value
    save_file(tensors, folder / other, metadata={"format": "pt"})


def test_a_tensor_in_two_shards_is_taken_where_both_are_equal(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    with_a_copy(tmp_path, None)
    assert_same_as_transformers(tmp_path)


def test_a_tensor_in_two_shards_with_different_values_is_refused(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    with_a_copy(tmp_path, torch.full((64, 48), 7.0))
    with pytest.raises(WeightsError, match=r"model\.embed_tokens\.weight is in two files with different values"):
        open_checkpoint(tmp_path)
