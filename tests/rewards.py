"""Reward functions, as a user writes them."""

import os
import signal
import time


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
