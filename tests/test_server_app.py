"""The HTTP application over a fake engine, in this process: what it refuses, passes on and reports."""

from __future__ import annotations

import asyncio
import json
from functools import partial

import httpx2
import pytest
from fake_llm import FakeLLM
from prometheus_client.parser import text_string_to_metric_families

import hotplug
from hotplug.core.request import EngineStats
from hotplug.server.app import create_app
from hotplug.server.config import ServerConfig

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "fake", "prompt": "hi"}


class Client:
    """Calls the app without a network."""

    def __init__(self, llm: FakeLLM, **options) -> None:
        self.app = create_app(llm, ServerConfig(**options))

    def request(self, method: str, path: str, **arguments) -> httpx2.Response:
        async def send() -> httpx2.Response:
            transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **arguments)

        return asyncio.run(send())

    def get(self, path: str, **arguments) -> httpx2.Response:
        return self.request("GET", path, **arguments)

    def post(self, path: str, body: object) -> httpx2.Response:
        return self.request("POST", path, json=body)

    def raw(self, path: str, body: bytes, content_type: str = "application/json") -> httpx2.Response:
        return self.request("POST", path, content=body, headers={"content-type": content_type})


@pytest.fixture
def llm():
    return FakeLLM()


@pytest.fixture
def client(llm):
    return Client(llm)


def refusal(response: httpx2.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


# --- malformed bodies -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"model": "fake",}', b"\xff\xfe", b"[]", b'"text"', b"null", b"[" * 100_000],
    ids=["empty", "open", "comma", "not utf-8", "list", "string", "null", "deep"],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_body_that_is_no_json_object_is_refused(client, path, body):
    refusal(client.raw(path, body), 400)


def test_malformed_json_says_where(client):
    error = refusal(client.raw("/v1/completions", b'{"model": fake}'), 400)
    assert "not valid JSON" in error["message"] and "10" in error["message"]


def test_wrong_content_type_is_refused_with_the_right_one(client):
    body = json.dumps(TEXT).encode()
    error = refusal(client.raw("/v1/completions", body, "text/plain"), 400)
    assert "application/json" in error["message"]


@pytest.mark.parametrize("place", [b'"prompt": "%s"', b'"prompt": "a", "%s": 1', b'"prompt": "a", "user": "%s"'])
def test_half_a_surrogate_pair_is_refused(client, place):
    body = b'{"model": "fake", ' + place % rb"a\ud83d" + b"}"
    assert r"\ud83d" in refusal(client.raw("/v1/completions", body), 400)["message"]


def test_escaped_emoji_is_text(client, llm):
    assert client.raw("/v1/completions", rb'{"model": "fake", "prompt": "\ud83d\ude00"}').status_code == 200
    assert bytes(llm.seen[0][0]).decode() == "\U0001f600"


def test_body_over_the_limit_is_refused(llm):
    client = Client(llm, max_body_size="2KiB")
    refusal(client.post("/v1/completions", {**TEXT, "prompt": "x" * 3000}), 413)
    assert not llm.seen


# --- parameters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [b"NaN", b"1e999", b"-Infinity"])
def test_number_that_is_not_finite_is_refused_by_name(client, number):
    body = b'{"model": "fake", "prompt": "hi", "temperature": ' + number + b"}"
    assert refusal(client.raw("/v1/completions", body), 400)["param"] == "temperature"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "0.5"),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", 0),
        ("n", 1000),
        ("stream", "yes"),
        ("stop", 5),
        ("stop", ""),
        ("seed", 2**70),
        ("logprobs", 21),
        ("logprobs", True),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"²": 1}),
        ("logit_bias", {"260": 1}),
        ("logit_bias", [1]),
        ("stop_token_ids", [260]),
        ("priority", 2**40),
        ("speculative", "yes"),
        ("best_of", 3),
        ("suffix", "end"),
        ("min_tokens", 400),
        ("prompt", None),
        ("prompt", [1, "a"]),
        ("prompt", [260]),
        ("prompt", [-1]),
        ("prompt", []),
        ("prompt", ""),
        ("prompt", ["a", ""]),
        ("prompt", ["x"] * 3000),
    ],
)
def test_bad_completion_field_is_refused_by_name(client, field, value):
    assert refusal(client.post("/v1/completions", {**TEXT, field: value}), 400)["param"] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("store", True),
        ("web_search_options", {}),
        ("moderation", {"model": "m"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy", "format": "wav"}),
    ],
)
def test_services_around_a_model_are_refused_by_name(client, field, value):
    assert refusal(client.post("/v1/chat/completions", {**CHAT, field: value}), 400)["param"] == field


