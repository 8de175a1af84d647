"""Reward functions, as a user writes them."""

import itertools
import math
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from rlhf_engine.signals import noted
from rlhf_engine.surviving import watchdog


def short_and_polite(prompts, responses, prompt_tokens, response_tokens):
    """One float for each response: politeness less a little for length."""
    assert len(prompts) == len(responses) == len(prompt_tokens) == len(response_tokens)
    return [float("please" in text) - 0.01 * len(ids) for text, ids in zip(responses, response_tokens, strict=True)]


def all_alike(prompts, *others):
    """A verifier's, of answers that are all wrong."""
    return [0.0] * len(prompts)


def some_alike(prompts, responses, prompt_tokens, response_tokens):
    """A verifier's, of which half of the prompts are too hard."""
    rows = zip(prompt_tokens, response_tokens, strict=True)
    return [0.0 if len(prompt) % 2 else float(sum(ids) % 97) for prompt, ids in rows]


def too_few(prompts, responses, prompt_tokens, response_tokens):
    return [0.0]


def held(*texts_and_tokens):
    """The same; but in the third iteration, or the call number HELD_AT, it makes a file HELD and waits until the run is
    asked to stop or there is a file HELD.go, so that a test may do what it likes to a run that stands still. A run that
    goes on finds that file."""
    here, go = Path(os.environ["HELD"]), Path(os.environ["HELD"] + ".go")
    if next(_calls) == int(os.environ.get("HELD_AT", 3)):  # the first is the evaluation's
        here.touch()
        while not noted() and not go.exists():
            time.sleep(0.02)
        go.touch()
    return short_and_polite(*texts_and_tokens)


def seems_slow(*texts_and_tokens):
    """The same, but the watchdog's clock goes on by 40 seconds in each call, and it looks at it meanwhile."""
    passed = 40 * (next(_calls) + 1)
    watchdog.time = SimpleNamespace(monotonic=lambda: time.monotonic() + passed, sleep=time.sleep)
    time.sleep(1.5)  # longer than it ever looks away
    return short_and_polite(*texts_and_tokens)


def dies(*texts_and_tokens):
    """With an error, or with DIES_BY_SIGNAL suddenly. The main rank scores, and the others wait for it."""
    if "DIES_BY_SIGNAL" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    raise ZeroDivisionError("of the reward function")


def dies_at_times(*texts_and_tokens):
    """The same, but for its third call in each of the first two processes that make it; DIED counts them."""
    died = os.path.getsize(os.environ["DIED"]) if os.path.exists(os.environ["DIED"]) else 0
    if next(_calls) == 2 and died < 2:
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
    """For ever; there is a file HELD from then on."""
    Path(os.environ.get("HELD", os.devnull)).touch()
    while True:
        time.sleep(0.1)


def fails_for_one(prompts, responses, prompt_tokens, response_tokens):
    """Raises for the third response of 16, and knows it again alone."""
    _third.append(responses[min(2, len(responses) - 1)])
    if _third[0] in responses:
        raise ValueError("of one response")


_third: list[str] = []


def fills(*texts_and_tokens):
    """The same; but its call number FULL_AT leaves no room on the disk with the folder FULL."""
    if next(_calls) == int(os.environ["FULL_AT"]):
        fill(Path(os.environ["FULL"]))
    return short_and_polite(*texts_and_tokens)


def fill(folder: Path) -> None:
    """Takes all room on its disk."""
    with open(folder / "filler", "ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
