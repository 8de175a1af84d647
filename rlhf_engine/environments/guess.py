"""`guess`: a game of words and no tools, small enough for any model and any test."""

from __future__ import annotations

import random
import re
from typing import Any

_NUMBER = re.compile(r"-?\d{1,18}")


class Guess:
    """Think of a number: the first in each turn is a guess, and is told to be too low or too high. Found, it is 1.

    Args:
        low: the least that it may be.
        high: the greatest.
    """

    def __init__(self, low: int = 1, high: int = 100):
        if low > high:
            raise ValueError(f"low={low} is greater than high={high}")
        self._low, self._high, self._number = low, high, low

    def reset(self, row: dict[str, Any]) -> str:
        """The number is the same for all samples of a prompt, whose words are these."""
        self._number = random.Random(row["seed"]).randint(self._low, self._high)
        return f"Guess a number from {self._low} to {self._high}."

    def step(self, action: dict[str, Any]) -> tuple[str | None, float, bool, bool, dict[str, float]]:
        """higher or lower, until it is found."""
        found = _NUMBER.search(action["content"])
        if found is None:
            return f"Say a number from {self._low} to {self._high}.", 0.0, False, False, {}
        guess, info = int(found[0]), {"guesses": 1.0}
        if guess == self._number:
            return None, 1.0, True, False, info
        return "higher" if guess < self._number else "lower", 0.0, False, False, info
