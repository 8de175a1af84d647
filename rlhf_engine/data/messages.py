"""Dialogues as files write them, to messages: lists of messages of several kinds, JSON of one, hh-rlhf's text."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

from ..config import ConfigError
from .calls import call, numbered
from .chat import Message, Messages, clean

ROLES = {
    "system": "system", "user": "user", "assistant": "assistant",
    "developer": "system", "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "ipython": "tool", "tool_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
_CALLING = ("function_call", "tool_call")  # roles whose content is calls, as JSON
# which templates write themselves
_WRAPPED = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)
_WRITTEN = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")  # a list that was made text
_HUMAN = re.compile(r"\s*Human:")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SHAPE = "a list of messages, {'role': …, 'content': text}"


def read_messages(value: Any, where: str, field: str) -> Messages:
    """Messages from a list of them, from one alone, or from JSON of either.

    Raises:
        ConfigError: it is none, or has what is not supported, such as an image.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ConfigError(f"{where}: {field} must be {_SHAPE}, and is text that is no JSON") from None
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where}: {field} must be {_SHAPE}")
    messages = [_message(message, f"{where}: {field}: message {i}") for i, message in enumerate(value, 1)]
    for i, (before, message) in enumerate(pairwise(messages), 2):
        if message["role"] == "system" != before["role"]:
            raise ConfigError(f"{where}: {field}: message {i}: a system message stands first")
    return _with_ids(messages)


def read_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """`tool_calls` of a message: of calls in OpenAI's form or alone, of one of them, or of JSON.

    Raises:
        ConfigError: one has no name, or no object of arguments.
    """
    value = _parsed(value, f"{place}: its calls")
    calls = []
    for entry in value if isinstance(value, list) else [value]:
        entry = entry if isinstance(entry, dict) else {"is": entry}
        inner = entry["function"] if isinstance(entry.get("function"), dict) else entry
        name, given = inner.get("name"), inner.get("arguments", inner.get("parameters"))
        is_text = isinstance(given, str)
        arguments = _parsed(given or "{}", f"{place}: the arguments of {name}") if is_text else given or {}
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ConfigError(
                f"{place}: a call is {{'name': …, 'arguments': an object or JSON of one}}, not {entry!r:.80}"
            )
        if not is_text:  # a table has every column in every row
            arguments = {key: item for key, item in arguments.items() if item is not None}
        calls.append(call(name, arguments, entry.get("id")))
        calls[-1].setdefault("id", entry.get("id"))  # for the result that names it; see _with_ids
    return calls


def _parsed(value: Any, what: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise ConfigError(f"{what} are no JSON") from None


def _with_ids(messages: Messages) -> Messages:
    """Each call with an id that all templates take, and each result with that of its call: the one it names, or else
    the first without a result."""
    count, waiting = 0, dict[str | None, str]()
    for message in messages:
        for made in message.get("tool_calls", ()):
            count += 1
            given, made["id"] = made["id"], call("", {}, made["id"]).get("id") or numbered(count)
            waiting[made["id"] if given is None else str(given)] = made["id"]
        if message["role"] == "tool":
            given = str(message.get("tool_call_id"))
            key = given if given in waiting else next(iter(waiting), None)
            message["tool_call_id"] = waiting.pop(key, None) or numbered(count := count + 1)
    return messages


def is_dialogue(value: Any) -> bool:
    """Whether it is more than what one speaker says: messages, also written as text, or hh-rlhf's text."""
    return isinstance(value, list | dict) or (isinstance(value, str) and bool(is_hh(value) or _WRITTEN.match(value)))


def is_hh(text: str) -> bool:
    """Whether a text is a dialogue in hh-rlhf's form, perhaps without the line breaks in front."""
    return text.startswith("\n\nHuman:") or (bool(_HUMAN.match(text)) and "\n\nAssistant:" in text)


def parse_hh(text: str, where: str, field: str) -> Messages:
    """hh-rlhf's text, "\\n\\nHuman: … \\n\\nAssistant: …", to messages. Turns of one speaker in a row are joined.

    Raises:
        ConfigError: the text has another form.
    """
    parts = _TURN.split("\n\n" + clean(text).lstrip())
    if len(parts) < 3 or parts[0].strip() or parts[1] != "Human":
        raise ConfigError(
            f"{where}: {field!r} must be a list of messages, or text that begins with a '\\n\\nHuman:' turn and ends"
            " with an '\\n\\nAssistant:' turn"
        )
    speakers = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return joined([{"role": speakers[speaker], "content": said.strip()} for speaker, said in turns])


def joined(messages: Messages) -> Messages:
    """Turns of one speaker in a row made one; results of tools stay apart."""
    found: Messages = []
    for message in messages:
        if found and found[-1]["role"] == message["role"] != "tool":
            said = (found[-1]["content"], message["content"])
            calls = [*found[-1].get("tool_calls", ()), *message.get("tool_calls", ())]
            found[-1]["content"] = "\n".join(said if not calls else filter(None, said))
            found[-1] |= {"tool_calls": calls} if calls else {}
        else:
            found.append(dict(message))
    return found


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise ConfigError(f"{place} is not an object, {{'role': …, 'content': text}}")
    message = {key: value for key, value in message.items() if value is not None}  # a table has every column
    role = message.get("role", message.get("from"))
    name = str(role).lower()
    if name not in ROLES:
        raise ConfigError(f"{place}: role {role!r:.40} is not one of {', '.join(ROLES)}")
    said = message.get("content", message.get("value"))
    calls = said if name in _CALLING else message.get("tool_calls") or message.get("function_call")
    if calls and ROLES[name] != "assistant":
        raise ConfigError(f"{place}: only the assistant calls tools, not {role!r:.40}")
    if calls:
        content = "" if said is None or name in _CALLING else _content(said, place)
        return {"role": "assistant", "content": content, "tool_calls": read_calls(calls, place)}
    if ROLES[name] != "tool":
        return {"role": ROLES[name], "content": _content(said, place)}
    content = _content(said if isinstance(said, str | list) else json.dumps(said, ensure_ascii=False), place)
    if wrapped := _WRAPPED.fullmatch(content):
        content = wrapped[1]
    named = {"tool_call_id": message["tool_call_id"]} if "tool_call_id" in message else {}
    return {"role": "tool", "content": content, **named}


def _content(value: Any, place: str) -> str:
    """What a message says: text, or the text of its parts."""
    if isinstance(value, str):
        return clean(value)
    if not isinstance(value, list):
        raise ConfigError(f"{place}: its content must be text, not {type(value).__name__}")
    said = ""
    for part in value:
        text = part.get("text") if isinstance(part, dict) else part
        what = (part.get("type") or "text") if isinstance(part, dict) else "text"
        if what != "text" or not isinstance(text, str):
            raise ConfigError(f"{place} has a part of the type {what!r:.40}: only text is supported")
        said += text
    return clean(said)


def asked_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a job, `{"prompt": text}` or `{"messages": …}`, with the messages that it asks with."""
    given = [{"role": "user", "content": row["prompt"]}] if "prompt" in row else row["messages"]
    return {**row, "messages": read_messages(given, "", "messages")}
