"""Environments that the tests use, good and bad."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import subprocess
import sys
import threading
import time

from rlhf_engine.environments.model import ask


class Counter:
    """Answers with what it was told to, and counts."""

    def __init__(self, answer="go on", last=3, tools=None):
        self.answer, self.last, self.count = answer, last, 0
        if tools is not None:
            self.tools = tools

    def reset(self, row):
        return None

    def step(self, action):
        self.count += 1
        is_over = self.count == self.last
        return None if is_over else self.answer, self.count, is_over, False, {"count": self.count, "name": "counter"}


class Async(Counter):
    """The same with a loop, in which what one call has begun is there in the next."""

    async def reset(self, row):
        self.lock = asyncio.Lock()
        self.task = asyncio.create_task(asyncio.sleep(0, "slept"))
        return [{"role": "system", "content": row["style"]}, *row["messages"]]

    async def step(self, action):
        async with self.lock:
            assert await self.task == "slept"
            return super().step(action)


class Says:
    """Its reset or step gives what a row tells it, evaluated."""

    def reset(self, row):
        self.row = row
        return eval(row.get("reset", "None"), globals())

    def step(self, action):
        return eval(self.row["step"], globals())


class Number:
    """As numpy and torch have them."""

    def __float__(self):
        return 0.5


class Unsaid(Exception):
    def __str__(self):
        raise ValueError


def throw(error):
    raise error


def scribble():
    """Into all that is open."""
    for descriptor in range(3, 30):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"x" * 99)
    time.sleep(1000)


def pids(file, *pids):
    """Numbers of this process and of others, in a file that is there at once as a whole."""
    with open(file + ".new", "w") as out:
        out.write(" ".join(map(str, [os.getpid(), *pids])))
    os.rename(file + ".new", file)


def hang(file):
    """For ever, with a child."""
    pids(file, subprocess.Popen(["sleep", "1000"]).pid)
    while True:
        time.sleep(1000)


class Closing(Counter):
    """Says when it is closed."""

    def reset(self, row):
        self.file = row["file"]

    async def close(self):
        pids(self.file, subprocess.Popen(["sleep", "1000"]).pid)


class Who(Counter):
    """Which process it is in; may leave something there."""

    def step(self, action):
        if action["content"] == "thread":
            threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
        if action["content"] == "process":  # of one that is gone
            subprocess.run("sleep 1000 & disown", shell=True, executable="/bin/bash")
        if action["content"] == "raise":
            raise KeyError(os.getpid())
        return None, os.getpid(), True, False, {}


class Wild:
    """Does what is not expected, or something else, by its row's seed."""

    def reset(self, row):
        self.rng = random.Random(row["seed"])
        return self.act() if self.rng.random() < 0.3 else "Begin."

    def step(self, action):
        assert action["content"] == "Hu 火 \U0001f525" * (1 + action["turn"])
        return self.act(), self.rng.random(), self.rng.random() < 0.2, False, {}

    def act(self):
        deeds = [
            lambda: throw(KeyError("of mine")), lambda: time.sleep(1000), lambda: os._exit(7), lambda: b"bytes",
            lambda: ctypes.string_at(0), lambda: sys.exit("enough"), lambda: None, lambda: "x" * (1 << 20),
            lambda: "\ud800 <|im_end|>\x00 火", lambda: {"role": "assistant", "content": "I"}, scribble,
        ]  # fmt: skip
        return self.rng.choice(deeds)() if self.rng.random() < 0.25 else "on"


class Shared:
    """What is prepared once."""

    @classmethod
    def prepare(cls, file):
        with open(file, "a") as out:
            out.write("prepared\n")
        cls.made = "by prepare"

    def __init__(self, file):
        self.file = file

    def reset(self, row):
        return self.made

    def step(self, action):
        return None, 0, True, False, {}


class NoStep:
    def reset(self, row):
        return None


class Deaf(Counter):
    """Of its own class alone."""

    prepare = None


class Unprepared(Counter):
    @classmethod
    def prepare(cls):
        raise OSError("no disk")


def length(action, row, most=10):
    """An environment of one turn."""
    return min(len(action["content"]), most, row["most"])


async def later(action, row):
    await asyncio.sleep(0)
    return 2


def bad(action, row):
    return "much"


nothing = 5


class Asks:
    """Asks the model with what its row says, in a step as often as it says."""

    def reset(self, row):
        self.row = row
        return ask(row["ask"]) if row.get("opens") else None

    def step(self, action):
        time.sleep(self.row.get("sleeps", 0))
        said = [ask(self.row["ask"]) for _ in range(self.row.get("times", 1))]
        time.sleep(self.row.get("sleeps", 0))
        return "+".join(said), len(said), False, False, {}
