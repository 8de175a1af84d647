"""What is wrong with an argument of the command line that Hydra cannot read, and how to write it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence

Read = Callable[[str], bool]  # whether an argument can be read, as one value


def mistake(arguments: Sequence[str], i: int, can_read: Read) -> str:
    """One line about the argument at `i`, with a spelling of it, as one types it in a shell, that can be read."""
    argument = arguments[i]
    key, equals, value = argument.partition("=")
    if argument.startswith("-"):
        return f"{argument} is not an option: settings are key=value, and several values of one are several runs"
    if apart := _apart(arguments, i):
        said = re.sub(r"\s*=\s*", "=", apart, count=1).strip()
        return f"{apart}: no spaces around the equals sign: {shlex.quote(said)}"
    if not equals:
        path = os.path.expanduser(argument)
        return f"{argument!r} is not key=value" + (f", such as policy.path={shlex.quote(path)}" if "/" in path else "")
    if re.search(r"\s", key) or re.search(r"\s[\w.]+=", value):
        return f"{argument!r} is one argument with a space in it: each key=value is one of its own"
    if not re.fullmatch(r"(\+{0,2}|~)\w[\w.@/:-]*", key):
        path = shlex.quote(f"policy.path={_quoted(argument)}")
        return f"{argument}: {key!r} is not a key: settings are key=value, and a path with = in it is {path}"
    if can_read(f"{key}=[{value}]") and "," in value:
        return (
            f"{argument} is several values: a list is {shlex.quote(f'{key}=[{value}]')}, a text with commas"
            f" {shlex.quote(f'{key}={_quoted(value)}')}, and several runs are several commands"
        )
    spelled, rest = _spelled(key, value, arguments[i + 1 :])
    found = next((way for way in spelled if can_read(way)), spelled[-1])
    reason = "~ is not the home folder behind an equals sign" if "~" in value else "its value needs quotes"
    return f"{' '.join([argument, *rest])}: {reason}: {shlex.quote(found)}"


def _apart(arguments: Sequence[str], i: int) -> str | None:
    """`key = value` as it was typed, if the argument is a part of that."""
    argument, words = arguments[i], [*arguments, "", ""]
    key, equals, _ = argument.partition("=")
    if equals and key.strip() and key != key.rstrip():
        return argument
    if not equals and words[i + 1].startswith("="):
        return " ".join(words[i : i + (3 if words[i + 1] == "=" else 2)]).strip()
    if not equals and i and arguments[i - 1].endswith("="):
        return f"{arguments[i - 1]} {argument}"
    return None


def _spelled(key: str, value: str, behind: Sequence[str]) -> tuple[list[str], list[str]]:
    """Ways to write a value, and the arguments behind it that the shell has parted from it."""
    if not value.startswith("["):
        return [f"{key}={os.path.expanduser(value)}", f"{key}={_quoted(os.path.expanduser(value))}"], []
    rest: list[str] = []
    ends = next((n for n, word in enumerate(behind) if word.endswith("]") and "=" not in word.partition("[")[0]), None)
    if not value.endswith("]") and ends is not None:
        rest = list(behind[: ends + 1])
    whole = " ".join([value, *rest])
    inner = whole[1:-1] if whole.endswith("]") else whole[1:]
    # a comma within brackets, as in [system=a,reward=b], parts nothing
    items = [os.path.expanduser(item.strip()) for item in re.split(r",(?![^\[]*\])", inner)]
    lists = [f"{key}=[{','.join(items)}]", f"{key}=[{','.join(_quoted(item) for item in items)}]"]
    return [f"{key}={whole}", *lists], rest


def _quoted(text: str) -> str:
    """In double quotes, as Hydra reads them. Of a pair of quotes that stands already, one may have got lost."""
    for quote in "\"'":
        starts, ends = text.startswith(quote), text.endswith(quote)
        if len(text) > 1 and (starts != ends or (starts and ends)) and text.count(quote) <= 2:
            text = text.removeprefix(quote).removesuffix(quote)
    return '"' + text.replace('"', '\\"') + '"'
