"""Tokenised rows and the order in which a run sees them.

The order is a function of the seed and a position, so a run resumes at a position and nothing else, and it is the
same for every mesh.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..config import ConfigError, DataConfig
from .chat import text_of
from .sources import PreferenceRow, Source
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Example:
    """A tokenised preference row."""

    prompt: list[int]
    prompt_spoken: list[bool]  # which prompt tokens the assistant said in earlier turns
    chosen: list[int]  # the end token included
    rejected: list[int]
    prompt_text: str


class Dataset:
    """A mixture of sources.

    Each position takes the source that lags most behind its share, and a source deals its rows from one shuffle
    after the other; so shares are exact over a run and every row is seen before one is seen again.
    """

    def __init__(self, sources: list[Source], tokenizer: Tokenizer, config: DataConfig, seed: int):
        self.seed = seed
        self.weights = [source.weight for source in sources]
        self.num_dropped = 0
        self._parts = [self._tokenise(source.train, tokenizer, config) for source in sources]
        self.held_out = [e for s in sources for e in self._tokenise(s.held_out, tokenizer, config)]
        for source, part in zip(sources, self._parts, strict=True):
            if not part:
                raise ConfigError(
                    f"no row of {source.name} fits data.max_seq_len={config.max_seq_len}"
                    f" and data.max_prompt_len={config.max_prompt_len}"
                )
        if not self.held_out:
            raise ConfigError("no held-out row fits data.max_seq_len and data.max_prompt_len")
        self._dealt: list[tuple[int, int]] = []  # position -> source, how many that source dealt before
        self._counts = [0] * len(sources)
        self._shuffles: dict[tuple[int, int], list[int]] = {}

    def _tokenise(self, rows: list[PreferenceRow], tokenizer: Tokenizer, config: DataConfig) -> list[Example]:
        found = []
        for row in rows:
            prompt = tokenizer.render_prompt(row.prompt)
            (chosen, spoken), (rejected, _) = (
                tokenizer.render([*row.prompt, {"role": "assistant", "content": answer}])
                for answer in (row.chosen, row.rejected)
            )
            n = len(prompt)
            if n > config.max_prompt_len or max(len(chosen), len(rejected)) > config.max_seq_len:
                self.num_dropped += 1
                continue
            found.append(Example(prompt, spoken[:n], chosen[n:], rejected[n:], text_of(row.prompt)))
        return found

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, position: int) -> Example:
        """The row at any position of an endless run."""
        while len(self._dealt) <= position:
            step = len(self._dealt) + 1
            part = max(range(len(self.weights)), key=lambda i: self.weights[i] * step - self._counts[i])
            self._dealt.append((part, self._counts[part]))
            self._counts[part] += 1
        part, index = self._dealt[position]
        rows = self._parts[part]
        epoch, offset = divmod(index, len(rows))
        key = (part, epoch)
        if key not in self._shuffles:
            order = list(range(len(rows)))
            random.Random(f"{self.seed}/{part}/{epoch}").shuffle(order)
            self._shuffles[key] = order
        return rows[self._shuffles[key][offset]]

    def batch(self, start: int, size: int) -> list[Example]:
        return [self[i] for i in range(start, start + size)]
