"""The user's reward function, called so that what it does wrong is named, and that it cannot hold up a run for ever."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..context import RewardFn
from ..signals import RunError


def call(
    fn: RewardFn,
    name: str,
    timeout: float,
    prompts: list[str],
    responses: list[str],
    prompt_tokens: list[list[int]],
    response_tokens: list[list[int]],
) -> Tensor:
    """The function's scores `(B,)`. They may be not finite: the schedule looks at what stages give.

    Args:
        name: package.module:name.
        timeout: seconds.

    Raises:
        RunError: it took too long, did not give a number for each response, or called sys.exit().
        Exception: what it raised itself, with a note of the function and the response.
    """
    columns = prompts, responses, prompt_tokens, response_tokens
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(fn(*columns))
        except BaseException as error:  # sys.exit() would end this thread alone
            error.add_note(f"reward.fn={name} raised it for {_culprit(fn, columns)}")
            outcome.append(error)

    # a thread, because a call that hangs in C or waits for a network cannot be broken off: the run ends beside it
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout)
    if not outcome:
        frame = traceback.extract_stack(sys._current_frames()[thread.ident or 0])[-1]
        raise RunError(
            f"reward.fn={name} took longer than reward.timeout={timeout:g} s for {len(responses)} responses:"
            f" it is at {frame.filename}:{frame.lineno}"
        )
    (result,) = outcome
    if isinstance(result, Exception):
        raise result
    if isinstance(result, BaseException):
        raise RunError(f"reward.fn={name} asked for the end of the run: {result!r}")
    return torch.tensor(_numbers(result, name, responses), dtype=torch.float32)


def _numbers(result: Any, name: str, responses: Sequence[str]) -> list[float]:
    try:
        scores = list(result)
    except TypeError:
        raise RunError(f"reward.fn={name} gave {type(result).__name__} instead of a list of scores") from None
    if len(scores) != len(responses):
        raise RunError(f"reward.fn={name} gave {len(scores)} scores for {len(responses)} responses")
    numbers = []
    for i, score in enumerate(scores):
        try:
            if getattr(score, "shape", ()) != ():
                raise TypeError
            numbers.append(float(score))
        except (TypeError, ValueError):
            raise RunError(
                f"reward.fn={name} gave {score!r:.60} instead of a number for response {i}: {responses[i]!r:.80}"
            ) from None
    return numbers


def _culprit(fn: RewardFn, columns: tuple[list, ...]) -> str:
    """The first response that it raises for alone."""
    for i, row in enumerate(zip(*columns, strict=True)):
        try:
            fn(*([part] for part in row))  # type: ignore[arg-type]
        except BaseException:
            return f"response {i}: {row[1]!r:.80}"
    return f"{len(columns[0])} responses at once, and for none of them alone"