def test_missing_field_is_refused_by_name(client):
    assert refusal(client.post("/v1/completions", {"prompt": "hi"}), 400)["param"] == "model"


def test_unknown_field_comes_with_the_nearest_name(client):
    error = refusal(client.post("/v1/completions", {**TEXT, "max_token": 3}), 400)
    assert error["param"] == "max_token"
    assert "'max_tokens'" in error["message"]


def test_openai_fields_at_their_neutral_value_are_taken(client):
    neutral = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False,
        "service_tier": "auto", "modalities": ["text"], "reasoning_effort": None, "user": "me",
        "metadata": {"a": "b"}, "parallel_tool_calls": True, "top_k": None,
    }  # fmt: skip
    assert client.post("/v1/chat/completions", {**CHAT, **neutral}).status_code == 200


def test_stream_options_we_do_not_have_are_refused(client):
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    error = refusal(client.post("/v1/completions", {**TEXT, **options}), 400)
    assert error["param"] == "stream_options.continuous_usage_stats"


def test_two_limits_that_differ_are_refused(client):
    body = {**CHAT, "max_tokens": 3, "max_completion_tokens": 4}
    assert refusal(client.post("/v1/chat/completions", body), 400)["param"] == "max_completion_tokens"


def test_max_tokens_past_the_context_names_the_figures(client):
    error = refusal(client.post("/v1/completions", {**TEXT, "max_tokens": 511}), 400)
    assert error["param"] == "max_tokens"
    assert all(figure in error["message"] for figure in ("511", "2 tokens", "512", "at most 510"))


def test_limit_below_one_is_refused_under_the_name_it_came_with(client):
    body = {**CHAT, "max_completion_tokens": 0}
    assert refusal(client.post("/v1/chat/completions", body), 400)["param"] == "max_completion_tokens"


def test_long_prompts_keep_their_order(llm):
    llm.max_model_len = 100_000
    texts = ["a" * 30_000, "b" * 30_000]
    Client(llm).post("/v1/completions", {**TEXT, "prompt": texts, "max_tokens": 1})
    assert sorted(bytes(prompt).decode() for prompt, *_ in llm.seen) == texts


def test_prompt_that_fills_the_context_is_too_long(client):
    assert refusal(client.post("/v1/completions", {**TEXT, "prompt": "x" * 512}), 400)["code"] == (
        "context_length_exceeded"
    )


def test_empty_text_is_a_prompt_where_the_tokenizer_opens_with_a_token():
    llm = FakeLLM(adds_bos=True)
    assert Client(llm).post("/v1/completions", {**TEXT, "prompt": ""}).status_code == 200
    assert llm.seen[0][0] == [256]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "wizard", "content": "hi"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": 3},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": "please raise"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]},
        {"role": "user", "content": "hi", "colour": "red"},
        "hi",
    ],
    ids=["role", "no content", "null", "number", "image", "part", "template", "tool call", "field", "text"],
)
def test_bad_message_is_refused_by_name(client, message):
    error = refusal(client.post("/v1/chat/completions", {**CHAT, "messages": [message]}), 400)
    assert error["param"].startswith("messages")


