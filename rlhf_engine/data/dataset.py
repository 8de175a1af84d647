"""The rows that a phase draws from, and the order in which it sees them.

The order is a function of the seed and a position, so a run resumes at a position and nothing else, and it is the
same for every mesh.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from ..config import ASKING, LABELLED, PAIRED, ConfigError, RunConfig
from .chat import Messages
from .order import deal, shuffled
from .prepare import prepare
from .prepared import Example, Prepared, Rows
from .sources import KINDS, Source, bit, check_served, kind_of
from .tokenizer import Tokenizer

__all__ = ["Dataset", "Example", "Part", "build_datasets", "dialogues"]


@dataclass
class Part:
    """What a phase has of one source.

    Args:
        share: of the rows that the phase draws.
        left_out: rows to train on that it cannot use, by the reason.
    """

    source: Source
    share: float
    train: Sequence[Example]
    held_out: Sequence[Example]
    left_out: Counter[str]
    num_rows: tuple[int, int] = (0, 0)  # of the source: to train on, and held out


class Dataset:
    """The mixture that a phase draws from.

    Under the strategy `in_batch` each position goes to the source that is owed it, so each batch has the shares, with
    a remainder that the next one makes up for. Under `in_data` as many positions as there are rows are shuffled
    together: the shares hold for each such block, and within it chance rules. Either way they are exact over a run, and
    a source deals its rows from one shuffle after the other, so that every row is seen before one is seen again.
    """

    def __init__(self, parts: Sequence[Part], seed: int, strategy: str = "in_batch"):
        self.parts, self.seed, self.strategy = parts, seed, strategy
        self.held_out = [example for part in parts for example in part.held_out]
        self._shares = [Fraction(part.share) for part in parts]

    def __len__(self) -> int:
        return sum(len(part.train) for part in self.parts)

    def __getitem__(self, position: int) -> Example:
        """The row at any position of an endless run."""
        if self.strategy == "in_data":
            block, place = divmod(position, len(self))
            position = block * len(self) + shuffled(len(self), f"{self.seed}/block/{block}")[place]
        i, index = deal(position, self._shares)
        rows = self.parts[i].train
        epoch, place = divmod(index, len(rows))
        return rows[shuffled(len(rows), f"{self.seed}/{i}/{epoch}")[place]]

    def batch(self, start: int, size: int) -> list[Example]:
        """So many examples from `position` on, in the order of the seed."""
        return [self[i] for i in range(start, start + size)]

    def digest(self) -> str:
        """Of the rows that are drawn, and their order."""
        found = hashlib.sha256(f"{self.seed} {self.strategy}".encode())
        for part in self.parts:
            found.update(str(part.share).encode())
            if isinstance(part.train, Rows):
                found.update(part.train.digest())
        return found.hexdigest()


def dialogues(dataset: Dataset, count: int = 4) -> list[Messages]:
    """Some prompts of each source."""
    return [messages for part in dataset.parts for messages in [e.messages for e in part.train[:count] if e.messages]]


def build_datasets(
    phases: Sequence[str], sources: Sequence[Source], tokenizer: Tokenizer, config: RunConfig, is_checking: bool = True
) -> dict[str, Dataset]:
    """What each phase draws from: the rows that it can use, of the sources that have any.

    Args:
        is_checking: as for `prepare`.

    Raises:
        ConfigError: nothing of a source, or nothing held out, is of a length that the configuration allows; or a row is
            refused.
    """
    cache = cache_of(config)
    prepared = [prepare(source, tokenizer, phases, cache, is_checking) for source in sources]
    splits = [len(rows) - source.num_held_out(len(rows)) for source, rows in zip(sources, prepared, strict=True)]
    seen = [int(np.bitwise_or.reduce(rows.serves[:n])) for rows, n in zip(prepared, splits, strict=True)]
    check_served(sources, seen, phases)
    return {phase: _dataset(phase, list(zip(sources, prepared, splits, seen, strict=True)), config) for phase in phases}


def cache_of(config: RunConfig) -> Path:
    """Where prepared rows are kept."""
    return Path(config.data.cache_dir or Path(config.output_dir).parent / "prepared")


def _dataset(phase: str, found: list[tuple[Source, Prepared, int, int]], config: RunConfig) -> Dataset:
    data = config.data
    found = [each for each in found if each[3] & bit(phase)]
    total = sum(source.share for source, *_ in found)
    asked = "rollout.max_new_tokens" if config.env.fn is None else "env.max_tokens"
    parts, lost = [], Counter[str]()  # of the rows held out
    for source, prepared, split, _ in found:
        train, left_out = _of_use(prepared, 0, split, phase, config)
        held_out, reasons = _of_use(prepared, split, len(prepared), phase, config)
        lost += reasons
        if not len(train):
            raise ConfigError(
                f"no row of {source.spec.name} fits data.max_seq_len={data.max_seq_len}, data.max_prompt_len="
                f"{data.max_prompt_len} and data.min_prompt_len={data.min_prompt_len} in phase {phase}"
                + (f" with {asked}={config.most_new_tokens}" if phase in ASKING else "")
            )
        num_rows = (split, len(prepared) - split)
        parts.append(Part(source, source.share / total, train, held_out, left_out, num_rows))
    if not any(part.held_out for part in parts) and any(part.num_rows[1] for part in parts):
        names = ", ".join(part.source.spec.name for part in parts)
        why = ", ".join(f"{number} {reason}" for reason, number in lost.items())
        raise ConfigError(
            f"no held-out row of {names} is of use in phase {phase} ({why}): raise data.num_eval_rows"
            + (", data.max_prompt_len or data.max_seq_len" if "long" in why else "")
        )
    return Dataset(parts, config.seed, data.strategy)


def _of_use(prepared: Prepared, first: int, last: int, phase: str, config: RunConfig) -> tuple[Rows, Counter[str]]:
    """Of the rows from `first` to `last` those that a phase can use, and how many of the others it cannot use for which
    reason. Plain text is cut into pieces of `data.max_seq_len`, and a pair into its answers where they are drawn one by
    one."""
    left_out = Counter[str]()
    found: list[tuple[np.ndarray, ...]] = [(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, bool))]
    for rows, lengths in prepared.lengths(first, last):
        is_served = (prepared.serves[rows.start : rows.stop] & bit(phase)) != 0
        where, *kept, reasons = _of_use_within(lengths, is_served, phase, config)
        found.append((rows.start + where, *kept))
        left_out += reasons
    where, starts, is_bad = (np.concatenate(part) for part in zip(*found, strict=True))
    if not starts.any():
        starts = np.broadcast_to(np.int32(0), starts.shape)
    return Rows(prepared, where, starts, config.data.max_seq_len, is_bad if phase in LABELLED else None), left_out


def _of_use_within(
    lengths: dict[str, np.ndarray], is_served: np.ndarray, phase: str, config: RunConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Counter[str]]:
    """Of some rows: `rows`, `starts` and `is_bad` as of `Rows`, and how many others for which reason."""
    data, num_rows = config.data, len(is_served)
    is_text = (lengths["prompt"] == 0) & (lengths["chosen"] >= 0)
    pieces = np.where(is_text, -(-lengths["chosen"] // data.max_seq_len), 1)
    rows = np.repeat(np.arange(num_rows, dtype=np.int32), pieces)
    starts = data.max_seq_len * (np.arange(len(rows)) - np.repeat(np.cumsum(pieces) - pieces, pieces))
    prompt = np.maximum(lengths["prompt"], lengths["reward_prompt"])[rows]
    answers = np.stack([lengths[side] for side in ("chosen", "rejected")])
    answer = np.max(answers if phase in PAIRED | LABELLED else answers[:1], axis=0)
    room = config.most_new_tokens if phase in ASKING else np.where(is_text, 0, answer)[rows]
    obstacles = {
        f"without {KINDS[kind_of(phase)]}": ~is_served[rows],
        "prompt too short": ~is_text[rows] & (prompt < data.min_prompt_len),
        "prompt too long": prompt > data.max_prompt_len,
        "too long": prompt + room > data.max_seq_len,
    }
    reason = np.select(list(obstacles.values()), range(1, 5), 0)
    left_out = Counter({name: int((reason == i).sum()) for i, name in enumerate(obstacles, 1)})
    kept, is_bad = np.flatnonzero(reason == 0), np.zeros(0, bool)
    if phase in LABELLED:
        of, side = np.nonzero(answers.T[rows[kept]] > 0)
        kept, is_bad = kept[of], side == 1
    return rows[kept], starts[kept].astype(np.int32), is_bad, +left_out
