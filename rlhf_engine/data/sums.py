"""`sums`: an embedded, seeded set of two-digit sums, shown by somebody who mostly forgets to carry.

Rows are ``{"prompt": "17+25=", "completion": "032", "answer": "042"}``: numbers below 100 with two digits each, sums
with three, so that a digit is always in the same place. `answer` is right. The demonstration beside it is too where
nothing is carried, 30% of the problems; elsewhere the carries are forgotten, all of them, `FORGETS` of the time. So who
learns from demonstrations gives about 40% right answers, and its likeliest answer, which does not carry, is right less
often still. How to carry can be learned from the other demonstrations; that one should, from a verifier.

Of the 10,000 problems an eighth is in the test split alone, whatever the seed; what is shown there is right.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

FORGETS = 0.8


def rows(split: str, num_rows: int, seed: int) -> Iterator[dict[str, str]]:
    """`num_rows` rows of a split, "train" or "test"; row i depends on the seed, the split and i alone."""
    return (_row(random.Random(f"{seed}/{split}/{i}"), split) for i in range(num_rows))


def is_held_out(a: int, b: int) -> bool:
    """Whether a problem is one of the test split."""
    return random.Random(f"{a}+{b}").random() < 1 / 8


def without_carry(a: int, b: int) -> int:
    """The sum of each two digits, its last digit alone."""
    return (a + b) % 10 + (a // 10 + b // 10) % 10 * 10


def _row(rng: random.Random, split: str) -> dict[str, str]:
    a, b = rng.randrange(100), rng.randrange(100)
    while is_held_out(a, b) != (split == "test"):
        a, b = rng.randrange(100), rng.randrange(100)
    forgets = split == "train" and rng.random() < FORGETS
    shown = without_carry(a, b) if forgets else a + b
    return {"prompt": f"{a:02}+{b:02}=", "completion": f"{shown:03}", "answer": f"{a + b:03}"}
