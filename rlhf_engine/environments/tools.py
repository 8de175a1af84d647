"""What environments of tools have in common."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, ClassVar

_NUMBER = re.compile(r"-?\d(?:[\d,]*\d)?(?:\.\d+)?")


def schema(name: str, description: str, **arguments: tuple[str, str]) -> dict[str, Any]:
    """Of a tool. Each argument has a type of JSON and a description; one whose type ends in `?` may be left out."""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {
                    key: {"type": kind.rstrip("?"), "description": about} for key, (kind, about) in arguments.items()
                },
                "required": [key for key, (kind, _) in arguments.items() if not kind.endswith("?")],
            },
        },
    }


class ToolEnvironment:
    """Answers each call of a tool, and what is wrong with a call, with text; a turn without calls is the last.

    A tool is a method of its name that gives text, and raises ValueError for what the model may do better.

    Args:
        scored: the reward of the last turn is 1 where its last number is the row's `answer`, or the last in that, else
            0. Without, it is 0, and reward functions have their say.
    """

    tools: ClassVar[list[dict[str, Any]]]

    def __init__(self, scored: bool = False):
        self._scored, self._answer = scored, ""

    def reset(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The row's own messages are the prompt, up to the last of its user: behind that a demonstration calls."""
        if self._scored and row.get("answer") is None:
            raise ValueError("env.args.scored=true needs 'answer' of each row")
        self._answer, messages = str(row.get("answer")), list(row["messages"])
        while messages and messages[-1]["role"] in ("assistant", "tool"):
            messages.pop()
        return messages or row["messages"]

    def step(self, action: dict[str, Any]) -> tuple[Any, float, bool, bool, dict[str, float]]:
        """One message for each call."""
        if "error" in action:
            said = [f"error: {action['error']}"]
            return said[0], 0.0, False, False, _info(said)
        if not (calls := action.get("tool_calls")):
            return None, self._score(action["content"]), True, False, _info([])
        said = [self._call(**call["function"]) for call in calls]
        return [{"role": "tool", "content": text} for text in said], 0.0, False, False, _info(said)

    def _score(self, said: str) -> float:
        if not self._scored:
            return 0.0
        found, right = (_last_number(text) for text in (said, self._answer))
        return float(found is not None and found == right)

    def _call(self, name: str, arguments: dict[str, Any]) -> str:
        known = [tool["function"]["name"] for tool in self.tools]
        if name not in known:
            near = difflib.get_close_matches(name, known, 1) or known
            return f"error: there is no tool {name}: there is {', '.join(near)}"
        tool: Callable[..., str] = getattr(self, name)
        try:
            inspect.signature(tool).bind(**arguments)
        except TypeError as error:
            return f"error: {name}: {error}"
        try:
            return tool(**arguments)
        except ValueError as error:
            return f"error: {error}"


def _info(said: Sequence[str]) -> dict[str, float]:
    return {"calls": float(len(said)), "failed_calls": float(sum(text.startswith("error: ") for text in said))}


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None
