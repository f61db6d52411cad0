"""The whole product: `hotplug serve` as a process with SmolLM2, and before it the official client and plain sockets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import psutil
import pytest
from served import Served
from server_cases import *  # noqa: F403 - the cases run here against the real engine

GIB = 2**30


@pytest.fixture(scope="module")
def served(smollm2_path) -> Iterator[Served]:
    server = Served("smollm2", "--dtype", "float32", "--kv-cache-memory", "1GiB")
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def client(served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model() -> str:
    return "smollm2"


def test_the_answer_is_right(client, model):
    answer = client.chat.completions.create(
        model=model, temperature=0, messages=[{"role": "user", "content": "What is the capital of Japan?"}]
    )
    assert answer.choices[0].message.content == "The capital of Japan is Tokyo."
    assert answer.choices[0].finish_reason == "stop"


def test_a_client_that_goes_away_mid_stream_frees_its_blocks(served, client, model):
    with client.completions.create(
        model=model, prompt="Once", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
        assert served.metric("hotplug_requests_running") == 1
    served.until_idle()
    assert served.metric("hotplug_kv_cache_usage_ratio") == 0


BAD = {
    "malformed JSON": ("{", 400),
    "unknown field value": ({"prompt": "a", "stream": "perhaps"}, 400),
    "negative max_tokens": ({"prompt": "a", "max_tokens": -1}, 400),
    "huge max_tokens": ({"prompt": "a", "max_tokens": 10**9}, 400),
    "prompt over the context": ({"prompt": [5] * 9000}, 400),
    "empty prompt": ({"prompt": ""}, 400),
    "empty token list": ({"prompt": []}, 400),
    "unknown model": ({"prompt": "a", "model": "gpt-9"}, 404),
    "logit_bias key that is no token": ({"prompt": "a", "logit_bias": {"hello": 1}}, 400),
    "logit_bias key outside the vocabulary": ({"prompt": "a", "logit_bias": {"99999999": 1}}, 400),
    "NaN temperature": ('{"model": "smollm2", "prompt": "a", "temperature": NaN}', 400),
    "infinite temperature": ('{"model": "smollm2", "prompt": "a", "temperature": 1e999}', 400),
    "misspelled field": ({"prompt": "a", "temprature": 0}, 400),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_its_status_and_the_server_lives(served, case):
    body, status = BAD[case]
    content = body if isinstance(body, str) else json.dumps({"model": "smollm2", **body})
    answer = httpx2.post(
        f"{served.url}/v1/completions", content=content, headers={"Content-Type": "application/json"}, timeout=60
    )
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    assert httpx2.get(f"{served.url}/ready").status_code == 200


def test_the_plan_is_served_and_kv_memory_is_what_was_asked_for(served):
    plan = httpx2.get(f"{served.url}/debug/plan").json()
    assert plan["platform"] == "cpu"
    assert plan["dtype"] == "float32"
    size = plan["kv"]["num_blocks"] * plan["kv"]["block_bytes"]
    assert 0.99 * GIB < size <= GIB


def test_peak_memory_stays_under_three_gib(served, client, model):
    prompt = [7] * 1000
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda i: client.completions.create(model=model, prompt=[i, *prompt], max_tokens=4),
                range(8),
            )
        )
    assert served.peak_rss() < 3 * GIB


@pytest.fixture(scope="module")
def small(tiny_model) -> Iterator[Served]:
    server = Served(
        str(tiny_model), "--load-format", "dummy", "--served-model-name", "tiny", "--kv-cache-memory", "64MiB",
        "--max-num-seqs", "16", "--max-queue", "1000",
    )  # fmt: skip
    yield server
    assert server.stop() == 0


def test_ten_thousand_queued_requests_are_refused_past_the_limit_with_a_time_to_retry(small):
    body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 1000, "n": 100, "ignore_eos": True}

    def post(_: int) -> httpx2.Response | None:
        try:
            return httpx2.post(f"{small.url}/v1/completions", json=body, timeout=5.0)
        except httpx2.TimeoutException:
            return None  # queued or running; leaving aborts it

    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(post, range(100)))
    refused = [a for a in answers if a is not None and a.status_code != 200]  # a fast machine may answer the first
    assert len(refused) >= 85
    assert {a.status_code for a in refused} == {429}
    assert all(int(a.headers["Retry-After"]) >= 1 for a in refused)
    small.until_idle(60.0)
    answer = httpx2.post(f"{small.url}/v1/completions", json={**body, "n": 1, "max_tokens": 3}, timeout=30.0)
    assert answer.json()["usage"]["completion_tokens"] == 3


def test_a_killed_engine_ends_the_server_with_a_non_zero_code(tiny_model):
    server = Served(str(tiny_model), "--load-format", "dummy", "--kv-cache-memory", "16MiB")
    engine = max(psutil.Process(server.process.pid).children(recursive=True), key=lambda p: p.memory_info().rss)
    engine.kill()
    assert server.process.wait(30) == 1
