"""From a checked row to an example: what the policy and the reward model read, by the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from ..config import ConfigError
from .chat import Messages
from .formats import Row
from .prepared import Example
from .tokenizer import Tokenizer


def example(row: Row, presets: tuple[str | None, str | None], kinds: frozenset[str], tokenizer: Tokenizer) -> Example:
    """A row as token ids; of plain text all of it.

    Args:
        presets: the system messages under which the policy and the reward model read it; None: its own.
        kinds: of `sources.KINDS`, what will be learned from.

    Raises:
        ConfigError: the chat template refuses the row, or does not show what is to be learned.
    """
    if not row.prompt:
        return Example([], [], [], tokenizer.encode(row.chosen or ""), None, [], [], [], row.fields)
    try:
        return _dialogue(row, presets, kinds, tokenizer)
    except ConfigError as error:
        raise ConfigError(f"{row.where}: {error}") from None


def _dialogue(row: Row, presets: tuple[str | None, str | None], kinds: frozenset[str], tokenizer: Tokenizer) -> Example:
    (system, reward), learned = presets, kinds - {"prompt"}
    messages, rewarded = _under(system, row.prompt), _under(reward, row.prompt)
    prompt = tokenizer.render_prompt(messages)
    reward_prompt = prompt if reward == system else tokenizer.render_prompt(rewarded)
    if not learned or row.chosen is None:  # a prompt alone, of which no more is asked
        nothing = [False] * len(prompt)
        return Example(prompt, prompt, nothing, None, None, reward_prompt, reward_prompt, messages, row.fields)
    try:
        marks, texts = "answer" in learned, [row.chosen, row.rejected]
        before, spoken, (chosen, rejected) = _answered(messages, texts, tokenizer, marks)
        same = reward == system or "pair" not in kinds
        reward_before = before if same else _answered(rewarded, texts[:1], tokenizer, marks=False)[0]
    except ConfigError as error:
        raise ConfigError(f"answers are to be learned from, and {error}") from None
    return Example(prompt, before, spoken, chosen, rejected, reward_prompt, reward_before, messages, row.fields)


def _answered(
    messages: Messages, texts: Sequence[str | None], tokenizer: Tokenizer, marks: bool
) -> tuple[list[int], list[bool], list[list[int] | None]]:
    """What stands before the answers of a prompt, what the assistant said of it, and each answer."""
    whole = [
        None if text is None else tokenizer.render([*messages, {"role": "assistant", "content": text}], marks)
        for text in texts
    ]
    start = min(len(said) - len(list(takewhile(bool, reversed(said)))) for _, said in filter(None, whole))
    ids, said = next(filter(None, whole))
    return ids[:start], said[:start], [None if row is None else row[0][start:] for row in whole]


def _under(preset: str | None, prompt: Messages) -> Messages:
    """A prompt with a preset's system message in the place of its own."""
    if preset is None:
        return prompt
    return [{"role": "system", "content": preset}, *(m for m in prompt if m["role"] != "system")]
