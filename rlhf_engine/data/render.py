"""From a checked row to an example: what the policy and the reward model read, by the chat template."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import ConfigError
from .chat import Messages
from .formats import Answer, Row, as_message, text_of
from .prepared import Example
from .tokenizer import Tokenizer
from .tools import Tools


def example(row: Row, presets: tuple[str | None, str | None], kinds: frozenset[str], tokenizer: Tokenizer) -> Example:
    """A row as token ids; of plain text all of it.

    Args:
        presets: the system messages under which the policy and the reward model read it; None: its own.
        kinds: of `sources.KINDS`, what will be learned from.

    Raises:
        ConfigError: the chat template refuses the row, or does not show what is to be learned.
    """
    if not row.prompt:
        return Example([], [], [], tokenizer.encode(text_of(row.chosen or "")), None, [], [], [], row.fields)
    try:
        return _dialogue(row, presets, kinds, tokenizer)
    except ConfigError as error:
        raise ConfigError(f"{row.where}: {error}") from None


def _dialogue(row: Row, presets: tuple[str | None, str | None], kinds: frozenset[str], tokenizer: Tokenizer) -> Example:
    (system, reward), learned = presets, kinds - {"prompt"}
    messages, rewarded = _under(system, row.prompt), _under(reward, row.prompt)
    texts = [text for text in (row.chosen, row.rejected) if text is not None]
    is_bad = row.chosen is None and bool(texts)
    if not learned or not texts or (is_bad and "label" not in learned):  # a prompt alone, of which no more is asked
        prompt = tokenizer.render_prompt(messages, row.tools)
        reward_prompt = prompt if reward == system else tokenizer.render_prompt(rewarded, row.tools)
        nothing = [False] * len(prompt)
        return Example(prompt, prompt, nothing, None, None, reward_prompt, reward_prompt, messages, row.fields)
    try:
        before, spoken, *answers = _answered(messages, texts, tokenizer, "answer" in learned, row.tools)
        reward_before = before
        if reward != system and "pair" in kinds:
            reward_before, *_ = _answered(rewarded, texts[:1], tokenizer, False, row.tools)
    except ConfigError as error:
        raise ConfigError(f"answers are to be learned from, and {error}") from None
    prompt = before if tokenizer.template.goes_turn_by_turn else tokenizer.render_prompt(messages, row.tools)
    reward_prompt = prompt if reward == system else tokenizer.render_prompt(rewarded, row.tools)
    chosen, rejected = [None, *answers] if is_bad else [*answers, None][:2]
    return Example(prompt, before, spoken, chosen, rejected, reward_prompt, reward_before, messages, row.fields)


def _answered(messages: Messages, texts: Sequence[Answer], tokenizer: Tokenizer, marks: bool, tools: Tools) -> tuple:
    """What stands before the answers of a prompt, what the assistant said of it, and each answer."""
    template = tokenizer.template
    is_regular = template.goes_turn_by_turn
    first, *others = ([*messages, as_message(text)] for text in texts)
    whole = [tokenizer.render(first, marks, tools)]
    if not is_regular:  # what stands before may differ, and is what both have
        whole += [tokenizer.render(other, False, tools) for other in others]
    start = min(_behind_others(said) for _, said in whole)
    before, spoken = (row[:start] for row in whole[0])
    answers = [row[start:] for row, _ in whole]
    answers += [tokenizer.render_answer(other, before, tools) for other in others[len(whole) - 1 :]]
    if is_regular and not template.goes_turn_by_turn:  # as this row has shown
        return _answered(messages, texts, tokenizer, marks, tools)
    return before, spoken, *answers


def _behind_others(said: list[bool]) -> int:
    """Where in a dialogue the assistant's last words begin."""
    return len(said) - said[::-1].index(False) if False in said else 0


def _under(preset: str | None, prompt: Messages) -> Messages:
    """A prompt with a preset's system message in the place of its own."""
    if preset is None:
        return prompt
    return [{"role": "system", "content": preset}, *(m for m in prompt if m["role"] != "system")]
