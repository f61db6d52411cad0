"""What chat and completions mean over HTTP: the context, tools and their results, places and names of tokens."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from fake_llm import BOS, EOS, FakeLLM
from test_server_app import CHAT, TEXT, Client, refusal
from test_server_bodies import CALL, CALLS, RESULT, TOOL, USER

from hotplug.core.errors import RequestError
from hotplug.core.logprobs import TokenLogprobs
from hotplug.core.text import template
from hotplug.server.offsets import alternatives


@pytest.fixture
def llm() -> FakeLLM:
    return FakeLLM()


@pytest.fixture
def client(llm: FakeLLM) -> Client:
    return Client(llm)


# --- the context ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {**TEXT, "prompt": "x" * 512}, "prompt"),
        ("/v1/completions", {**TEXT, "prompt": "x" * 100_000}, "prompt"),
        ("/v1/completions", {**TEXT, "prompt": [65] * 600}, "prompt"),
        ("/v1/completions", {**TEXT, "max_tokens": 511}, "max_tokens"),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "x" * 100_000}]}, "messages"),
        ("/v1/chat/completions", {**CHAT, "max_completion_tokens": 500}, "max_completion_tokens"),
    ],
)
def test_beyond_the_context_clients_find_the_code_and_the_words_that_they_look_for(client, path, body, param):
    """LangChain looks for the code in the text of the exception, LiteLLM for the words of the message."""
    response = client.post(path, body)
    error = refusal(response, 400)
    assert error["param"] == param
    raised = openai.BadRequestError("Error code: 400 - " + str(response.json()), response=response, body=error)
    assert "context_length_exceeded" in str(raised)
    assert raised.code == "context_length_exceeded"
    assert "this model's maximum context length is 512 tokens" in str(raised).lower()


def test_a_limit_that_no_prompt_leaves_room_for_is_no_matter_of_the_context(client):
    error = refusal(client.post("/v1/completions", {**TEXT, "max_tokens": 10**9}), 400)
    assert (error["param"], error["code"]) == ("max_tokens", None)


def test_reasoning_that_templates_leave_out_does_not_count_before_rendering(client, llm, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "encode_chat", lambda *_, **__: [1, 2])
    for length, status in ((8_000, 200), (9_000, 400)):  # up to 16 characters a token of the context
        messages = [{"role": "assistant", "content": "<think>" + "x" * length + "</think>yes"}, *CHAT["messages"]]
        assert client.post("/v1/chat/completions", {**CHAT, "messages": messages}).status_code == status


# --- tools and templates ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([RESULT], "messages[0].role"),
        ([USER, RESULT], "messages[1].role"),
        ([USER, {"role": "assistant", "content": "a"}, RESULT], "messages[2].role"),
        ([USER, CALLS, USER, RESULT], "messages[3].role"),
        ([USER, CALLS, {"role": "tool", "content": "4"}], "messages[2].tool_call_id"),
        ([USER, CALLS, {**RESULT, "tool_call_id": "c9"}], "messages[2].tool_call_id"),
    ],
)
def test_the_result_of_no_call_is_refused(client, messages, param):
    assert refusal(client.post("/v1/chat/completions", {**CHAT, "messages": messages}), 400)["param"] == param
    assert refusal(client.post("/tokenize", {"messages": messages}), 400)["param"] == param


def test_results_of_calls_follow_them_in_any_order(client):
    messages = [USER, CALLS, {**RESULT, "tool_call_id": "c2"}, RESULT, USER]
    assert client.post("/v1/chat/completions", {**CHAT, "messages": messages}).status_code == 200


@pytest.mark.parametrize(
    "arguments", ["[" * 1000, "[" * 100_000, '{"a":' * 1000, "", "null", "NaN", "1e400", "\\ud83d"]
)
def test_arguments_in_the_history_may_be_anything(client, arguments):
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    messages = [USER, {**CALLS, "tool_calls": [call]}, RESULT]
    response = client.post("/v1/chat/completions", {**CHAT, "messages": messages})
    assert response.status_code in (200, 400), response.text


def test_tools_are_refused_where_the_template_knows_none(llm):
    client = Client(llm, tool_parser="hermes")
    body = {**CHAT, "tools": [TOOL]}
    assert client.post("/v1/chat/completions", body).status_code == 200
    llm.tokenizer.mentions = frozenset({"tool_calls"})
    assert "template" in refusal(client.post("/v1/chat/completions", body), 400)["message"]
    assert client.post("/v1/chat/completions", {**body, "tool_choice": "none"}).status_code == 200
    llm.tokenizer.mentions = frozenset()
    body = {**CHAT, "messages": [USER, CALLS, RESULT]}
    assert refusal(client.post("/v1/chat/completions", body), 400)["param"] == "messages"


@pytest.mark.parametrize(
    ("source", "knows"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{{ m.content }}{% endfor %}tools", False),
        ("{% if tools %}{{ tools | tojson }}{% endif %}", True),
        ("{% if tools is defined and tools is not none %}x{% endif %}", True),
        ("{{ messages[0]['tools'] }}", True),
    ],
)
def test_whether_a_template_knows_tools_is_read_off_it(source, knows):
    assert template.mentions(source, "tools") is knows


@pytest.mark.parametrize("name", ["self", "messages", "tools", "template", "add_generation_prompt"])
def test_template_variables_that_collide_are_refused(client, name):
    for path in ("/v1/chat/completions", "/tokenize"):
        body = {"messages": [USER], "chat_template_kwargs": {name: 1}, "model": "fake"}
        assert refusal(client.post(path, body), 400)["param"] == "chat_template_kwargs"


@pytest.mark.parametrize("variables", [{"namespace": None}, {"raise_exception": 1}, {"loop": 3}, {"a b": 1}, {"": 1}])
def test_a_template_that_breaks_on_its_variables_is_the_requests_fault(variables):
    source = (
        "{% set ns = namespace(a=1) %}{% for m in messages %}{{ loop.index }}{% endfor %}{{ raise_exception('no') }}"
    )
    with pytest.raises(RequestError):
        template.render(source, [USER], variables)


def test_whatever_a_template_raises_is_the_requests_fault():
    class OddError(Exception): ...

    def broken() -> None:
        raise OddError("odd")

    with pytest.raises(RequestError, match="odd"):
        template.render("{{ f() }}", [USER], {"f": broken})


# --- text_offset and names of tokens ----------------------------------------------------------------


def logprobs(client: Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", {**TEXT, "logprobs": 2, "max_tokens": 2, **body})
    return answer.json()["choices"][0]


EMOJI = list("\U0001f600".encode())


@pytest.mark.parametrize(
    ("prompt", "text", "offsets"),
    [
        ([104, *EMOJI, 105], "h\U0001f600iab", [0, 1, 1, 1, 1, 2, 3, 4]),
        ([BOS, 104, 105], "hiab", [0, 0, 1, 2, 3]),
        ([104, 105, EOS, 106], "hijab", [0, 1, 2, 2, 3, 4]),
        ("h\U0001f600i", "h\U0001f600iab", [0, 1, 1, 1, 1, 2, 3, 4]),
    ],
)
def test_text_offsets_of_an_echo_are_places_in_the_text(client, prompt, text, offsets):
    choice = logprobs(client, prompt=prompt, echo=True)
    assert choice["text"] == text
    assert choice["logprobs"]["text_offset"] == offsets
    parts = client.post("/v1/completions", {**TEXT, "prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 2,
                                            "stream": True}).text.split("\n\n")  # fmt: skip
    streamed = [json.loads(p.removeprefix("data: "))["choices"][0] for p in parts if p.startswith("data: {")]
    assert [at for part in streamed for at in part["logprobs"]["text_offset"]] == offsets


def test_an_added_first_token_is_no_part_of_the_echo():
    choice = logprobs(Client(FakeLLM(adds_bos=True)), prompt="hi", echo=True)
    assert choice["text"] == "hiab"
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2, 3]


def test_a_special_token_that_stays_has_its_length(client):
    choice = logprobs(client, prompt=[BOS, 104], echo=True, skip_special_tokens=False)
    assert choice["text"] == "<s>hab"
    assert choice["logprobs"]["text_offset"] == [0, 3, 4, 5]


def test_text_offsets_without_echo_begin_at_the_answer(client):
    assert logprobs(client, prompt="hello")["logprobs"]["text_offset"] == [0, 1]


def test_text_offsets_do_not_pass_a_stop_string(client):
    choice = logprobs(client, stop="cd", max_tokens=10)
    assert choice["text"] == "ab"
    assert max(choice["logprobs"]["text_offset"]) == 2


def test_tokens_of_equal_text_do_not_collapse(client):
    class Tokenizer:
        def token_bytes(self, token: int) -> bytes:
            return [b"a", b"\xe2\x80", b"\xe2\x81", b"a", b"a"][token]

    found = alternatives(Tokenizer(), TokenLogprobs([3, 0, 1, 2, 4], [-4.0, -1.0, -2.0, -3.0, -5.0], 4))
    assert found == {
        "bytes:\\x61": -1.0,
        "bytes:\\xe2\\x80": -2.0,
        "bytes:\\xe2\\x81": -3.0,
        "token_id:4": -5.0,
        "a": -4.0,
    }
    names = logprobs(client, prompt=[*EMOJI], echo=True)["logprobs"]["tokens"]
    assert names[:4] == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80"]