def test_error_in_a_message_names_its_place(client):
    messages = [*CHAT["messages"], {"role": "wizard", "content": "hi"}]
    error = refusal(client.post("/v1/chat/completions", {**CHAT, "messages": messages}), 400)
    assert error["param"] == "messages[1].role"


def test_no_messages_are_refused(client):
    assert refusal(client.post("/v1/chat/completions", {**CHAT, "messages": []}), 400)["param"] == "messages"


def test_template_arguments_of_ours_cannot_be_overridden(client):
    body = {**CHAT, "chat_template_kwargs": {"template": "{{ 1 }}"}}
    assert refusal(client.post("/v1/chat/completions", body), 400)["param"] == "chat_template_kwargs"


# --- what reaches the engine ------------------------------------------------------------------------


def test_every_sampling_field_reaches_the_engine(client, llm):
    fields = {
        "n": 2, "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1,
        "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3, "seed": 5,
        "ignore_eos": True, "speculative": True, "skip_special_tokens": False, "include_stop_str_in_output": True,
    }  # fmt: skip
    extra = {"logit_bias": {"65": -5}, "stop": "q", "stop_token_ids": [66], "priority": -1, "cache_salt": "a"}
    assert client.post("/v1/completions", {**TEXT, **fields, **extra, "logprobs": 3}).status_code == 200
    prompt, params, priority, salt = llm.seen[0]
    assert prompt == [104, 105]
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.logit_bias == {65: -5}
    assert (params.stop, params.stop_token_ids, params.logprobs) == (("q",), (66,), 3)
    assert (priority, salt) == (-1, "a")


def test_chat_runs_to_the_end_of_the_context_at_temperature_one(client, llm):
    client.post("/v1/chat/completions", CHAT)
    assert llm.seen[0][1].max_tokens is None
    assert llm.seen[0][1].temperature == 1.0


def test_chat_renders_parts_roles_and_template_variables(client, llm):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    body = {**CHAT, "messages": messages, "max_tokens": 1, "chat_template_kwargs": {"mood": "calm"}}
    client.post("/v1/chat/completions", body)
    assert bytes(llm.seen[0][0]) == b"<system>be brief<user>a\nb[mood=calm]<assistant>"


def test_completion_default_shrinks_to_the_room_left(client, llm):
    assert client.post("/v1/completions", {**TEXT, "prompt": "x" * 505}).status_code == 200
    assert llm.seen[0][1].max_tokens == 7


def test_bug_in_the_engine_is_an_internal_error_without_details(client, llm):
    llm.refuse = ZeroDivisionError("secret")
    error = refusal(client.post("/v1/completions", TEXT), 500)
    assert error["code"] == "internal_error"
    assert "secret" not in error["message"]


def test_server_answers_after_bad_input(client):
    refusal(client.raw("/v1/completions", b"{"), 400)
    assert client.post("/v1/completions", TEXT).status_code == 200


# --- answers ----------------------------------------------------------------------------------------


def test_stream_is_made_of_small_exact_events(client):
    lines = client.post("/v1/completions", {**TEXT, "max_tokens": 2, "stream": True}).text.split("\n\n")
    first, last = (json.loads(line.removeprefix("data: ")) for line in lines[:2])
    assert first == {
        "id": first["id"],
        "object": "text_completion",
        "created": first["created"],
        "model": "fake",
        "system_fingerprint": "0123456789ab",
        "choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None, "stop_reason": None}],
    }
    assert last["choices"][0]["finish_reason"] == "length"
    assert lines[2:] == ["data: [DONE]", ""]


