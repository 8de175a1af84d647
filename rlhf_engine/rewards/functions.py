"""The functions of `reward.fns`: found, called with what they ask for, and held to a number for each response."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import ConfigError, RunConfig, nearest
from ..signals import RunError
from .built_in import APART, BUILT_IN

Numbers = list[float | None]  # None: the function has nothing to say of a response
_SPEC = re.compile(r"([^\[\]]+?)(?:::([^:\[\]]*))?((?:\[\w+=[^\[\]=]+\])*)")
# Arguments in this engine's words and in TRL's, with the attributes of a sample that they are.
_OURS = {"prompts": "prompt", "responses": "response"} | {key: key for key in ("prompt_tokens", "response_tokens")}
_TRLS = {"prompts": "prompt", "completions": "response", "completion_ids": "response_tokens"}
_FORMS = "(prompts, responses, prompt_tokens, response_tokens, **fields) or TRL's (prompts, completions, **fields)"


@dataclass(frozen=True)
class Sample:
    """A response and what it answers; `fields` is a JSON object of what else the row has."""

    prompt: str
    response: str
    prompt_tokens: tuple[int, ...]
    response_tokens: tuple[int, ...]
    fields: str = "{}"


@dataclass(frozen=True)
class Part:
    """A function with its weight in the score.

    Args:
        name: package.module:name, or that of a built-in one.
        label: the NAME of score/NAME.
        renamed: its arguments that get a field of another name, with that name.
        named: all its arguments that have names.
        takes_all: it has **fields.
        by_place: it has *columns, and gets what every sample has in its order.
        apart: each call has one sample, in a process of its own.
    """

    name: str
    label: str
    weight: float
    fn: Callable[..., Any]
    renamed: Mapping[str, str]
    named: Mapping[str, inspect.Parameter]
    takes_all: bool
    by_place: bool
    apart: bool

    @property
    def _given(self) -> Mapping[str, str]:
        return _TRLS if self.named.keys() & (_TRLS.keys() - _OURS.keys()) else _OURS

    @property
    def needed(self) -> dict[str, str]:
        """Fields of the row without which it cannot be called, by its arguments."""
        found = {name for name, p in self.named.items() if name not in self._given and p.default is p.empty}
        return {name: self.renamed.get(name, name) for name in sorted(found | getattr(self.fn, "needed", set()))}

    def __call__(self, samples: Sequence[Sample]) -> Numbers:
        """A number for each sample.

        Raises:
            RunError: it gave something else, or called sys.exit().
            Exception: what it raised itself, with a note of the function and the response.
        """
        about = f"reward.fns={self.name}"
        try:
            result = self._result(samples)
        except RunError:
            raise
        except Exception as error:
            error.add_note(f"{about} raised it for {self._culprit(samples)}")
            raise
        except BaseException as error:
            raise RunError(f"{about} asked for the end of the run: {error!r}") from None
        try:
            found = list(result)
        except TypeError:
            raise RunError(f"{about} gave {type(result).__name__} instead of a list of scores") from None
        if len(found) != len(samples):
            raise RunError(f"{about} gave {len(found)} scores for {len(samples)} responses")
        for i, score in enumerate(found):
            try:
                if getattr(score, "shape", ()) != ():
                    raise TypeError
                found[i] = None if score is None else float(score)
            except (TypeError, ValueError):
                raise RunError(f"{about} gave {score!r:.60} instead of a number for {_place(samples, i)}") from None
        return found

    def _result(self, samples: Sequence[Sample]) -> Any:
        """What the function gives. A field that a row lacks is None."""

        async def awaited() -> Any:
            return await result

        columns = {name: [_value(sample, of) for sample in samples] for name, of in self._given.items()}
        if "completions" in self.named and "dict" in str(self.named["completions"].annotation):  # as TRL's own have it
            columns["completions"] = [[{"role": "assistant", "content": text}] for text in columns["completions"]]
        rows = [json.loads(sample.fields) for sample in samples]
        fields = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
        fields |= {argument: [_field(row, key) for row in rows] for argument, key in self.renamed.items()}
        offered = {key: value for key, value in fields.items() if key not in columns}
        offered |= {} if self.by_place else columns
        wanted = {key: value for key, value in offered.items() if self.takes_all or key in self.named}
        result = self.fn(*(columns.values() if self.by_place else ()), **wanted)
        return asyncio.run(awaited()) if inspect.isawaitable(result) else result

    def _culprit(self, samples: Sequence[Sample]) -> str:
        """The first response that it raises for alone."""
        if len(samples) == 1:
            return _place(samples, 0)
        for i in range(len(samples)):
            try:
                self._result(samples[i : i + 1])
            except BaseException:
                return _place(samples, i)
        return f"{len(samples)} responses at once, and for none of them alone"


def _value(sample: Sample, name: str) -> Any:
    value = getattr(sample, name)
    return list(value) if isinstance(value, tuple) else value


def _field(row: Any, key: str) -> Any:
    """A field, or by a key with dots one within it; None where it is not there."""
    for part in (key,) if key in row else key.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def _place(samples: Sequence[Sample], i: int) -> str:
    return f"response {i}: {samples[i].response!r:.80}"


def load(config: RunConfig) -> list[Part]:
    """The functions of `reward.fns`.

    Raises:
        ConfigError: there is no such function, or it cannot be called as reward functions are.
    """
    specs = [_parse(text) for text in config.reward.fns]
    short = Counter(["mean", "std", *(name.rpartition(":")[2] for name, _, _ in specs)])  # those of the whole score
    return [_part(config, *spec, short) for spec in specs]


def _part(config: RunConfig, name: str, weight: float, renamed: dict[str, str], short: Counter[str]) -> Part:
    is_ours, label = name in BUILT_IN, name.rpartition(":")[2]
    label = name if short[label] > 1 else label
    fn = BUILT_IN[name](config) if is_ours else _imported(name)
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        raise ConfigError(f"reward.fns={name} does not say what it takes: a reward function takes {_FORMS}") from None
    kinds = {p.kind for p in signature.parameters.values()}
    named = {key: p for key, p in signature.parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    before = [key for key, p in named.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    by_place = inspect.Parameter.VAR_POSITIONAL in kinds and before == list(_OURS)[: len(before)]
    answers = {"responses", "response_tokens", "completions", "completion_ids"}
    if inspect.Parameter.POSITIONAL_ONLY in kinds or not (by_place or named.keys() & answers):
        raise ConfigError(f"reward.fns={name} takes {signature}: a reward function takes {_FORMS}")
    takes_all = inspect.Parameter.VAR_KEYWORD in kinds
    for argument in () if takes_all else renamed.keys() - named.keys():
        raise ConfigError(f"reward.fns={name}[{argument}=…]: {nearest(argument, named)}")
    apart = name in APART if is_ours else config.reward.processes > 0
    return Part(name, label, weight, fn, renamed, named, takes_all, by_place, apart)


def _parse(text: str) -> tuple[str, float, dict[str, str]]:
    """NAME::WEIGHT[ARGUMENT=FIELD]… as its three parts."""
    match = _SPEC.fullmatch(text)
    if match is None:
        raise ConfigError(f"reward.fns={text} is not of the form NAME::WEIGHT[ARGUMENT=FIELD]")
    if match[1] not in BUILT_IN and not all(match[1].partition(":")):
        raise ConfigError(
            f"reward.fns={text} is neither package.module:name nor built in: {nearest(match[1], BUILT_IN)}"
        )
    try:
        weight = 1.0 if match[2] is None else float(match[2])
    except ValueError:
        weight = float("nan")
    if not abs(weight) < float("inf"):
        raise ConfigError(f"reward.fns={text}: the weight {match[2]!r} is not a finite number")
    return match[1], weight, dict(re.findall(r"\[(\w+)=([^\[\]]+)\]", match[3]))


def _imported(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        raise ConfigError(f"reward.fns={name}: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise ConfigError(f"reward.fns={name} is not a function")
    return found


def check_rows(parts: Sequence[Part], rows: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Each row, given by its place and its fields, has what the functions need.

    Raises:
        ConfigError: names the function, the row and the field.
    """
    needed = [(part.name, argument, key) for part in parts for argument, key in part.needed.items()]
    for where, fields in rows:
        for name, argument, key in needed:
            if _field(fields, key) is None:
                raise ConfigError(
                    f"reward.fns={name} needs {key!r} of each row, and {where} has {sorted(fields)!s:.200}:"
                    f" {name}[{argument}=KEY] takes another key for it"
                )
