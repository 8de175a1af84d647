"""`user`: the model of `user.path` speaks as the user, as an opponent, or as whom it is told to be."""

from __future__ import annotations

import re
from typing import Any

from .model import ask

_ROLE = (
    "You are a person who talks to an assistant. Say one short message at a time, in your own words. When you have what"
    " you came for, say {ends} and nothing else."
)
_FIRST = "Hello! What can I do for you?"  # said to the model, for most templates begin with another
_FLIPPED = {"user": "assistant", "assistant": "user"}


class User:
    """What the policy says goes to the model of `user.path`, and what that says comes back, until it says `ends`.

    Args:
        role: who it is to be, its system message; `{ends}` and `{NAME}`, a field of the row, are filled in.
        opens: it says the first message too, in place of the row.
        ends: what it says to end the dialogue.
        scored: the reward is 1 where it has ended the dialogue, else 0. Without, it is 0, and reward functions have
            their say.
    """

    def __init__(self, role: str = _ROLE, opens: bool = False, ends: str = "[END]", scored: bool = False):
        if not ends.strip():
            raise ValueError("ends is empty, and would end every dialogue at once")
        self._role, self._opens, self._ends, self._scored = role, opens, ends, scored
        self._heard: list[dict[str, Any]] = []  # as the model sees the dialogue

    def reset(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The row's messages up to the last of its user, which the model takes for its own words."""
        fields = {**row, "ends": self._ends}

        def filled(found: re.Match[str]) -> str:
            if found[1] not in fields:
                raise ValueError(f"role names {found[0]}, and the row has no {found[1]!r}")
            return str(fields[found[1]])

        self._heard = [{"role": "system", "content": re.sub(r"\{(\w+)\}", filled, self._role)}]
        self._heard += [{"role": "user", "content": _FIRST}]
        prompt = list(row["messages"])
        while prompt and prompt[-1]["role"] != "user":
            prompt.pop()
        if self._opens or not prompt:
            system = [message for message in prompt[:1] if message["role"] == "system"]
            return [*system, {"role": "user", "content": self._answer()}]
        for message in prompt:
            if (speaker := _FLIPPED.get(message["role"])) is not None:
                self._heard.append({"role": speaker, "content": message["content"]})
        return prompt

    def step(self, action: dict[str, Any]) -> tuple[str | None, float, bool, bool, dict[str, float]]:
        """What the model says to it."""
        self._heard.append({"role": "user", "content": action["content"]})
        said = self._answer()
        is_over = self._ends in said
        return None if is_over else said, float(is_over and self._scored), is_over, False, {}

    def _answer(self) -> str:
        said = ask(self._heard)
        self._heard.append({"role": "assistant", "content": said})
        return said