def test_streamed_echo_carries_the_prompt_and_its_logprobs_first(client):
    body = {**TEXT, "max_tokens": 2, "stream": True, "echo": True, "logprobs": 1}
    lines = client.post("/v1/completions", body).text.split("\n\n")
    choice = json.loads(lines[0].removeprefix("data: "))["choices"][0]
    assert choice["text"] == "hia"
    assert choice["logprobs"]["tokens"] == ["h", "i", "a"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    then = json.loads(lines[1].removeprefix("data: "))["choices"][0]
    assert then["logprobs"]["text_offset"] == [3]


def test_prompt_logprobs_go_to_the_choices_of_their_prompt(client):
    body = {**TEXT, "prompt": ["ab", "xyz"], "n": 2, "max_tokens": 0, "echo": True, "logprobs": 1}
    choices = client.post("/v1/completions", body).json()["choices"]
    tokens = ["".join(choice["logprobs"]["tokens"]) for choice in choices]
    assert tokens == ["ab", "ab", "xyz", "xyz"]


def test_usage_counts_cached_tokens_of_a_prompt_once(client):
    usage = client.post("/v1/completions", {**TEXT, "n": 2}).json()["usage"]
    assert usage == {
        "prompt_tokens": 2,
        "completion_tokens": 32,
        "total_tokens": 34,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_stop_reason_names_the_stop_string(client):
    choice = client.post("/v1/completions", {**TEXT, "stop": ["zz", "cd"]}).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", "cd")


# --- the other routes -------------------------------------------------------------------------------


def test_tokenize_and_detokenize_are_inverse(client):
    tokens = client.post("/tokenize", {"prompt": "hé"}).json()
    assert tokens == {"tokens": [104, 195, 169], "count": 3, "max_model_len": 512}
    assert client.post("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "hé"}


def test_tokenize_renders_messages(client):
    body = {"messages": CHAT["messages"], "return_token_strs": True}
    answer = client.post("/tokenize", body).json()
    assert "".join(answer["token_strs"]) == "<user>hi<assistant>"


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": CHAT["messages"]}, {"prompt": 1}])
def test_tokenize_wants_one_input(client, body):
    assert refusal(client.post("/tokenize", body), 400)["param"] == "prompt"


def test_detokenize_refuses_ids_outside_the_vocabulary(client):
    assert refusal(client.post("/detokenize", {"tokens": [1, 260]}), 400)["param"] == "tokens"


@pytest.mark.parametrize("path", ["/v1/models/other", "/tokenize", "/v1/completions"])
def test_unknown_model_is_not_found(client, path):
    body = {"prompt": "hi", "model": "other"}
    response = client.get(path) if "models" in path else client.post(path, body)
    assert refusal(response, 404)["code"] == "model_not_found"


def test_model_name_may_hold_slashes(llm):
    llm.config = type(llm.config)(served_model_name="org/name")
    assert Client(llm).get("/v1/models/org/name").json()["max_model_len"] == 512


def test_unknown_route_is_not_found(client):
    assert refusal(client.get("/v2/models"), 404)["code"] == "unknown_route"


def test_wrong_method_is_refused(client):
    response = client.get("/v1/completions")
    refusal(response, 405)
    assert response.headers["allow"] == "POST, OPTIONS"


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/fake",
                                  "/debug/plan", "/openapi.json"])  # fmt: skip
def test_head_is_get_without_the_body(client, path):
    got, asked = client.get(path), client.request("HEAD", path)
    assert asked.status_code == got.status_code == 200
    assert asked.content == b""
    assert asked.headers["content-type"] == got.headers["content-type"]
    assert "content-length" in asked.headers


def test_head_where_get_is_refused_is_refused_too(llm):
    assert Client(llm).request("HEAD", "/v1/completions").status_code == 405
    assert Client(llm).request("HEAD", "/nowhere").status_code == 404
    assert Client(llm, api_key=("k",)).request("HEAD", "/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/v1/chat/completions", "POST, OPTIONS"), ("/v1/models", "GET, HEAD, OPTIONS"), ("/health", "GET, HEAD, OPTIONS"),
     ("/v1/models/", "GET, HEAD, OPTIONS"), ("/*", "GET, HEAD, OPTIONS, POST")],
)  # fmt: skip
def test_options_says_what_is_allowed_and_asks_for_no_key(llm, path, allowed):
    llm.ready = False
    response = Client(llm, api_key=("k",)).request("OPTIONS", path)
    assert (response.status_code, response.headers["allow"], response.content) == (204, allowed, b"")


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/v1/models/fake"])
def test_a_slash_at_the_end_changes_nothing(client, path):
    assert client.get(path + "/").json() == client.get(path).json()
    assert client.post("/v1/completions/", TEXT).status_code == 200


