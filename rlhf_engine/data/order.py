"""The order of a run's rows as a function of a seed and a position: no list, and any position at once."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from fractions import Fraction

_ROUNDS = 8
_WORD = (1 << 64) - 1


class Shuffle(Sequence[int]):
    """The numbers below `size` in an order that `key` decides, in constant memory.

    A Feistel network permutes the least domain of 4^k numbers that holds them, and what falls outside is sent through
    it again (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", cycle walking).
    """

    def __init__(self, size: int, key: str):
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)  # bits
        self._mask = (1 << self._half) - 1
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[i : i + 8]) for i in range(0, len(digest), 8)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place):  # type: ignore[override]
        if not 0 <= place < self.size:
            raise IndexError(place)
        place = self._permuted(place)
        while place >= self.size:
            place = self._permuted(place)
        return place

    def _permuted(self, place: int) -> int:
        left, right = place >> self._half, place & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & self._mask)
        return left << self._half | right


def _mixed(x: int) -> int:
    """64 bits, each of which depends on all of `x` (Steele et al. 2014, SplitMix64's last steps)."""
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _WORD
    return x ^ x >> 31


shuffled = functools.lru_cache(maxsize=256)(Shuffle)


def deal(position: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """Which source fills a position, and how many positions before it that source has filled.

    The sources are halved until one is left, and at each halving the positions are dealt between the halves as evenly
    as whole numbers can be, so that the first n positions hold n times a source's share of it, but for half a row at
    each of the log2 halvings at most.

    Args:
        shares: of the sources, positive, in whatever unit.
    """
    first, last = 0, len(shares)
    while last - first > 1:
        middle = (first + last) // 2
        part, whole = sum(shares[first:middle], Fraction()), sum(shares[first:last], Fraction())
        before, behind = (_rounded(n * part / whole) for n in (position, position + 1))
        if behind > before:
            position, last = before, middle
        else:
            position, first = position - before, middle
    return first, position


def _rounded(x: Fraction) -> int:
    return (2 * x.numerator + x.denominator) // (2 * x.denominator)
