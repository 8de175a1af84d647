"""Reward functions that tests of the processes for them call; they import nothing that is slow."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path


def right(prompts, responses, prompt_tokens, response_tokens, answer=("?",), **fields):
    """How many letters the answer has, and a hundredth for each token of the response."""
    return [len(a) + len(ids) / 100 for a, ids in zip(answer, response_tokens, strict=True)]


def as_in_trl(prompts, completions, answer, **kwargs):
    assert "prompt" not in kwargs and "prompts" not in kwargs
    return [float(a in said) for a, said in zip(answer, completions, strict=True)]


def as_trls_own(completions: list[list[dict[str, str]]], solution: list[str], log_extra=None, **kwargs):
    return [float(said[0]["content"] == s) for said, s in zip(completions, solution, strict=True)]


def of_tokens(completion_ids, **kwargs):
    return [float(sum(ids)) for ids in completion_ids]


def by_place(*columns):
    return [float(len(columns)) for _ in columns[0]]


def by_place_and_name(prompts, *others, answer):
    return [10.0 * len(others) + len(text) for text in answer]


def sometimes(responses):
    """It has nothing to say of an empty response."""
    return [None if not text else 1.0 for text in responses]


async def slowly(responses):
    await asyncio.sleep(0)
    return [2.0 for _ in responses]


def who(responses):
    """The number of the process."""
    return [float(os.getpid()) for _ in responses]


def strange(responses):
    """What the response says."""
    for text in responses:
        if text == "raise":
            raise ValueError("of one response")
        if text == "exit":
            sys.exit("no")
        if text == "die":
            os._exit(3)
        if text == "text":
            return ["one"]
        if text == "two":
            return [1.0, 2.0]
        if text.startswith("hang "):  # and a process with it
            started = subprocess.Popen(["sleep", "1000"])
            Path(text[5:]).write_text(f"{os.getpid()} {started.pid}")
            time.sleep(1000)
    return [1.0 for _ in responses]


class NoFunction:
    pass


def wrong(prompts, answers):
    return []


def wants_a_trainer(completions, trainer_state, **kwargs):
    return []


def letters(responses):
    """Differs where all responses are as long as they may be, too."""
    return [text.count("e") for text in responses]
