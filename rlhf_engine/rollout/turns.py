"""What samples of several turns have said and been told, and who waits for an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .cache import Ints


class Turns(Protocol):
    """What answers samples between their turns; on each of a replica's tensor parallel ranks, and the same there."""

    def ask(self, sample: int, tokens: list[int], is_cut: bool, room: int) -> None:
        """A turn is over.

        Args:
            sample: by its name.
            tokens: of the turn.
            is_cut: it has no end of its own.
            room: tokens that the sample may still have, an answer's and its own.
        """
        ...

    def answers(self, wait: bool) -> list[tuple[int, list[int] | None]]:
        """Those that have come, by their samples' names: tokens to be read, fewer than there is room for, or None where
        the sample is over. Each is told once.

        Args:
            wait: for one at least; there is one that was asked for.
        """
        ...


class Dialogues:
    """
    Args:
        names: of the samples.
        limits: `(N,)`, the most tokens of each, answers included.
        most: tokens of a turn.

    Attributes:
        until: `(N,)`, how many tokens each has when its turn is cut.
        sampled: `(N, L)`, which of its tokens the model has said.
        asked: whose answer is awaited.
    """

    def __init__(self, turns: Turns, names: Sequence[int], limits: Ints, most: int):
        self.turns, self.names, self.limits, self.most = turns, names, limits, most
        self.until = np.minimum(limits, most)
        self.asked = set[int]()
        self.sampled = np.ones((len(limits), int(limits.max())), bool)
        self._tokens = np.zeros(self.sampled.shape, np.int64)
        self._begins = np.zeros(len(limits), np.int64)  # of the turns
        self._places = {name: i for i, name in enumerate(names)}

    def note(self, samples: Ints, given: Ints, tokens: Ints) -> None:
        """The newest tokens, each sample's `given`-th."""
        self._tokens[samples, given - 1] = tokens

    def ask(self, sample: int, given: int, is_cut: bool) -> None:
        """Its turn is over, behind so many tokens."""
        self.asked.add(sample)
        tokens = self._tokens[sample, self._begins[sample] : given].tolist()
        self.turns.ask(self.names[sample], tokens, is_cut, int(self.limits[sample] - given))

    def answers(self, wait: bool) -> list[tuple[int, list[int] | None]]:
        """See `Turns`, by the samples' numbers."""
        found = [(self._places[name], tokens) for name, tokens in self.turns.answers(wait)]
        self.asked -= {sample for sample, _ in found}
        return found

    def tell(self, sample: int, start: int, tokens: Sequence[int]) -> int:
        """It reads an answer behind so many tokens; how many it then has."""
        end = start + len(tokens)
        self._tokens[sample, start:end], self.sampled[sample, start:end] = tokens, False
        self._begins[sample], self.until[sample] = end, min(self.limits[sample], end + self.most)
        return end
