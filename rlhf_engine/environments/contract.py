"""What an environment is, and what it may give: checked here, in its own process.

A class in Gymnasium's words, made with `**env.args` for each trajectory, whose methods may be coroutines:

    reset(row) -> messages
    step(action) -> (observation, reward, terminated, truncated, info)

or a function `fn(action, row, **env.args) -> reward`, an environment of one turn (docs/environments.md).
"""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .frames import packed

Message = dict[str, Any]
_OBSERVED = ("user", "tool", "system")
_STEP = "(observation, reward, terminated, truncated, info)"


class Fault(Exception):
    """What an environment gave and must not give."""


class Trajectory:
    """One environment from its making to its end.

    Args:
        fn: class or function.
        args: that it is made or called with.

    Attributes:
        has_failed: it has done what it must not.
    """

    def __init__(self, fn: Callable[..., Any], args: Mapping[str, Any]):
        self._fn, self._args, self._row = fn, args, dict[str, Any]()
        self._runner = asyncio.Runner()  # of all calls: what one has opened, another may use
        self._environment: Any = None
        self.has_failed = False

    def reset(self, row: dict[str, Any]) -> bytes:
        """What the environment says to a row, a JSON object: the fields of an `Answer` as JSON."""
        return self._told("reset", self._reset, row)

    def step(self, action: Message) -> bytes:
        """And to an action."""
        return self._told("step", self._step, action)

    def _told(self, what: str, answer: Callable[[dict[str, Any]], dict[str, Any]], given: dict[str, Any]) -> bytes:
        try:
            found = answer(given)
            try:
                return packed(found)
            except (TypeError, ValueError, RecursionError) as error:
                raise Fault(f"{what} gave what is no JSON: {error}") from None
        except Fault as fault:
            failure = str(fault)
        except BaseException as error:  # sys.exit() too
            failure = f"{what} raised {_described(error)}"
        self.has_failed = True
        return packed({"failure": failure})

    def close(self) -> None:
        """Calls the environment's `close`, where it has one, and ends what it does in its loop."""
        if close := getattr(self._environment, "close", None):
            self._awaited(close())
        self._runner.close()

    def _reset(self, row: dict[str, Any]) -> dict[str, Any]:
        self._row, prompt = row, row["messages"]
        if not inspect.isclass(self._fn):
            return {"messages": prompt}
        self._environment = self._fn(**self._args)
        given = self._awaited(self._environment.reset(row))
        if given is not None:
            prompt = _messages(given, "reset", (*_OBSERVED, "assistant"), "user")
            if prompt[-1]["role"] == "assistant":
                raise Fault("reset gave a prompt that ends with what the assistant says")
        return {"messages": prompt, "tools": getattr(self._environment, "tools", None) or None}

    def _step(self, action: Message) -> dict[str, Any]:
        if self._environment is None:
            reward = self._awaited(self._fn(action, self._row, **self._args))
            return {"messages": [], "reward": _number(reward, "the function"), "terminated": True}
        given = self._awaited(self._environment.step(action))
        if not isinstance(given, tuple | list) or len(given) != 5:
            shape = f"{len(given)} values" if isinstance(given, tuple | list) else type(given).__name__
            raise Fault(f"step gave {shape} instead of {_STEP}")
        observation, reward, terminated, truncated, info = given
        for name, value in (("terminated", terminated), ("truncated", truncated)):
            if type(value).__name__ not in ("bool", "bool_"):  # numpy's too
                raise Fault(f"step gave {value!r:.60} instead of True or False as {name}")
        if not isinstance(info, Mapping):
            raise Fault(f"step gave {info!r:.60} instead of a dict as info")
        is_over = bool(terminated or truncated)
        return {
            "messages": [] if is_over else _messages(observation, "step", _OBSERVED, _speaker(action)),
            "reward": _number(reward, "step"),
            "terminated": bool(terminated),
            "truncated": bool(truncated),
            "info": {str(key): float(value) for key, value in info.items() if _is_number(value)},
        }

    def _awaited(self, given: Any) -> Any:
        async def awaited() -> Any:
            return await given

        return self._runner.run(awaited()) if inspect.isawaitable(given) else given


def _speaker(action: Message) -> str:
    """The role of text that answers an action."""
    return "tool" if action.get("tool_calls") else "user"


def _messages(given: Any, what: str, roles: Sequence[str], speaker: str) -> list[Message]:
    """Text, a message or a list of messages as the latter."""
    if isinstance(given, str):
        return [{"role": speaker, "content": given}]
    found = [given] if isinstance(given, dict) else given
    if not isinstance(found, list | tuple) or not found:
        raise Fault(f"{what} gave {given!r:.60} instead of text or messages, and the trajectory is not over")
    for message in found:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise Fault(f"{what} gave {message!r:.60} instead of a message, {{'role': …, 'content': text}}")
        if message.get("role") not in roles:
            raise Fault(f"{what} gave a message of the role {message.get('role')!r:.40}: known: {', '.join(roles)}")
    return list(found)


def _is_number(value: Any) -> bool:
    """A finite one, also of numpy or torch."""
    try:
        return not isinstance(value, str | bytes | None) and math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        return False


def _number(value: Any, what: str) -> float:
    if not _is_number(value):
        raise Fault(f"{what} gave {value!r:.60} instead of a finite number as reward")
    return float(value)


def _described(error: BaseException) -> str:
    """An error with the place that raised it."""
    said = traceback.format_exception_only(error)[-1].strip()
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{said} ({os.path.basename(where.filename)}:{where.lineno})"
