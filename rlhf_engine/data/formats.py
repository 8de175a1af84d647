"""From a row as a file has it to a prompt and its answers. The keys of a row tell its format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..config import ConfigError
from .chat import Messages, clean

ROLES = ("system", "user", "assistant")
# what is asked, and what is answered
_ANSWERED = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))


@dataclass(frozen=True)
class Row:
    """A checked row.

    Args:
        where: its place, for errors.
        prompt: a dialogue that ends with a user turn; empty for plain text.
        chosen: an answer to learn from, or the plain text; None where there is only a prompt.
        rejected: a worse answer to the same prompt, or None.
    """

    where: str
    prompt: Messages
    chosen: str | None = None
    rejected: str | None = None


def read_row(row: Any, where: str) -> Row:
    """A row of any of the formats in docs/data.md.

    Raises:
        ConfigError: its keys fit no format, or a value is not what its key promises.
    """
    if isinstance(row, list):
        return _answered(_messages(row, where, "the row"), where, "the row")
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: a row is a JSON object or a list of messages, not {type(row).__name__}")
    row = {key: value for key, value in row.items() if value is not None}  # a table has every column in every row
    if "messages" in row:
        return _answered(_messages(row["messages"], where, "messages"), where, "messages")
    if "chosen" in row or "rejected" in row:
        return _preference(row, where)
    for asked, answered in _ANSWERED:
        if asked in row and answered in row:
            prompt = _turns(row, asked, where, "user")
            if asked == "instruction" and row.get("input"):
                prompt[-1]["content"] += "\n\n" + _text(row, "input", where)
            return _answered([*prompt, *_turns(row, answered, where, "assistant")], where, answered)
    if "prompt" in row:
        return _answered(_turns(row, "prompt", where, "user"), where, "prompt")
    if "text" in row:
        return Row(where, [], _text(row, "text", where))
    raise ConfigError(
        f"{where}: the keys {sorted(row)!s:.200} fit no format: a row is a list of messages or has 'messages',"
        " 'chosen' and 'rejected', 'prompt' (and 'completion'), 'instruction' and 'output', 'question' and 'answer',"
        " or 'text'"
    )


def check_messages(value: Any, where: str, field: str) -> None:
    """Raises:
    ConfigError: `value` is not a list of messages.
    """
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where}: {field} must be a list of messages, {{'role': …, 'content': text}}")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ConfigError(f"{where}: each message is an object, {{'role': …, 'content': text}}")
        if (role := message.get("role")) not in ROLES:
            raise ConfigError(f"{where}: role {role!r:.40} is not one of {', '.join(ROLES)}")
        if role == "system" and i:
            raise ConfigError(f"{where}: a system message stands first, here it is message {i + 1}")


_TURN = re.compile(r"\n\n(Human|Assistant):")


def parse_hh(text: str, where: str, field: str) -> Messages:
    """hh-rlhf's text, "\\n\\nHuman: … \\n\\nAssistant: …", to messages. Turns of one speaker in a row are joined.

    Raises:
        ConfigError: the text has another form.
    """
    parts = _TURN.split(clean(text))
    if len(parts) < 3 or parts[0].strip() or parts[1] != "Human":
        raise _not_hh(where, field)
    speakers = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return _joined([{"role": speakers[speaker], "content": said.strip()} for speaker, said in turns])


def _not_hh(where: str, field: str) -> ConfigError:
    return ConfigError(
        f"{where}: {field!r} must be a list of messages, or text that begins with a '\\n\\nHuman:' turn and ends with"
        " an '\\n\\nAssistant:' turn"
    )


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise ConfigError(f"{where}: {key!r} must be text, not {type(row[key]).__name__}")
    return clean(row[key])


def _messages(value: Any, where: str, field: str) -> Messages:
    check_messages(value, where, field)
    return [{"role": message["role"], "content": clean(message["content"])} for message in value]


def _joined(messages: Messages) -> Messages:
    """Turns of one speaker in a row made one."""
    found: Messages = []
    for message in messages:
        if found and found[-1]["role"] == message["role"]:
            found[-1]["content"] += "\n" + message["content"]
        else:
            found.append(dict(message))
    return found


def _turns(row: dict[str, Any], key: str, where: str, speaker: str) -> Messages:
    """A value that is a list of messages, hh-rlhf's text, or what one speaker says."""
    if isinstance(row[key], list):
        return _messages(row[key], where, key)
    text = _text(row, key, where)
    if not text.startswith("\n\nHuman:"):
        return [{"role": speaker, "content": text}]
    messages = parse_hh(text, where, key)
    return messages[:-1] if speaker == "user" and messages[-1] == {"role": "assistant", "content": ""} else messages


def _answered(messages: Messages, where: str, field: str) -> Row:
    """A dialogue cut behind its last user turn."""
    messages = _joined(messages)
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        raise ConfigError(f"{where}: {field} has no turn of the user")
    end = asked[-1] + 1
    return Row(where, messages[:end], messages[end]["content"] if end < len(messages) else None)


def _preference(row: dict[str, Any], where: str) -> Row:
    """Two dialogues, or two answers to `prompt`. Sides that answer different prompts make no pair."""
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ConfigError(f"{where}: no {key!r} beside {sorted(row)!s:.200}; a row has 'chosen' and 'rejected'")
    before = _turns(row, "prompt", where, "user") if "prompt" in row else []
    sides = []
    for key in ("chosen", "rejected"):
        value = row[key]
        is_dialogue = isinstance(value, list) or (isinstance(value, str) and value.startswith("\n\nHuman:"))
        if not (is_dialogue or (before and isinstance(value, str))):
            raise _not_hh(where, key)
        turns = _turns(row, key, where, "assistant")
        side = _answered(turns if any(turn["role"] == "user" for turn in turns) else [*before, *turns], where, key)
        if side.chosen is None:
            raise _not_hh(where, key)
        sides.append(side)
    chosen, rejected = sides
    return Row(where, chosen.prompt, chosen.chosen, rejected.chosen if chosen.prompt == rejected.prompt else None)
