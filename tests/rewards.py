"""Reward functions, as a user writes them."""

import itertools
import math
import os
import signal
import time

import numpy as np


def short_and_polite(prompts, responses, prompt_tokens, response_tokens):
    """One float for each response: politeness less a little for length."""
    assert len(prompts) == len(responses) == len(prompt_tokens) == len(response_tokens)
    return [float("please" in text) - 0.01 * len(ids) for text, ids in zip(responses, response_tokens, strict=True)]


def too_few(prompts, responses, prompt_tokens, response_tokens):
    return [0.0]


def slowly(*texts_and_tokens):
    """The same, half a second later: long enough for a test to send a signal to a run, or to take a node from it."""
    time.sleep(0.5)
    return short_and_polite(*texts_and_tokens)


def dies(*texts_and_tokens):
    """With an error, or with DIES_BY_SIGNAL suddenly. The main rank scores, and the others wait for it."""
    if "DIES_BY_SIGNAL" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    raise ZeroDivisionError("of the reward function")


def dies_at_times(*texts_and_tokens):
    """The same, but for its fourth call in each of the first two processes that make it; DIED counts them."""
    died = os.path.getsize(os.environ["DIED"]) if os.path.exists(os.environ["DIED"]) else 0
    if next(_calls) == 3 and died < 2:
        with open(os.environ["DIED"], "a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    return short_and_polite(*texts_and_tokens)


_calls = itertools.count()


def not_a_number(*texts_and_tokens):
    """The same, but for the fourth response of the calls that BAD_CALLS names."""
    scores = short_and_polite(*texts_and_tokens)
    if str(next(_calls)) in os.environ["BAD_CALLS"].split(","):
        scores[3] = math.nan
    return scores


def a_number(*texts_and_tokens):
    return 1.0


def a_matrix(prompts, *others):
    return np.zeros((len(prompts), 2))


def hangs(*texts_and_tokens):
    while True:
        time.sleep(0.1)


def fails_for_one(prompts, responses, prompt_tokens, response_tokens):
    """Raises for the third response of 16, and knows it again alone."""
    _third.append(responses[min(2, len(responses) - 1)])
    if _third[0] in responses:
        raise ValueError("of one response")


_third: list[str] = []
