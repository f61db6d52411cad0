"""The CPU benchmark: what engines are asked, what is made of their answers, and a worker in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import cpu as bench
import gguf
import numpy as np
import psutil
import pytest
from cpu_engines.variants import write_variant
from cpu_engines.worker import peak_rss
from cpu_engines.workloads import FIGURES, STRIDE, WORKLOADS, Asked, Source, figures

from hotplug.core.weights.checkpoint import find_gguf, open_checkpoint


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(lambda text: list(range(len(text) // 4)))


# --- workloads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workload", "requests", "length", "new"),
    [("w1", 1, 128, 128), ("w2", 16, 128, 64), ("w3", 16, 528, 32), ("w4", 1, 1024, 1)],
)
def test_workloads_ask_what_they_say(source, workload, requests, length, new):
    asked = getattr(source, workload)(3)
    assert [len(prompt) for prompt in asked.prompts] == [length] * requests
    assert asked.new_tokens == new
    assert len({tuple(prompt) for prompt in asked.prompts}) == requests


def test_only_w3_shares_a_prefix(source):
    first, second = source.w3(1).prompts[:2]
    assert first[:512] == second[:512]
    assert first[512:] != second[512:]
    assert source.w2(1).prompts[0][:16] != source.w2(1).prompts[1][:16]


def test_no_run_begins_where_another_did(source):
    """A prefix cache would answer a prompt that it has seen."""
    runs = [getattr(source, w)(n * len(WORKLOADS) + i).prompts[0][0] for n in range(6) for i, w in enumerate(WORKLOADS)]
    assert len(set(runs)) == len(runs)
    assert STRIDE % 16 != 0


def test_figures_follow_from_when_tokens_came():
    one = Asked([[1] * 128], 3)
    assert figures("w1", one, [[0.5, 0.75, 1.0]]) == {"ttft_ms": 500.0, "decode_tok_s": 4.0}
    assert figures("w4", Asked([[1] * 1024], 1), [[2.0]]) == {"prompt_tok_s": 512.0}
    assert figures("w2", Asked([[1], [2]], 2), [[1.0, 2.0], [1.0, 4.0]]) == {"out_tok_s": 1.0}


@pytest.mark.parametrize("times", [[[0.1, 0.2]], [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]], [[0.1] * 4]])
def test_tokens_too_few_or_too_many_are_no_figure(times):
    with pytest.raises(ValueError, match="instead of 3"):
        figures("w1", Asked([[1]], 3), times)


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "bound"),
    [("Q8_0", 0.01), *(pytest.param(*x, marks=pytest.mark.slow) for x in (("Q4_0", 0.2), ("F16", 1e-3), ("Q4_1", 0)))],
)
def test_a_variant_is_the_same_model_in_another_format(smollm2_path: Path, tmp_path: Path, kind: str, bound: float):
    path = find_gguf(smollm2_path)
    assert path is not None
    write_variant(path, tmp_path / "model.gguf", kind)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == kind
    assert tensors["token_embd.weight"].tensor_type.name == ("F16" if kind == "F16" else "Q8_0")
    made, given = open_checkpoint(tmp_path / "model.gguf"), open_checkpoint(path)
    assert made.config == given.config
    name = "model.layers.3.self_attn.q_proj.weight"
    found, wanted = (next(t for n, t in c.tensors() if n == name).float().numpy() for c in (made, given))
    assert np.linalg.norm(found - wanted) <= bound * np.linalg.norm(wanted)


# --- workers and the table ------------------------------------------------------------------------


def peer(name: str, module: str, **options: object) -> bench.Peer:
    return bench.Peer(name, module, "", options)


def test_a_worker_answers_for_an_engine_in_another_process(tiny_model: Path, source: Source):
    worker = bench.Worker(peer("hotplug", "hotplug", model=str(tiny_model), load_format="dummy", max_model_len=96,
                               max_num_seqs=4, kv_cache_memory="4MiB", device="cpu"))  # fmt: skip
    try:
        assert worker.about.startswith("hotplug ")
        for _ in range(2):
            times = worker.generate(Asked([[5, 6, 7], [8, 9]], 4))
            assert [len(own) for own in times] == [4, 4]
            assert all(own == sorted(own) and own[0] > 0 for own in times)
        assert worker.rss() > 50e6
        deadline, process = time.monotonic() + 10, psutil.Process(worker._process.pid)
        while process.status() != psutil.STATUS_STOPPED:  # so it takes nothing from the others
            assert time.monotonic() < deadline
    finally:
        worker.stop()


def test_the_peak_of_memory_is_that_of_an_engines_processes_together():
    before = peak_rss()
    code = "x = bytearray(b'x' * (64 << 20)); print(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        assert peak_rss() - before > 64 << 20
    finally:
        child.communicate(b"\n")


def test_an_engine_that_fails_is_told_of_and_left_out(capsys, source: Source):
    found = bench.run([peer("broken", "hotplug", model="/nowhere")], source, repeat=1, starts=1)
    assert found == {}
    assert "broken ended with code 1" in capsys.readouterr().err


def test_the_table_holds_medians_the_best_peer_and_the_ratio():
    peers = [peer("hotplug a", "hotplug"), peer("x", "x"), peer("y", "y"), peer("absent", "z")]
    titles = [title for _, _, title, _ in FIGURES]
    found = {p.name: bench.Measured() for p in peers[:3]}
    for name, ttft, rate in (("hotplug a", 100.0, 60.0), ("x", 200.0, 20.0), ("y", 150.0, 30.0)):
        for noise in (0.5, 1.0, 9.0):
            found[name].add(titles[0], ttft * noise)
            found[name].add(titles[1], rate * noise)
    lines = bench.table(peers, found).splitlines()
    assert [cell.strip() for cell in lines[-2].split("|")[2:5]] == ["150", "30", "-"]
    assert [cell.strip() for cell in lines[-1].split("|")[2:5]] == ["1.50x", "2.00x", "-"]
    assert not any(line.startswith("| absent") for line in lines)


def test_peers_that_are_not_installed_are_named(monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "prepare", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", ["cpu.py", "vllm"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "vllm: not here, `make bench-peers`" in capsys.readouterr().err
