"""From a row as a file has it to a prompt and its answers. Its keys tell its format, the most specific first."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from ..config import ConfigError
from .chat import Message, Messages, clean, said_in
from .messages import is_dialogue, is_hh, joined, parse_hh, read_messages
from .tools import Tools, read_tools

_DIALOGUES = ("messages", "conversations", "conversation")
_SAID = {*_DIALOGUES, "prompt", "chosen", "rejected"}
_CALLS = "answers"  # of xLAM: calls of tools
# what is asked, and under which keys it may be answered
_ANSWERS = {
    "prompt": ("completion", "response"),
    "instruction": ("output", "response"),
    "question": ("answer", "response"),
    "query": ("response", _CALLS),
    "input": ("output",),
}
_UNSUPPORTED = ("image", "images", "video", "videos", "audio", "audios")


Answer = str | Message


@dataclass(frozen=True)
class Row:
    """A checked row.

    Args:
        where: its place, for errors.
        prompt: a dialogue that ends with a user turn or results of tools; empty for plain text.
        chosen: an answer to learn from, or the plain text; a message where it calls tools; None where there is only a
            prompt, or a bad answer.
        rejected: a worse answer to the same prompt, or a bad one; or None.
        tools: that are offered.
        fields: what else the row says, as the file has it: all but its dialogues.
    """

    where: str
    prompt: Messages
    chosen: Answer | None = None
    rejected: Answer | None = None
    tools: Tools = None
    fields: dict[str, Any] = field(default_factory=dict, compare=False)


def as_message(answer: Answer) -> Message:
    """An answer as a turn of the assistant."""
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer


def text_of(answer: Answer) -> str:
    """What an answer says, the calls of tools as JSON."""
    return said_in(as_message(answer))


def read_row(row: Any, where: str) -> Row:
    """A row of any of the formats in docs/data.md.

    Raises:
        ConfigError: its keys fit no format, or a value is not what its key promises.
    """
    if isinstance(row, list):
        return _answered(read_messages(row, where, "the row"), where, "the row")
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: a row is a JSON object or a list of messages, not {type(row).__name__}")
    found = replace(_row(row, where), fields={key: value for key, value in row.items() if key not in _SAID})
    return replace(found, tools=offered(row, found.prompt, where)) if found.prompt else found


def offered(row: dict[str, Any], prompt: Messages, where: str) -> Tools:
    """The tools of a row, unless its system message has them.

    Raises:
        ConfigError: they are no schemas.
    """
    key = next((key for key in ("tools", "functions") if row.get(key)), None)
    if key is None or _is_nothing(row[key]) or (prompt[0]["role"] == "system" and "<tools>" in prompt[0]["content"]):
        return None
    return read_tools(row[key], f"{where}: {key}")


def _row(row: dict[str, Any], where: str) -> Row:
    keys, row = sorted(row), {key: value for key, value in row.items() if not _is_nothing(value)}
    for key in _UNSUPPORTED:
        if row.get(key) and row[key] not in ("[]", "{}"):
            raise ConfigError(f"{where}: {key!r}: only text is supported")
    if row.get("chosen") or row.get("rejected"):
        return _preference(row, where)
    if dialogue := next((key for key in _DIALOGUES if key in row), None):
        return _dialogue(row, dialogue, where)
    for asked, answers in _ANSWERS.items():
        if asked in row and (answer := next((key for key in answers if key in row), None)):
            return _question(row, asked, answer, where)
    if "prompt" in row:
        return _answered(_prompt(row, "prompt", where), where, "prompt")
    if "text" in row:
        return Row(where, [], _text(row, "text", where))
    raise ConfigError(
        f"{where}: the keys {keys!s:.200} fit no format: a row is a list of messages or has 'messages' or"
        " 'conversations', 'chosen' and 'rejected', 'prompt' (and 'completion'), 'instruction' and 'output', 'question'"
        " and 'answer', or 'text'"
    )


def _is_nothing(value: Any) -> bool:
    """A table has every column in every row, and pandas writes NaN where it has no text."""
    return value is None or value == [] or value != value


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise ConfigError(f"{where}: {key!r} must be text, not {type(row[key]).__name__}")
    return clean(row[key])


def _turns(row: dict[str, Any], key: str, where: str, speaker: str) -> Messages:
    """A value that is a dialogue, or what one speaker says."""
    if not is_dialogue(row[key]):
        return [{"role": speaker, "content": _text(row, key, where)}]
    if not isinstance(row[key], str) or not is_hh(row[key]):
        return joined(read_messages(row[key], where, key))
    messages = parse_hh(row[key], where, key)
    return messages[:-1] if speaker == "user" and messages[-1] == {"role": "assistant", "content": ""} else messages


def _dialogue(row: dict[str, Any], key: str, where: str) -> Row:
    return _answered(_behind(row, joined(read_messages(row[key], where, key)), where), where, key)


def _question(row: dict[str, Any], asked: str, answer: str, where: str) -> Row:
    """A prompt and what answers it, which a KTO row's `label` may say to be a bad answer."""
    found = _answered([*_prompt(row, asked, where), *_answer(row, asked, answer, where)], where, answer)
    return replace(found, chosen=None, rejected=found.chosen) if row.get("label") is False else found