@pytest.mark.parametrize("method", ["DELETE", "PUT", "PATCH", "TRACE"])
def test_refused_method_comes_with_what_is_allowed(client, method):
    response = client.request(method, "/v1/models")
    refusal(response, 405)
    assert response.headers["allow"] == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("content-encoding", "gzip", 415),
        ("content-encoding", "br", 415),
        ("content-encoding", "identity, gzip", 415),
        ("content-type", "text/plain", 400),
        ("content-type", "application/x-www-form-urlencoded", 400),
        ("content-type", "multipart/form-data; boundary=x", 400),
        ("transfer-encoding", "gzip, chunked", 501),
        ("expect", "a-pony", 417),
    ],
)
def test_a_body_that_is_not_read_is_refused_by_the_header_that_says_so(client, header, value, status):
    sent = {"content-type": "application/json", header: value}
    response = client.request("POST", "/v1/completions", content=b"\x1f\x8b", headers=sent)
    error = refusal(response, status)
    assert header in error["message"].lower()
    assert value.partition(";")[0] in error["message"]


def test_what_is_taken_of_encodings_is_said(client):
    response = client.request("POST", "/v1/completions", content=b"", headers={"content-encoding": "zstd"})
    assert response.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("headers", [
    {"content-encoding": "identity"}, {"content-encoding": ""}, {"content-type": "application/json; charset=UTF-8"},
    {"content-type": "APPLICATION/JSON"}, {"content-type": "application/vnd.api+json"}, {"expect": "100-Continue"},
])  # fmt: skip
def test_headers_that_change_nothing_are_taken(client, headers):
    sent = {"content-type": "application/json", **headers}
    response = client.request("POST", "/v1/completions", content=json.dumps(TEXT).encode(), headers=sent)
    assert response.status_code == 200, response.text


