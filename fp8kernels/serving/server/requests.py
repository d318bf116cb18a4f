"""Bodies that clients send, checked field by field before the model sees them.

A parameter that would change the answer and is not supported is refused; one that cannot change it is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

Body = dict[str, Any]
Check = Callable[[str, Any], Any]  # name and value to the value that goes on, or Refused
ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_STOPS = 4  # OpenAI's limit
LONGEST_STOP = 500  # characters; transformers lays each out against the whole vocabulary, before the first token
PASSED_OVER = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options"}
    | {"parallel_tool_calls"}
)


class Refused(Exception):
    """A request that is answered with an error; `message` is for the person who sent it."""

    def __init__(
        self, message: str, *, status: int = 400, code: str = "invalid_request", parameter: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.parameter = message, status, code, parameter

    def body(self) -> Body:
        """The error in the form of OpenAI's API."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "code": self.code, "param": self.parameter}}


def parse(raw: bytes) -> Body:
    """A JSON object from bytes.

    raises   Refused
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise Refused(f"the body is a JSON {_kind(body)}; it must be an object", code="invalid_json")
    return body


def completion(body: Body) -> Body:
    """A body of /v1/completions that transformers' handler understands, without nulls and with `prompt` a string.

    raises   Refused naming the field
    """
    checked = _check(body, COMPLETION)
    if "prompt" not in checked:
        raise Refused("prompt is missing; it is the text to go on from", parameter="prompt")
    return checked


def chat(body: Body) -> Body:
    """A body of /v1/chat/completions that transformers' handler understands, the limit of tokens under `max_tokens`.

    raises   Refused naming the field
    """
    checked = _check(body, CHAT)
    if "messages" not in checked:
        raise Refused("messages is missing; it is a list of {role, content}", parameter="messages")
    limit = checked.pop("max_completion_tokens", None)
    if limit is not None:
        checked["max_tokens"] = limit
    return checked


def fit(body: Body, prompt_tokens: int, context: int | None, default: int) -> None:
    """Set max_tokens where it is missing, and refuse what exceeds the model's context.

    default  tokens to generate where the client does not say, if the context has room for them
    raises   Refused naming the three numbers
    """
    if prompt_tokens == 0:
        raise Refused("the prompt has no tokens; give at least one word", parameter="prompt")
    room = default if context is None else context - prompt_tokens
    asked = body.setdefault("max_tokens", max(1, min(default, room)))
    if context is not None and asked > room:
        raise Refused(
            f"{prompt_tokens} prompt tokens and max_tokens {asked} are {prompt_tokens + asked} tokens; "
            f"the model's context is {context}",
            code="context_length_exceeded",
            parameter="max_tokens",
        )


def _check(body: Body, fields: Mapping[str, Check]) -> Body:
    checked = {}
    for name, value in body.items():
        if name in PASSED_OVER or value is None:
            continue
        if name not in fields:
            raise Refused(
                f"parameter {name[:60]!r} is not known here; known are {', '.join(sorted(fields))}",
                code="unknown_parameter",
                parameter=name[:60],
            )
        checked[name] = fields[name](name, value)
    if checked.get("stop") == []:
        del checked["stop"]
    return checked


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _refuse(name: str, value: Any, wanted: str) -> Refused:
    shown = json.dumps(value)[:60] if isinstance(value, str | int | float) else f"a JSON {_kind(value)}"
    return Refused(f"{name} is {shown}; it must be {wanted}", parameter=name)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _refuse(name, value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a pair, which JSON can carry and UTF-8 cannot
        raise Refused(f"{name} holds a lone surrogate, which is no character", parameter=name) from None
    return value


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, value, "true or false")
    return value


def _whole(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _refuse(name, value, f"a whole number from {low} to {high}")
        return value

    return check


def _number(low: float, high: float, *, above: bool = False) -> Check:
    def check(name: str, value: Any) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not (low < value if above else low <= value) or not value <= high:
            raise _refuse(
                name, value, f"a number {'above' if above else 'from'} {low} {'and up ' if above else ''}to {high}"
            )
        return float(value)

    return check


def _only(*neutral: Any) -> Check:
    """Values that ask for nothing; all others would be passed over in silence by the handlers behind."""

    def check(name: str, value: Any) -> Any:
        if not any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral):
            shown = json.dumps(value)[:60]
            raise Refused(
                f"{name} = {shown} is not supported here" + (f"; {json.dumps(neutral[0])} is" if neutral else ""),
                code="unsupported_parameter",
                parameter=name,
            )
        return value

    return check


def _stop(name: str, value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise _refuse(name, value, f"a string or a list of at most {MOST_STOPS}")
    if any(not _text(name, stop) for stop in stops):
        raise Refused("stop holds an empty string, which every text contains", parameter=name)
    if (longest := max(map(len, stops), default=0)) > LONGEST_STOP:
        raise Refused(
            f"stop holds a string of {longest} characters; {LONGEST_STOP} at most are looked for", parameter=name
        )
    return stops


def _prompt(name: str, value: Any) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if isinstance(value, list):
        raise Refused(f"prompt is a list of {len(value)}; one string a request is served", parameter=name)
    if not _text(name, value):
        raise Refused("the prompt is empty; give at least one word", parameter=name)
    return str(value)


def _bias(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise _refuse(name, value, "an object of token ids and numbers")
    if any(not (token.isascii() and token.isdigit() and len(token) < 10) for token in value):
        raise Refused("logit_bias has a key that is no token id", parameter=name)
    return {token: _number(-100, 100)(f"{name}.{token}", bias) for token, bias in value.items()}


def _messages(name: str, value: Any) -> list[Body]:
    if not isinstance(value, list):
        raise _refuse(name, value, "a list of {role, content}")
    if not value:
        raise Refused("messages is empty; give at least one", parameter=name)
    return [_message(f"{name}[{index}]", message) for index, message in enumerate(value)]


def _message(name: str, message: Any) -> Body:
    if not isinstance(message, dict):
        raise _refuse(name, message, "an object with role and content")
    if message.get("role") not in ROLES:
        raise _refuse(f"{name}.role", message.get("role"), f"one of {', '.join(ROLES)}")
    checked: Body = {"role": message["role"]}
    calls, content = message.get("tool_calls"), message.get("content")
    if calls is not None:
        checked["tool_calls"] = _tool_calls(f"{name}.tool_calls", calls)
    elif isinstance(content, list):
        checked["content"] = [_part(f"{name}.content[{index}]", part) for index, part in enumerate(content)]
    else:
        checked["content"] = _text(f"{name}.content", content)
    if message.get("tool_call_id") is not None:
        checked["tool_call_id"] = _text(f"{name}.tool_call_id", message["tool_call_id"])
    return checked


def _part(name: str, part: Any) -> Body:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise Refused(f'{name} is no {{"type": "text", "text": …}}; this model reads text alone', parameter=name)
    return {"type": "text", "text": _text(f"{name}.text", part.get("text"))}


def _tool_calls(name: str, calls: Any) -> list[Body]:
    if not isinstance(calls, list):
        raise _refuse(name, calls, "a list")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(f"{name} holds a call without function.name", parameter=name)
        try:
            parsed = json.loads(_text(f"{name}.function.arguments", function.get("arguments")))
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            raise Refused(f"{name}: function.arguments must be a JSON object in a string", parameter=name)
    return calls


def _objects(name: str, value: Any) -> list[Body]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _refuse(name, value, "a list of objects")
    return value


def _template_arguments(name: str, value: Any) -> Body:
    """Plain values alone; which names a template may not be given, the endpoint knows."""
    if not isinstance(value, dict) or not all(isinstance(item, str | int | float | bool) for item in value.values()):
        raise _refuse(name, value, "an object of strings, numbers and booleans")
    return value


def _response_format(name: str, value: Any) -> Body:
    if value != {"type": "text"}:
        raise Refused("response_format is not supported here beyond text", code="unsupported_parameter", parameter=name)
    return {"type": "text"}


COMMON: dict[str, Check] = {
    "model": _text,
    "max_tokens": _whole(1, 2**31 - 1),
    "temperature": _number(0, 2),
    "top_p": _number(0, 1, above=True),
    "frequency_penalty": _number(-1, 2, above=True),  # transformers divides by 1 + it
    "presence_penalty": _only(0),
    "seed": _whole(0, 2**63 - 1),
    "stop": _stop,
    "stream": _boolean,
    "n": _only(1),
}
COMPLETION: dict[str, Check] = {
    **COMMON,
    "prompt": _prompt,
    "best_of": _only(1),
    "echo": _only(False),
    "logprobs": _only(),
    "suffix": _only(""),
    "logit_bias": _only({}),
}
CHAT: dict[str, Check] = {
    **COMMON,
    "messages": _messages,
    "max_completion_tokens": _whole(1, 2**31 - 1),
    "logit_bias": _bias,
    "tools": _objects,
    "tool_choice": _only("auto"),
    "chat_template_kwargs": _template_arguments,
    "logprobs": _only(False),
    "top_logprobs": _only(0),
    "response_format": _response_format,
}
