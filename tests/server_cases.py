"""What the official `openai` package expects of a server, as tests over two fixtures: `client` and `model`.

A module that has the fixtures runs the tests against its server with `from server_cases import *`. The
expectations hold for any model.
"""

from __future__ import annotations

import openai
import pytest

PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "Say hello."}]


def test_models_lists_the_served_model(client, model):
    assert [card.id for card in client.models.list()] == [model]
    assert client.models.retrieve(model).object == "model"


def test_completion_has_text_usage_and_ids(client, model):
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=5, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert answer.system_fingerprint


def test_completion_defaults_to_sixteen_tokens(client, model):
    answer = client.completions.create(model=model, prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16


def test_completion_takes_token_ids(client, model):
    answer = client.completions.create(model=model, prompt=[65, 66, 67], max_tokens=1)
    assert answer.usage.prompt_tokens == 3


def test_completion_of_several_prompts_keeps_their_order(client, model):
    alone = client.completions.create(model=model, prompt=PROMPT, max_tokens=4, temperature=0)
    both = client.completions.create(model=model, prompt=["Once", PROMPT], max_tokens=4, temperature=0)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[1].text == alone.choices[0].text


def test_n_gives_n_choices_and_counts_the_prompt_once(client, model):
    one = client.completions.create(model=model, prompt=PROMPT, max_tokens=3, extra_body={"ignore_eos": True})
    two = client.completions.create(model=model, prompt=PROMPT, max_tokens=3, n=2, extra_body={"ignore_eos": True})
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.usage.prompt_tokens == one.usage.prompt_tokens
    assert two.usage.completion_tokens == 6


def test_echo_returns_the_prompt(client, model):
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=2, echo=True)
    assert answer.choices[0].text.startswith(PROMPT)


def test_echo_with_logprobs_scores_the_prompt_without_output(client, model):
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=0, echo=True, logprobs=2)
    choice = answer.choices[0]
    assert choice.text == PROMPT
    assert answer.usage.completion_tokens == 0
    assert len(choice.logprobs.tokens) == answer.usage.prompt_tokens
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
    assert choice.logprobs.top_logprobs[0] is None


def test_completion_logprobs_have_one_entry_a_token(client, model):
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=3, logprobs=2, temperature=0, extra_body={"ignore_eos": True}
    )
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 3
    assert logprobs.text_offset[0] == 0
    for token, value, best in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert best[token] == value
        assert 2 <= len(best) <= 3


def test_completion_stream_adds_up_to_the_whole_answer(client, model):
    whole = client.completions.create(model=model, prompt=PROMPT, max_tokens=6, temperature=0)
    parts = list(client.completions.create(model=model, prompt=PROMPT, max_tokens=6, temperature=0, stream=True))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({part.id for part in parts}) == 1


def test_completion_stream_of_several_prompts_covers_every_choice(client, model):
    parts = client.completions.create(model=model, prompt=["Once", PROMPT], max_tokens=3, n=2, stream=True, echo=True)
    texts = dict.fromkeys(range(4), "")
    for part in parts:
        texts[part.choices[0].index] += part.choices[0].text
    assert [text.startswith("Once") for text in texts.values()] == [True, True, False, False]
    assert texts[3].startswith(PROMPT)


def test_chat_answers_as_the_assistant(client, model):
    answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=5, temperature=0)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def test_chat_takes_its_own_answers_back(client, model):
    first = client.chat.completions.create(model=model, messages=MESSAGES, max_completion_tokens=4)
    turns = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "And again."}]
    second = client.chat.completions.create(model=model, messages=turns, max_completion_tokens=4)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_chat_content_may_be_text_parts(client, model):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Say hello."}]}]
    as_parts = client.chat.completions.create(model=model, messages=parts, max_tokens=1)
    as_text = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=1)
    assert as_parts.usage.prompt_tokens == as_text.usage.prompt_tokens


def test_chat_stream_opens_with_the_role_and_ends_with_a_reason(client, model):
    whole = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=6, temperature=0)
    parts = list(
        client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=6, temperature=0, stream=True)
    )
    assert parts[0].choices[0].delta.role == "assistant"
    assert all(part.choices[0].delta.role is None for part in parts[1:])
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(part.usage is None for part in parts)


def test_stream_with_usage_ends_with_it(client, model):
    parts = list(
        client.chat.completions.create(
            model=model,
            messages=MESSAGES,
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    assert parts[-1].choices == []
    assert parts[-1].usage.completion_tokens == 4
    assert all(part.usage is None for part in parts[:-1])


def test_chat_logprobs_name_the_chosen_and_the_best_tokens(client, model):
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=3, temperature=0, logprobs=True, top_logprobs=3,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    content = answer.choices[0].logprobs.content
    assert len(content) == 3
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.logprob <= 0
        assert bytes(entry.bytes).decode(errors="replace") == entry.token


def test_chat_stream_carries_logprobs(client, model):
    parts = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=3, logprobs=True, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    entries = [e for p in parts if p.choices[0].logprobs for e in p.choices[0].logprobs.content]
    assert len(entries) == 3
    assert all(entry.top_logprobs == [] for entry in entries)


def test_stop_string_ends_the_text_before_it(client, model):
    free = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    stop = free.choices[0].text[4:6]
    cut = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0, stop=[stop])
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == free.choices[0].text[: free.choices[0].text.index(stop)]


def test_seed_repeats_the_answer(client, model):
    texts = {
        client.completions.create(model=model, prompt=PROMPT, max_tokens=8, seed=7).choices[0].text for _ in range(2)
    }
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 10**12}, "max_tokens"),
        ({"max_completion_tokens": 10**30}, "max_completion_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"hello": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
    ],
)
def test_bad_parameter_is_a_bad_request_that_names_it(client, model, change, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=model, messages=MESSAGES, **change)
    assert error.value.param == param
    assert error.value.type == "invalid_request_error"


def test_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="no-such-model", messages=MESSAGES)
    assert error.value.code == "model_not_found"


def test_prompt_beyond_the_context_is_a_bad_request_that_clients_know_by_its_code(client, model):
    with pytest.raises(openai.APIStatusError) as error:
        client.completions.create(model=model, prompt=[65] * 20_000, max_tokens=1)
    assert error.value.status_code == 400
    assert error.value.code == "context_length_exceeded"


def test_empty_prompt_is_a_bad_request(client, model):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=model, prompt=[[]])
    assert error.value.param == "prompt"
