"""Environments of tests."""

from __future__ import annotations

import random
import time


class Teller:
    """Answers by what was said, for one to three turns, each after a while that depends on nothing."""

    def __init__(self, delay: float = 0.0, fails: int = 0):
        self.delay, self.fails = delay, fails

    def reset(self, row):
        self.turns, self.left = 0, 1 + row["seed"] % 3
        return row["messages"][-1:]

    def step(self, action):
        time.sleep(random.SystemRandom().uniform(0, self.delay))
        self.turns += 1
        said = sum(map(ord, action["content"]))
        if self.fails and said % self.fails == 0:
            raise RuntimeError("planted")
        is_over = self.turns == self.left
        reward = (said % 11) / 10 - 0.5
        return None if is_over else f"I heard {said} <|im_end|> you", reward, is_over, False, {"said": said % 7}
