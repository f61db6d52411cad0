"""Tool calls and reasoning: parsers piece by piece, and what a chat answer makes of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_llm import BOS, EOS, FakeLLM
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_examples import activate
from test_server_app import CHAT, Client, refusal

from hotplug.core.errors import ConfigError
from hotplug.core.text.parsers import HermesParser, TagSplitter, ThinkParser, ToolCall, parse_call
from hotplug.server.app import create_app
from hotplug.server.config import ServerConfig
from hotplug.server.parsing import render_call

TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({c % (len(text) + 1) for c in cuts})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def told(parser: Any, parts: list[str]) -> tuple[str, Any]:
    """All content, and all reasoning or calls."""
    found = [parser.push(part) for part in parts] + [parser.finish()]
    content = "".join(f.content for f in found)
    if hasattr(found[0], "reasoning"):
        return content, "".join(f.reasoning for f in found)
    return content, [call for f in found for call in f.calls]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    text=st.lists(st.sampled_from(["<think>", "</think>", "<", "th", "ink>", "a", " ", "\n"]), max_size=12).map(
        "".join
    ),
    cuts=st.lists(st.integers(0, 60), max_size=8),
)
def test_where_text_is_cut_does_not_matter(text, cuts):
    assert told(ThinkParser(), pieces(text, cuts)) == told(ThinkParser(), [text])
    calls = text.replace("think", "tool_call")
    assert told(HermesParser(), pieces(calls, cuts)) == told(HermesParser(), [calls])


def test_text_without_a_tag_is_not_kept_back():
    splitter = TagSplitter("<think>", "</think>")
    assert splitter.push("plain <b") == [(False, "plain <b")]
    assert splitter.push("x <thi") == [(False, "x ")]


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("<think>a b</think>\n\nc", "c", "a b"),
        ("no tags", "no tags", ""),
        ("<think>never closed", "", "never closed"),
        ("<think>b</think>c<think>d</think>", "c<think>d</think>", "b"),
    ],
)
def test_reasoning_is_set_apart(text, content, reasoning):
    assert told(ThinkParser(), [text]) == (content, reasoning)


def test_a_template_may_have_opened_the_reasoning():
    assert told(ThinkParser("<|assistant|><think>\n"), ["why</think>so"]) == ("so", "why")


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (CALL, "", [ToolCall("weather", '{"city": "Oslo"}')]),
        (f"I look.\n{CALL}\n{CALL}", "I look.\n", [ToolCall("weather", '{"city": "Oslo"}')] * 2),
        ('<tool_call>{"name": "f", "parameters": {}}</tool_call>', "", [ToolCall("f", "{}")]),
        ("<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", []),
        ('<tool_call>{"name": "f"', '<tool_call>{"name": "f"', []),
        ("a < b", "a < b", []),
    ],
)
def test_calls_are_taken_out_and_what_is_none_stays(text, content, calls):
    assert told(HermesParser(), [text]) == (content, calls)


def test_arguments_as_a_string_are_left_as_they_are():
    assert parse_call('{"name": "f", "arguments": "{\\"a\\": 1}"}') == ToolCall("f", '{"a": 1}')


# --- chat answers ---------------------------------------------------------------------------------


@pytest.fixture
def llm():
    return FakeLLM()


def body(**fields: Any) -> dict[str, Any]:
    return {**CHAT, "tools": [TOOL], **fields}


def streamed(response: Any) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines[:-1]]


def test_a_call_is_answered_as_one(llm):
    llm.says = f"One moment.{CALL}"
    choice = Client(llm, tool_parser="hermes").post("/v1/chat/completions", body()).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "One moment."
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert call["type"] == "function"
    assert call["id"].startswith("call_")


def test_an_answer_of_calls_alone_has_no_content(llm):
    llm.says = CALL
    message = Client(llm, tool_parser="hermes").post("/v1/chat/completions", body()).json()["choices"][0]["message"]
    assert message["content"] is None


def test_calls_stream_with_an_index_of_their_own(llm):
    llm.says = f"Hm.{CALL}{CALL}"
    events = streamed(Client(llm, tool_parser="hermes").post("/v1/chat/completions", body(stream=True)))
    calls = [call for e in events for call in e["delta"].get("tool_calls", ())]
    assert [(c["index"], c["function"]["name"]) for c in calls] == [(0, "weather"), (1, "weather")]
    assert "".join(e["delta"].get("content") or "" for e in events) == "Hm."
    assert [e["finish_reason"] for e in events if e["finish_reason"]] == ["tool_calls"]


def test_reasoning_has_a_field_of_its_own_whole_and_streamed(llm):
    llm.says = "<think>because</think>Yes."
    client = Client(llm, reasoning_parser="think")
    message = client.post("/v1/chat/completions", CHAT).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("because", "Yes.")
    events = streamed(client.post("/v1/chat/completions", {**CHAT, "stream": True}))
    assert "".join(e["delta"].get("reasoning_content") or "" for e in events) == "because"
    assert "".join(e["delta"].get("content") or "" for e in events) == "Yes."
    assert events[-1]["finish_reason"] == "stop"


def test_tags_that_are_special_tokens_are_kept_for_the_parsers_that_look_for_them(llm, monkeypatch):
    monkeypatch.setattr(HermesParser, "tags", ("<s>", "</s>"))
    client = Client(llm, tool_parser="hermes")
    for request in (body(max_tokens=1), {**CHAT, "max_tokens": 1}):
        assert client.post("/v1/chat/completions", request).status_code == 200
    assert [params.keep_special_tokens for _, params, *_ in llm.seen] == [(BOS, EOS), ()]


@pytest.mark.parametrize(
    "arguments",
    ['{"x": "\\ud83d"}', '{"x": NaN}', '{"x": 1e400}', "[" * 10_000 + "]" * 10_000, '"\\ud83d"', "null", '""'],
)
def test_whatever_a_model_writes_in_a_call_is_answered_and_taken_back(llm, arguments):
    llm.says = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    client = Client(llm, tool_parser="hermes")
    message = client.post("/v1/chat/completions", body()).json()["choices"][0]["message"]
    (call,) = message["tool_calls"]
    json.loads(call["function"]["arguments"].replace("[" * 10_000 + "]" * 10_000, "[]"), parse_constant=pytest.fail)
    events = streamed(client.post("/v1/chat/completions", body(stream=True)))
    (again,) = [c for e in events for c in e["delta"].get("tool_calls", ())]
    assert again["function"] == call["function"]
    if len(arguments) < 1000:  # a body of that depth is refused
        llm.says = None
        history = [
            {"role": "user", "content": "?"},
            message,
            {"role": "tool", "tool_call_id": call["id"], "content": "!"},
        ]
        assert client.post("/v1/chat/completions", body(messages=history, max_tokens=1)).status_code == 200


def test_what_a_plugins_parser_gives_can_always_be_sent():
    function = render_call(ToolCall("f\ud83d", '{"x": "\ud83d"}'))["function"]
    assert function == {"name": "f\ufffd", "arguments": '{"x": "\\ud83d"}'}


def test_without_tools_the_text_of_a_call_is_content(llm):
    llm.says = CALL
    choice = Client(llm, tool_parser="hermes").post("/v1/chat/completions", CHAT).json()["choices"][0]
    assert choice["message"]["content"] == CALL
    assert choice["finish_reason"] == "stop"
    none = Client(llm, tool_parser="hermes").post("/v1/chat/completions", body(tool_choice="none")).json()
    assert none["choices"][0]["message"]["content"] == CALL


def test_tools_reach_the_template_and_come_back_as_history(llm):
    history = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]  # fmt: skip
    response = Client(llm, tool_parser="hermes").post("/v1/chat/completions", body(messages=history, max_tokens=1))
    assert response.status_code == 200, response.text
    prompt = bytes(t for t in llm.seen[0][0] if t < 256).decode()
    assert "[tools=[{'type': 'function', 'function': {'name': 'weather', 'description': 'd'" in prompt
    assert "<tool>rain" in prompt


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice", "calls are not forced"),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice", "not forced"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools", "not constrained"),
        ({"tools": [{"type": "function", "function": {"nme": "f"}}]}, "tools.function.nme", "unknown field"),
    ],
)
def test_what_tools_cannot_do_is_refused_by_name(llm, fields, param, words):
    error = refusal(Client(llm, tool_parser="hermes").post("/v1/chat/completions", body(**fields)), 400)
    assert error["param"] == param
    assert words in error["message"]


def test_tools_on_a_server_without_a_parser_are_refused_with_what_to_do(llm):
    assert "--tool-parser" in refusal(Client(llm).post("/v1/chat/completions", body()), 400)["message"]


def test_an_unknown_parser_is_refused_at_start_with_the_nearest(llm):
    with pytest.raises(ConfigError, match=r"no tool parser 'hermis'.*'hermes'"):
        create_app(llm, ServerConfig(tool_parser="hermis"))


def test_a_packages_parsers_serve_by_name(llm, monkeypatch):
    activate(monkeypatch, "extras")
    client = Client(llm, tool_parser="arrow", reasoning_parser="bracket")
    llm.says = '[let me see]I call.\n-> weather {"city": "Oslo"}\ndone'
    message = client.post("/v1/chat/completions", body()).json()["choices"][0]["message"]
    assert message["reasoning_content"] == "let me see"
    assert message["content"] == "I call.\ndone"
    assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    events = streamed(client.post("/v1/chat/completions", body(stream=True)))
    assert [c["function"]["name"] for e in events for c in e["delta"].get("tool_calls", ())] == ["weather"]