def test_bodies_of_all_requests_together_are_bounded(llm):
    client = Client(llm, max_body_size="1KiB")
    llm.hang_after = 0
    body = json.dumps(TEXT).encode().ljust(1024)

    async def fill() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(client.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
            send = partial(http.post, "/v1/completions", content=body, headers={"content-type": "application/json"})
            waiting = [asyncio.ensure_future(send()) for _ in range(32)]
            while len(llm.seen) < 32:
                await asyncio.sleep(0)
            refused = [await send() for _ in range(3)]
            for each in waiting:
                each.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            llm.hang_after = None
            return [*refused, await send()]

    *refused, taken = asyncio.run(asyncio.wait_for(fill(), 20))
    assert [r.status_code for r in refused] == [503] * 3
    assert refused[-1].headers["retry-after"] == "5"
    assert taken.status_code == 200


@pytest.mark.parametrize("sent", [None, "Bearer no", "Basic k1", "k1", "Bearer"])
def test_missing_or_wrong_key_is_refused(llm, sent):
    client = Client(llm, api_key=("k1", "k2"))
    response = client.get("/v1/models", headers={"authorization": sent} if sent else {})
    assert refusal(response, 401)["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", ["k1", "k2"])
def test_any_of_the_keys_opens(llm, key):
    client = Client(llm, api_key=("k1", "k2"))
    assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics"])
def test_probes_need_no_key(llm, path):
    assert Client(llm, api_key=("k1",)).get(path).status_code == 200


def test_engine_that_starts_is_alive_and_not_ready(client, llm):
    llm.ready = False
    assert client.get("/health").status_code == 200
    ready = client.get("/ready")
    assert ready.status_code == 503
    assert ready.json()["status"] == "starting"
    assert int(ready.headers["retry-after"]) > 0


def test_engine_that_says_nothing_is_alive_and_not_ready_until_it_is_heard(client, llm):
    llm.stalled = "the engine has said nothing for 12 s"
    assert client.get("/health").status_code == 200
    ready = client.get("/ready")
    assert (ready.status_code, ready.json()) == (503, {"status": "stalled", "reason": llm.stalled})
    llm.stalled = None
    assert client.get("/ready").status_code == 200


def test_dead_engine_is_neither_alive_nor_ready_and_says_why(client, llm):
    llm.ready, llm.failure = False, "exit code 9\nTraceback: secret.py"
    for path in ("/health", "/ready"):
        response = client.get(path)
        assert response.status_code == 503
        assert response.json() == {"status": "dead", "reason": "exit code 9"}
    assert refusal(client.post("/v1/completions", TEXT), 500)["code"] == "engine_dead"


def test_version_is_the_packages(client):
    assert client.get("/version").json() == {"version": hotplug.__version__}


def test_debug_plan_is_the_engines(client):
    assert client.get("/debug/plan").json() == {"plan_hash": "0123456789abcdef", "sites": []}


def test_request_bodies_are_documented(client):
    schema = client.get("/openapi.json").json()
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["$ref"].endswith("/ChatBody")


def test_metrics_report_what_the_observer_saw(client, llm):
    observer = llm.observer
    observer.first_token(0.02)
    observer.inter_token(0.04, 2)
    observer.queued(0.001)
    observer.finished("stop", 10, 5, 0.3)
    observer.stats(EngineStats(running=3, waiting=4, kv_blocks_used=5, kv_blocks_total=20, prefix_queries=30,
                               prefix_hits=20, preemptions=1, prompt_tokens=40, generated_tokens=50,
                               reference_ops=2, recompiles=1, host_blocks_used=3, host_blocks_total=12,
                               blocks_swapped_out=7, blocks_swapped_in=6, verifications=4, proposed_tokens=20,
                               accepted_tokens=15))  # fmt: skip
    response = client.get("/metrics")
    families = text_string_to_metric_families(response.text)
    values = {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
    assert response.headers["content-type"].startswith("text/plain")
    expected = {
        ("hotplug_time_to_first_token_seconds_count",): 1,
        ("hotplug_time_to_first_token_seconds_bucket", "0.01"): 0,
        ("hotplug_time_to_first_token_seconds_bucket", "0.025"): 1,
        ("hotplug_inter_token_latency_seconds_count",): 2,
        ("hotplug_inter_token_latency_seconds_sum",): 0.04,
        ("hotplug_inter_token_latency_seconds_bucket", "0.02"): 2,
        ("hotplug_queue_time_seconds_bucket", "+Inf"): 1,
        ("hotplug_request_duration_seconds_sum",): 0.3,
        ("hotplug_requests_finished_total", "stop"): 1,
        ("hotplug_requests_running",): 3,
        ("hotplug_requests_waiting",): 4,
        ("hotplug_kv_cache_usage_ratio",): 0.25,
        ("hotplug_prefix_cache_queries_total",): 30,
        ("hotplug_prefix_cache_hits_total",): 20,
        ("hotplug_preemptions_total",): 1,
        ("hotplug_prompt_tokens_total",): 40,
        ("hotplug_generation_tokens_total",): 50,
        ("hotplug_reference_ops",): 2,
        ("hotplug_unplanned_recompiles_total",): 1,
        ("hotplug_swap_space_usage_ratio",): 0.25,
        ("hotplug_kv_blocks_swapped_out_total",): 7,
        ("hotplug_kv_blocks_swapped_in_total",): 6,
        ("hotplug_speculative_verifications_total",): 4,
        ("hotplug_speculative_proposed_tokens_total",): 20,
        ("hotplug_speculative_accepted_tokens_total",): 15,
        ("hotplug_speculative_acceptance_ratio",): 0.75,
        ("hotplug_speculative_tokens_per_verification",): 4.75,
    }
    assert {name: values.get(name) for name in expected} == expected