def _prompt(row: dict[str, Any], asked: str, where: str) -> Messages:
    """What is asked, behind the row's system message and earlier turns."""
    prompt = _turns(row, asked, where, "user")
    if asked == "instruction":
        prompt[-1]["content"] += "".join(
            "\n\n" + _text(row, key, where) for key in ("input", "context") if row.get(key)
        )
    return _behind(row, prompt, where)


def _behind(row: dict[str, Any], messages: Messages, where: str) -> Messages:
    """A dialogue behind the row's `system` and `history`, pairs of a question and its answer or messages."""
    key = next((key for key in ("system", "system_prompt") if row.get(key)), None)
    system, messages = _apart(messages)
    if key is not None and not system:
        system = [{"role": "system", "content": _text(row, key, where)}]
    history = row.get("history") or []
    if isinstance(history, str):
        try:
            history = json.loads(history)
        except (ValueError, RecursionError):
            raise ConfigError(f"{where}: 'history' must be a list of pairs, and is text that is no JSON") from None
    if isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        said = zip(("user", "assistant") * len(history), (text for turn in history for text in turn), strict=True)
        history = [{"role": role, "content": text} for role, text in said]
    return [*system, *(read_messages(history, where, "history") if history else []), *messages]


def _apart(messages: Messages) -> tuple[Messages, Messages]:
    """The system message, if there is one, and the turns."""
    cut = bool(messages) and messages[0]["role"] == "system"
    return messages[:cut], messages[cut:]


def _answer(row: dict[str, Any], asked: str, key: str, where: str) -> Messages:
    """What answers a prompt; hh-rlhf's goes on behind 'Assistant:', so that a space in front is no part of it."""
    if key == _CALLS:
        called: Message = {"role": "assistant", "content": None, "tool_calls": row[key]}
        return read_messages([called], where, key)
    turns = _turns(row, key, where, "assistant")
    goes_on = isinstance(row.get(asked), str) and is_hh(row[asked])
    return [{**turn, "content": turn["content"].strip()} for turn in turns] if goes_on else turns


def _answered(messages: Messages, where: str, field: str) -> Row:
    """A dialogue cut before its last turn, where that is the assistant's."""
    messages = joined(messages)
    if not any(message["role"] == "user" for message in messages):
        raise ConfigError(f"{where}: {field} has no turn of the user")
    *before, last = messages
    if last["role"] != "assistant":
        return Row(where, messages)
    return Row(where, before, last if last.get("tool_calls") else last["content"])


def _preference(row: dict[str, Any], where: str) -> Row:
    """Two dialogues, or two answers to one prompt. Sides that answer different prompts make no pair."""
    asked = next((key for key in (*_ANSWERS, *_DIALOGUES) if key in row), "")
    prompt: Messages = []
    if asked in _ANSWERS:
        prompt = _prompt(row, asked, where)
    elif asked:
        prompt = _dialogue(row, asked, where).prompt
    sides = []
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ConfigError(f"{where}: no {key!r} beside {sorted(row)!s:.200}; a row has 'chosen' and 'rejected'")
        if not (prompt or is_dialogue(row[key])):
            parse_hh(_text(row, key, where), where, key)  # which tells what would be right
        turns = _answer(row, asked, key, where)
        goes_on = all(turn["role"] == "assistant" for turn in turns)
        sides.append(_answered([*prompt, *turns] if goes_on else _whole(prompt, turns, where, key), where, key))
    chosen, rejected = sides
    return Row(where, chosen.prompt, chosen.chosen, rejected.chosen if chosen.prompt == rejected.prompt else None)


def _whole(prompt: Messages, turns: Messages, where: str, key: str) -> Messages:
    """A side's dialogue behind what the prompt alone has: a system message, and turns that the side does not repeat."""
    before, (own_system, turns) = _apart(prompt), _apart(turns)
    system, earlier = own_system or before[0], before[1]
    said, known = ([(turn["role"], turn["content"].strip()) for turn in some] for some in (turns, earlier))
    repeated = [i for i in range(len(known)) if said[: len(known) - i] == known[i:]]
    is_within = any(said[i : i + len(known)] == known for i in range(len(said)))
    if repeated and not is_within:
        return [*system, *earlier[: repeated[0]], *turns]
    if is_within or len(earlier) < 2:
        return [*system, *turns]
    if earlier[-1]["role"] == "assistant":
        return [*system, *earlier, *turns]
    raise ConfigError(f"{where}: {key!r} neither repeats the last turn of 'prompt' nor answers it")
