"""Calls of tools in what a model says, by the format of its chat template.

| format | what is called |
|---|---|
| hermes | `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number of times (Hermes, Qwen) |
| llama3 | `{"name": …, "parameters": {…}}` alone, perhaps behind `<|python_tag|>`; several with `;` between (Llama 3) |
| mistral | `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]` |
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from .tools import Tools, fault

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_TAG, _BARE = "<|python_tag|>", re.compile(r'\s*\{\s*"name"\s*:')
_LIST = "[TOOL_CALLS]"
_THOUGHT = "</think>"
_ID = re.compile("[A-Za-z0-9]{9}")  # all that Mistral's templates take
_decoder = json.JSONDecoder()


class CallError(Exception):
    """What is wrong with a call, for the model to read."""


def format_of(program: str) -> str | None:
    """The format in which a chat template writes calls; None: it writes none that is known."""
    return next((name for name, (tells, _) in FORMATS.items() if tells.search(program)), None)


def read_calls(text: str, form: str, tools: Tools) -> tuple[str, list[dict[str, Any]]]:
    """What is said beside the calls in a turn, and the calls as `tool_calls` of a message; in a thought there are none.

    Args:
        text: control tokens by their names.
        form: of `FORMATS`.
        tools: that may be called, whose schemas the arguments must fit; None: any.

    Raises:
        CallError: a call is none, or calls what is not there.
    """
    thought, mark, said = text.rpartition(_THOUGHT)
    said, found = FORMATS[form][1](said)
    calls = [_checked(value, f"call {i}", tools) for i, value in enumerate(found, 1)]
    return (thought + mark + said).rstrip("\n") if calls else text, calls


def call(name: str, arguments: dict[str, Any], id: Any = None) -> dict[str, Any]:
    """A call as a message has it."""
    kept = {"id": id} if isinstance(id, str) and _ID.fullmatch(id) else {}
    return {**kept, "type": "function", "function": {"name": name, "arguments": arguments}}


def numbered(id: int) -> str:
    """The id of a call that has none: unique in its dialogue, and fit for Mistral's templates."""
    return f"call{id:05}"


def _checked(value: Any, place: str, tools: Tools) -> dict[str, Any]:
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str):
        raise CallError(f'{place} is not an object with a "name" and "arguments"')
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, dict):
        raise CallError(f"{place}: the arguments of {name} are not an object")
    if tools is not None and (wrong := fault(name, arguments, tools)):
        raise CallError(f"{place}: {wrong}")
    return call(name, arguments, value.get("id"))


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise CallError(f"{place} is nested too deeply") from None
    except ValueError as error:
        raise CallError(f"{place} is not JSON: {error}") from None


def _hermes(text: str) -> tuple[str, list[Any]]:
    before, *rest = text.split(_OPEN)
    found = []
    for i, part in enumerate(rest, 1):
        body, closed, behind = part.partition(_CLOSE)
        if not closed:
            raise CallError(f"call {i} is not closed with {_CLOSE}")
        found.append(_json(body, f"call {i}"))
        before += behind if behind.strip() else ""
    return before, found


def _llama3(text: str) -> tuple[str, list[Any]]:
    before, tag, body = text.rpartition(_TAG)
    if not tag and not _BARE.match(body):
        return text, []
    found: list[Any] = []
    body = body.strip()
    while body:
        try:
            value, end = _decoder.raw_decode(body)
        except (ValueError, RecursionError) as error:
            raise CallError(f"call {len(found) + 1} is not JSON: {error}") from None
        found.append(value)
        body = body[end:].lstrip("; \n")
    return before, found


def _mistral(text: str) -> tuple[str, list[Any]]:
    before, mark, body = text.partition(_LIST)
    if not mark:
        return text, []
    found = _json(body, "what is called")
    if not isinstance(found, list):
        raise CallError("what is called is not a list of calls")
    return before, found


# what tells of a format in a template, and how it is read: text to what is said beside the calls, and each call's value
FORMATS: dict[str, tuple[re.Pattern, Callable[[str], tuple[str, list[Any]]]]] = {
    "hermes": (re.compile(rf'{_OPEN}[\s\S]*"arguments\\?": '), _hermes),
    "mistral": (re.compile(re.escape(_LIST)), _mistral),
    "llama3": (re.compile(rf'{re.escape(_TAG)}|\{{"name": "[\s\S]*"parameters": '), _llama3),
}
