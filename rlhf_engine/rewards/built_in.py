"""Functions that `reward.fns` names without a module, made of the run's settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ..config import ConfigError, RunConfig
from .judge import Judge, compiled
from .programs import code

_SECONDS = 5  # of math-verify for one expression, and for one comparison


def exact(responses: Sequence[str], answer: Sequence[Any]) -> list[float]:
    """1 where the response is the row's `answer`, but for space around either; else 0."""
    return [float(said.strip() == str(right).strip()) for said, right in zip(responses, answer, strict=True)]


def length(response_tokens: Sequence[Sequence[int]]) -> list[float]:
    """How many tokens a response has: `length::-0.001` makes that the price of one."""
    return [float(len(tokens)) for tokens in response_tokens]


def regex(config: RunConfig) -> Callable[..., list[float]]:
    """1 where `reward.regex` matches; if it has a group, where that of its last match is the row's `answer`, or that of
    the last match in it, as in a solution; else 0."""
    pattern = compiled("reward.regex", config.reward.regex, re.DOTALL)

    def matches(responses: Sequence[str]) -> list[float]:
        return [float(pattern.search(said) is not None) for said in responses]

    def captures(responses: Sequence[str], answer: Sequence[Any]) -> list[float]:
        def last(text: str) -> list[str]:
            return [match[1] for match in pattern.finditer(text)][-1:]

        rights = [last(str(right)) or [str(right).strip()] for right in answer]
        return [float(last(said) == right) for said, right in zip(responses, rights, strict=True)]

    return captures if pattern.groups else matches


def format(config: RunConfig) -> Callable[..., list[float]]:
    """1 where the whole response is as `reward.format` says."""
    pattern = compiled("reward.format", config.reward.format, re.DOTALL)
    return lambda responses: [float(pattern.fullmatch(said) is not None) for said in responses]


def math(config: RunConfig) -> Callable[..., list[float]]:
    """1 where the response ends in what is equal to the row's `answer` as mathematics, by math-verify; else 0.

    An answer is an expression, bare or in \\boxed or dollars, or a solution that ends in one of these or in `#### 72`.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ConfigError("reward.fns=math needs math-verify: pip install -e '.[math]'") from None

    def expression(answer: str) -> list:
        short = answer.rpartition("####")[2].strip()
        if "\\boxed" not in short and short.count("$") < 2:
            short = "\\boxed{" + re.sub(r"(?<!\\)%", r"\\%", short) + "}"
        if not (found := parse(short, parsing_timeout=_SECONDS)):
            raise ValueError(f"the row's answer is no mathematics: {answer!r:.80}")
        return found

    def equal(said: str, right: Any) -> bool:
        found = parse(said, parsing_timeout=_SECONDS)
        return verify(expression(str(right)), found, timeout_seconds=_SECONDS)

    return lambda responses, answer: [float(equal(*pair)) for pair in zip(responses, answer, strict=True)]


BUILT_IN: dict[str, Callable[[RunConfig], Callable[..., Any]]] = {
    "math": math, "exact": lambda config: exact, "regex": regex, "format": format, "length": lambda config: length,
    "code": code, "judge": Judge,
}  # fmt: skip
APART = {"math", "code"}  # math-verify bounds its time by a signal, which a thread cannot have
LATE = {"math": 0.0}  # what a call that took too long gives; that of any other ends the run
