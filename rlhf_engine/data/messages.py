"""Dialogues as files write them, to messages: lists of messages of several kinds, JSON of one, hh-rlhf's text."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

from ..config import ConfigError
from .chat import Messages, clean

ROLES = {
    "system": "system", "user": "user", "assistant": "assistant",
    "developer": "system", "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
}  # fmt: skip
_TOOLS = re.compile("tool|function|observation|ipython")  # in the names of roles that are no people's
_WRITTEN = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")  # a list that was made text
_HUMAN = re.compile(r"\s*Human:")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SHAPE = "a list of messages, {'role': …, 'content': text}"


def read_messages(value: Any, where: str, field: str) -> Messages:
    """Messages from a list of them, from one alone, or from JSON of either.

    Raises:
        ConfigError: it is none, or has what is not supported, such as an image or a tool.
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
    """Turns of one speaker in a row made one."""
    found: Messages = []
    for message in messages:
        if found and found[-1]["role"] == message["role"]:
            found[-1]["content"] += "\n" + message["content"]
        else:
            found.append(dict(message))
    return found


def _message(message: Any, place: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ConfigError(f"{place} is not an object, {{'role': …, 'content': text}}")
    message = {key: value for key, value in message.items() if value is not None}  # a table has every column
    role = message.get("role", message.get("from"))
    name = str(role).lower()
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise ConfigError(f"{place} has {key!r}: dialogues with tools are not supported")
    if _TOOLS.search(name):
        raise ConfigError(f"{place} has the role {role!r:.40}: dialogues with tools are not supported")
    if name not in ROLES:
        raise ConfigError(f"{place}: role {role!r:.40} is not one of {', '.join(ROLES)}")
    return {"role": ROLES[name], "content": _content(message.get("content", message.get("value")), place)}


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
