"""`tool_sums`: an embedded, seeded set of five-digit sums, shown by somebody who uses a calculator or guesses.

Rows are ``{"messages": […], "answer": "80235"}``; the question is `17325+62910=`. `CALLS` of the demonstrations call
the tool `calculator` with what is asked and repeat its result, which is right; the others say at once a number of that
size, which is not. So who learns from demonstrations gives at most that many right answers; that a call pays, a
verifier tells. An eighth of the problems is in the test split alone, whatever the seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from .calls import call
from .sums import is_held_out

CALLS = 0.4
_LEAST, _MOST = 10_000, 99_999


def rows(split: str, num_rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """`num_rows` rows of a split, "train" or "test"; row i depends on the seed, the split and i alone."""
    return (_row(random.Random(f"{seed}/{split}/{i}"), split) for i in range(num_rows))


def _row(rng: random.Random, split: str) -> dict[str, Any]:
    a, b = rng.randint(_LEAST, _MOST), rng.randint(_LEAST, _MOST)
    while is_held_out(a, b) != (split == "test"):
        a, b = rng.randint(_LEAST, _MOST), rng.randint(_LEAST, _MOST)
    asked, answer = f"{a}+{b}", str(a + b)
    turns: list[dict[str, Any]] = [{"role": "user", "content": f"{asked}="}]
    if rng.random() < CALLS:
        made = call("calculator", {"expression": asked})
        turns += [{"role": "assistant", "content": "", "tool_calls": [made]}, {"role": "tool", "content": answer}]
    else:
        answer = str(rng.randint(2 * _LEAST, 2 * _MOST))
    turns.append({"role": "assistant", "content": answer})
    return {"messages": turns, "answer": str(a + b)}
