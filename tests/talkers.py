"""Environments of tests."""

from __future__ import annotations

import random
import time

from rlhf_engine.environments.model import ask


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


class Asker:
    """Asks the model of `user.path` for the first words and after each turn, and has its own say too."""

    def __init__(self, delay: float = 0.0, turns: int = 3):
        self.delay, self.turns = delay, turns

    def reset(self, row):
        self.count, self.said = 0, list(row["messages"][-1:])
        if row["seed"] % 2:
            self.said = [{"role": "user", "content": ask(self.said)}]
        return self.said[-1:]

    def step(self, action):
        time.sleep(random.SystemRandom().uniform(0, self.delay))
        self.count += 1
        self.said += [{"role": "assistant", "content": action["content"]}, {"role": "user", "content": "And you?"}]
        answers = [ask(self.said) for _ in range(1 + sum(map(ord, action["content"])) % 2)]
        self.said[-1]["content"] = " ".join(answers)
        reward = (sum(map(ord, answers[-1])) % 11) / 10 - 0.5
        return self.said[-1:], reward, self.count == self.turns, False, {"asked": len(answers)}
