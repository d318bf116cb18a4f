"""Bodies of requests: what is accepted goes on as the handlers read it, what is refused names field and way out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fp8kernels.serving.server.requests import Refused, chat, completion, fit, parse

HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "not JSON"),
        (b'{"prompt": "a"', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"max_tokens": ' + b"1" * 10_000 + b"}", "not JSON"),
        (b"[1]", "array; it must be an object"),
        (b'"prompt"', "string; it must be an object"),
        (b"null", "null; it must be an object"),
    ],
    ids=["empty", "open", "bytes", "deep", "huge", "array", "string", "null"],
)
def test_what_is_no_object_is_refused(raw: bytes, match: str) -> None:
    with pytest.raises(Refused, match=match) as refused:
        parse(raw)
    assert refused.value.status == 400
    assert refused.value.body()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": 3}, "prompt is 3; it must be a string"),
        ({"prompt": ["a", "b"]}, "prompt is a list of 2"),
        ({"prompt": [1, 2, 3]}, "prompt is a list of 3"),
        ({"prompt": "\ud800"}, "lone surrogate"),
        ({"max_tokens": -1}, "max_tokens is -1; it must be a whole number from 1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"max_tokens": "9"}, 'max_tokens is "9"'),
        ({"max_tokens": True}, "max_tokens is true"),
        ({"max_tokens": 2**40}, "max_tokens is 1099511627776"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be a number from 0 to 2"),
        ({"temperature": float("nan")}, "temperature is NaN"),
        ({"temperature": float("inf")}, "temperature is Infinity"),
        ({"top_p": 0}, "top_p is 0; it must be a number above 0 and up to 1"),
        ({"frequency_penalty": -1}, "frequency_penalty is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"stream": "yes"}, 'stream is "yes"; it must be true or false'),
        ({"stop": ["a"] * 5}, "at most 4"),
        ({"stop": ""}, "empty string"),
        ({"stop": ["a", "a" * 501]}, "501 characters; 500 at most"),
        ({"stop": [1]}, "stop is 1; it must be a string"),
        ({"n": 2}, "n = 2 is not supported here; 1 is"),
        ({"echo": True}, "echo = true is not supported here; false is"),
        ({"echo": 0}, "echo = 0 is not supported"),
        ({"logprobs": 0}, "logprobs = 0 is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty = 0.5"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"generation_config": "{}"}, "'generation_config' is not known here"),
        ({"top_k": 3}, "'top_k' is not known here"),
        ({"model": 3}, "model is 3; it must be a string"),
    ],
)
def test_completions_name_what_is_wrong(change: dict[str, Any], match: str) -> None:
    with pytest.raises(Refused, match=match) as refused:
        completion({"prompt": "a"} | change)
    assert refused.value.status == 400
    json.dumps(refused.value.body())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"messages": None}, "messages is missing"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hello"}, "must be a list"),
        ({"messages": ["hello"]}, r"messages\[0\] is \"hello\"; it must be an object"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\].role is a JSON null"),
        ({"messages": [*HELLO, {"role": "king", "content": "a"}]}, r"messages\[1\].role is \"king\""),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "role is a JSON array"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content is a JSON null"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is 3"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "reads text alone"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "text is 1"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "without function.name"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "must be a JSON object in a string",
        ),
        ({"max_completion_tokens": -4}, "max_completion_tokens is -4"),
        ({"logit_bias": {"a": 1}}, "no token id"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5 is 101"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": ["f"]}, "tools is a JSON array; it must be a list of objects"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"chat_template_kwargs": {"a": [1]}}, "object of strings, numbers and booleans"),
        ({"prompt": "a"}, "'prompt' is not known here"),
    ],
)
def test_chats_name_what_is_wrong(change: dict[str, Any], match: str) -> None:
    with pytest.raises(Refused, match=match):
        chat({"messages": HELLO} | change)


def test_what_cannot_change_the_answer_is_passed_over() -> None:
    sent = {"prompt": ["a"], "user": "me", "stop": [], "n": 1, "echo": False, "temperature": None, "stream_options": {}}
    assert completion(sent) == {"prompt": "a", "n": 1, "echo": False}
    body = chat({"messages": HELLO, "max_completion_tokens": 5, "max_tokens": 7, "stop": "x", "logprobs": False})
    assert (body["max_tokens"], body["stop"], body["messages"]) == (5, ["x"], HELLO)
    assert "max_completion_tokens" not in body


def test_the_limit_of_tokens_fits_the_context() -> None:
    for prompt, context, default, wanted in ((10, 64, 1024, 54), (10, 4096, 1024, 1024), (10, None, 16, 16)):
        body: dict[str, Any] = {}
        fit(body, prompt, context, default)
        assert body["max_tokens"] == wanted
    with pytest.raises(Refused, match=r"64 prompt tokens and max_tokens 1 are 65 tokens; the model's context is 64"):
        fit({}, 64, 64, 1024)
    with pytest.raises(Refused, match="no tokens"):
        fit({}, 0, 64, 1024)
