"""What a machine, a file or an option can do to the CPU platform: each a working path that says why, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_platforms import candidates
from gguf import GGMLQuantizationType as Kind
from gguf_files import random_tensors, tensor_shapes, write_gguf
from typer.testing import CliRunner

from hotplug.cli.main import app
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import OutOfMemoryError, WeightsError
from hotplug.core.request import Request, SamplingParams
from hotplug.platforms.cpu import CpuPlatform
from hotplug.platforms.cpu.memory import host_memory
from hotplug.platforms.cpu.native import library

GIB = 2**30
needs_library = pytest.mark.skipif(library.refusal() is not None, reason=str(library.refusal()))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf", random_tensors(tensor_shapes()), quant=Kind.Q4_1)


def tokens(core: EngineCore) -> list[int]:
    sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    core.add(Request(id="0", prompt_token_ids=[1, 5, 9, 2, 7], sampling=sampling))
    found: list[int] = []
    while core.has_work:
        for delta in core.step():
            found += delta.token_ids
    return found


def start(model: Path, **options: Any) -> EngineCore:
    options = {"dtype": "float32", "max_model_len": 64, "kv_cache_memory": "4MiB", **options}
    return EngineCore(EngineConfig(model=str(model), **options), candidates=candidates(CpuPlatform()))


# --- the library and the processor ----------------------------------------------------------------


def without_avx2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    library.load().use(library.BASELINE)
    return "the processor has none of the instruction sets they are written for (AVX2"


def missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setattr(library, "PATH", tmp_path / "absent" / "libhotplug_cpu.so")
    return "libhotplug_cpu.so is not there"


def truncated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    path = tmp_path / "libhotplug_cpu.so"
    path.write_bytes(library.PATH.read_bytes()[:4096])
    monkeypatch.setattr(library, "PATH", path)
    return "libhotplug_cpu.so is truncated"


def corrupt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    path = tmp_path / "libhotplug_cpu.so"
    path.write_bytes(bytes(4096))
    monkeypatch.setattr(library, "PATH", path)
    return "libhotplug_cpu.so cannot be loaded"


def of_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setattr(library, "VERSION", 99)
    library._open.cache_clear()
    return "where 99 is needed"


def lacking_a_function(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setitem(library._SIGNATURES, "hp_of_tomorrow", ((), None))
    library._open.cache_clear()
    return "libhotplug_cpu.so cannot be loaded"


@pytest.fixture
def restored() -> Iterator[None]:
    best = library.load().instruction_set
    yield
    library._open.cache_clear()
    library.load().use(best)


@needs_library
@pytest.mark.parametrize("fault", [without_avx2, missing, truncated, corrupt, of_another_version, lacking_a_function])
def test_without_native_kernels_pytorch_serves_and_the_plan_says_why(
    fault: Callable[[pytest.MonkeyPatch, Path], str], model: Path, tmp_path: Path, restored: None
) -> None:
    expected = tokens(start(model, quantization="none"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        reason = fault(monkeypatch, tmp_path)
        core = start(model)
        report = core.report()
        assert report["quantization"] == "none"
        assert reason in report["quantization_because"]
        sites = {site["op"]: site for site in report["sites"]}
        assert "cpu.native" not in {provider for site in sites.values() for provider in site["provider"].split("+")}
        assert any(reason in rejected["reason"] for rejected in sites["attention"]["rejected"])
        assert tokens(core) == expected
        shown = CliRunner().invoke(app, ["explain", str(model)])
        assert reason in " ".join(shown.output.split())


# --- memory ---------------------------------------------------------------------------------------


def test_a_kv_cache_over_the_machines_memory_is_refused_before_weights_are_read(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotplug.core.startup.load.load_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(OutOfMemoryError, match=r"was to take 102400\.00 GiB, \d+\.\d\d GiB of \d+\.\d\d GiB are free"):
        start(model, kv_cache_memory="100TiB")


def group(folder: Path, limit: str, used: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nactive_file {cached // 2}\ninactive_file {cached - cached // 2}\n")


def member(folder: Path, text: str) -> Path:
    (folder / "cgroup").write_text(text)
    return folder / "cgroup"


def test_memory_is_the_machines_without_a_limit(tmp_path: Path) -> None:
    plain = host_memory(tmp_path, tmp_path / "absent")
    assert 0 < plain.free <= plain.total
    group(tmp_path, "max", GIB)
    assert host_memory(tmp_path, member(tmp_path, "0::/\n")).total == plain.total


def test_memory_is_what_a_container_leaves_of_it(tmp_path: Path) -> None:
    group(tmp_path, str(GIB), GIB // 2, cached=GIB // 4)  # files that it has read can be given back
    found = host_memory(tmp_path, member(tmp_path, "0::/\n"))
    assert (found.free, found.total) == (GIB * 3 // 4, GIB)


def test_the_tightest_of_the_groups_above_a_process_counts(tmp_path: Path) -> None:
    group(tmp_path / "system" / "service", "max", GIB)
    group(tmp_path / "system", str(GIB), GIB // 4)
    group(tmp_path, str(4 * GIB), 4 * GIB - GIB // 8)
    found = host_memory(tmp_path, member(tmp_path, "0::/system/service\n"))
    assert (found.free, found.total) == (GIB // 8, GIB)


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    group(tmp_path, str(GIB), GIB + 1)
    assert host_memory(tmp_path, member(tmp_path, "0::/\n")).free == 0


def test_limits_of_version_1_count_too(tmp_path: Path) -> None:
    folder = tmp_path / "memory" / "box"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{GIB}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{GIB // 2}\n")
    (folder / "memory.stat").write_text(f"cache 1\ntotal_active_file {GIB // 8}\ntotal_inactive_file 0\n")
    found = host_memory(tmp_path, member(tmp_path, "4:memory:/box\n3:cpuset:/\n"))
    assert (found.free, found.total) == (GIB * 5 // 8, GIB)


def test_a_container_that_cannot_see_its_groups_path_is_bound_by_the_top(tmp_path: Path) -> None:
    group(tmp_path, str(GIB), 0)
    found = host_memory(tmp_path, member(tmp_path, "0::/docker/0123\n"))
    assert found.total == GIB


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0.02, 0.6, 0.999])
def test_a_truncated_file_is_refused_with_what_to_do(model: Path, left: float) -> None:
    data = model.read_bytes()
    model.write_bytes(data[: int(len(data) * left)])
    with pytest.raises(WeightsError, match=r"model\.gguf: not a readable GGUF file(.|\n)*Fetch it again"):
        start(model)
    shown = CliRunner().invoke(app, ["explain", str(model)])
    assert shown.exit_code == 1
    assert "not a readable GGUF file" in shown.stderr


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text(json.dumps({"not": "weights"}) * 100)
    with pytest.raises(WeightsError, match="does not begin with the GGUF magic"):
        start(path)
