"""Tokenised rows, and the order in which a phase sees them.

The order is a function of the seed and a position, so a run resumes at a position and nothing else, and it is the
same for every mesh.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from ..config import PAIRED, SAMPLING, ConfigError, DataConfig, RunConfig
from .chat import Messages, text_of
from .formats import Row
from .sources import PRESETS, Source, needs, serves
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Example:
    """A tokenised row. Plain text is an answer without a prompt."""

    prompt: list[int]
    before: list[int]  # what stands before the answers: the prompt without what the template opens in prompts alone
    before_spoken: list[bool]  # which of its tokens the assistant said in earlier turns
    chosen: list[int] | None  # the end token included
    rejected: list[int] | None
    reward_prompt: list[int]  # the prompt as the reward model reads it
    reward_before: list[int]
    prompt_text: str


@dataclass
class Part:
    """What a phase has of one source.

    Args:
        share: of the rows that the phase draws.
        left_out: rows to train on that it cannot use, by the reason.
    """

    source: Source
    share: float
    train: list[Example]
    held_out: list[Example]
    left_out: Counter[str]


class Dataset:
    """The mixture that a phase draws from.

    Under the strategy `in_batch` each position takes the source that lags most behind its share, so each batch has
    the shares, with a remainder that the next one makes up for. Under `in_data` as many positions as there are rows
    are shuffled together: the shares hold for each such block, and within it chance rules. Either way they are exact
    over a run, and a source deals its rows from one shuffle after the other, so that every row is seen before one is
    seen again.
    """

    def __init__(self, parts: Sequence[Part], seed: int, strategy: str = "in_batch"):
        self.parts, self.seed, self.strategy = parts, seed, strategy
        self.held_out = [example for part in parts for example in part.held_out]
        self._dealt: list[tuple[int, int]] = []  # position -> source, how many that source dealt before
        self._lag_counts = [0] * len(parts)
        self._counts = [0] * len(parts)
        self._shuffles: dict[tuple[int, int], list[int]] = {}

    def __len__(self) -> int:
        return sum(len(part.train) for part in self.parts)

    def __getitem__(self, position: int) -> Example:
        """The row at any position of an endless run."""
        while len(self._dealt) <= position:
            self._deal()
        i, index = self._dealt[position]
        rows = self.parts[i].train
        epoch, offset = divmod(index, len(rows))
        if (i, epoch) not in self._shuffles:
            order = list(range(len(rows)))
            random.Random(f"{self.seed}/{i}/{epoch}").shuffle(order)
            self._shuffles[i, epoch] = order
        return rows[self._shuffles[i, epoch][offset]]

    def batch(self, start: int, size: int) -> list[Example]:
        """So many examples from `position` on, in the order of the seed."""
        return [self[i] for i in range(start, start + size)]

    def _deal(self) -> None:
        """Names the sources of the next positions, and which of its rows each deals there."""
        size = len(self) if self.strategy == "in_data" else 1
        start, counts, block = len(self._dealt), list(self._counts), []
        for step in range(start + 1, start + 1 + size):
            block.append(max(range(len(counts)), key=lambda i: self.parts[i].share * step - counts[i]))
            counts[block[-1]] += 1
        if self.strategy == "in_data":
            random.Random(f"{self.seed}/block/{start}").shuffle(block)
        for i in block:
            self._dealt.append((i, self._counts[i]))
            self._counts[i] += 1


def dialogues(dataset: Dataset, tokenizer: Tokenizer, count: int = 4) -> list[Messages]:
    """Some prompts of each source that the chat template takes."""
    found: list[Messages] = []
    for part in dataset.parts:
        system = PRESETS[part.source.spec.system]
        for row in [row for row in part.source.train if row.prompt][:count]:
            with contextlib.suppress(ConfigError):  # of such a row it was said that it is left out
                tokenizer.render_prompt(messages := _under(system, row.prompt))
                found.append(messages)
    return found


def build_datasets(
    phases: Sequence[str], sources: Sequence[Source], tokenizer: Tokenizer, config: RunConfig
) -> dict[str, Dataset]:
    """What each phase draws from: the rows that it can use, of the sources that have any.

    Raises:
        ConfigError: nothing of a source, or nothing held out, is of a length that the configuration allows; or the
            chat template refuses a row.
    """
    examples = [
        [list(_tokenise(rows, s, tokenizer, config.data, phases)) for rows in (s.train, s.held_out)] for s in sources
    ]
    return {phase: _dataset(phase, sources, examples, config) for phase in phases}


def _dataset(
    phase: str, sources: Sequence[Source], examples: list[list[list[tuple[Row, Example]]]], config: RunConfig
) -> Dataset:
    data = config.data
    of_use = [any(serves(row, phase) for row in source.train) for source in sources]
    total = sum(source.share for source, used in zip(sources, of_use, strict=True) if used)
    parts, lost = [], Counter[str]()  # of the rows held out
    for source, (train, held_out), used in zip(sources, examples, of_use, strict=True):
        if not used:
            continue
        kept, left_out = _sorted_out(train, phase, config)
        for_evaluation, reasons = _sorted_out(held_out, phase, config)
        lost += reasons
        if not kept:
            raise ConfigError(
                f"no row of {source.spec.name} fits data.max_seq_len={data.max_seq_len}, data.max_prompt_len="
                f"{data.max_prompt_len} and data.min_prompt_len={data.min_prompt_len} in phase {phase}"
                + (f" with rollout.max_new_tokens={config.rollout.max_new_tokens}" if phase in SAMPLING else "")
            )
        parts.append(Part(source, source.share / total, kept, for_evaluation, left_out))
    if not any(part.held_out for part in parts) and any(source.held_out for source in sources):
        names = ", ".join(part.source.spec.name for part in parts)
        why = ", ".join(f"{number} {reason}" for reason, number in lost.items())
        raise ConfigError(
            f"no held-out row of {names} is of use in phase {phase} ({why}): raise data.num_eval_rows"
            + (", data.max_prompt_len or data.max_seq_len" if "long" in why else "")
        )
    return Dataset(parts, config.seed, data.strategy)


def _sorted_out(rows: list[tuple[Row, Example]], phase: str, config: RunConfig) -> tuple[list[Example], Counter[str]]:
    """What a phase can use, and how many of the others it cannot use for which reason."""
    found = [(example, _obstacle(row, example, phase, config)) for row, example in rows]
    left_out = Counter(reason for _, reason in found if reason is not None)
    return [example for example, reason in found if reason is None], left_out


def _obstacle(row: Row, example: Example, phase: str, config: RunConfig) -> str | None:
    """Why a phase cannot use an example of a row; None where it can."""
    if not serves(row, phase):
        return f"without {needs(phase)}"
    data, length = config.data, max(len(example.prompt), len(example.reward_prompt))
    if example.prompt and length < data.min_prompt_len:
        return "prompt too short"
    if length > data.max_prompt_len:
        return "prompt too long"
    answers = [example.chosen, example.rejected] if phase in PAIRED else [example.chosen]
    room = config.rollout.max_new_tokens if phase in SAMPLING else max(len(answer or ()) for answer in answers)
    return "too long" if length + room > data.max_seq_len else None


def _tokenise(
    rows: Sequence[Row], source: Source, tokenizer: Tokenizer, config: DataConfig, phases: Sequence[str]
) -> Iterator[tuple[Row, Example]]:
    """Every row as an example; plain text in pieces of `data.max_seq_len`."""
    system = PRESETS[source.spec.system]
    reward = PRESETS[source.spec.reward] if source.spec.reward is not None else system
    for row in rows:
        if not row.prompt:
            text = tokenizer.encode(row.chosen or "")
            for start in range(0, len(text), config.max_seq_len):
                yield row, Example([], [], [], text[start : start + config.max_seq_len], None, [], [], "")
            continue
        try:
            yield row, _dialogue(row, system, reward, tokenizer, phases)
        except ConfigError as error:
            raise ConfigError(f"{row.where}: {error}") from None


def _dialogue(row: Row, system: str | None, reward: str | None, tokenizer: Tokenizer, phases: Sequence[str]) -> Example:
    messages, rewarded = _under(system, row.prompt), _under(reward, row.prompt)
    prompt = tokenizer.render_prompt(messages)
    reward_prompt = prompt if reward == system else tokenizer.render_prompt(rewarded)
    texts, learning = [row.chosen, row.rejected], [phase for phase in phases if phase not in SAMPLING]
    if not learning or row.chosen is None:  # a prompt alone, of which no more is asked
        return Example(
            prompt, prompt, [False] * len(prompt), None, None, reward_prompt, reward_prompt, text_of(messages)
        )
    try:
        marks = not PAIRED.issuperset(learning)
        before, spoken, (chosen, rejected) = _answered(messages, texts, tokenizer, marks)
        same = reward == system or PAIRED.isdisjoint(phases)
        reward_before = before if same else _answered(rewarded, texts[:1], tokenizer, marks=False)[0]
    except ConfigError as error:
        raise ConfigError(f"phase {learning[0]} learns from answers, and {error}") from None
    return Example(prompt, before, spoken, chosen, rejected, reward_prompt, reward_before, text_of(messages))


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
