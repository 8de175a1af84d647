"""XTuner-RLHF's configurations as ours.

`python launch/run.py xtuner_config=FILE.py [key=value ...]` runs one, the command line having the last word;
`python -m rlhf_engine.xtuner FILE.py [key=value ...]` shows what becomes of each key, and runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ConfigError, nearest
from .literals import read_names
from .rules import ABSENT, AS_OURS, FIXED, RENAMED, REQUIRED, RULES, SECTIONS, Refused

OPTION = "xtuner_config="  # on our command line


@dataclass
class Mapped:
    """A file's values under our keys; where each came from; and for each of its keys a row of what became of it."""

    file: str
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def table(self) -> str:
        """What became of each key, as text."""
        rows = [(self.file, "value", "here"), *self.rows]
        a, b = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(f"{theirs:<{a}}  {value:<{b}}  {ours}" for theirs, value, ours in rows)


def from_command_line(overrides: Sequence[str]) -> tuple[Mapped | None, list[str]]:
    """What `xtuner_config=FILE.py` says, where it is among the overrides, and the others.

    Raises:
        ConfigError: as `read`; or there are two files.
    """
    files = [text.removeprefix(OPTION) for text in overrides if text.startswith(OPTION)]
    rest = [text for text in overrides if not text.startswith(OPTION)]
    if len(files) > 1:
        raise ConfigError(f"{OPTION}{files[1]}: there is one already, {files[0]}")
    return (read(files[0], said(rest)) if files else None), rest


def read(file: str, said: Mapping[str, str] | None = None) -> Mapped:
    """An XTuner-RLHF configuration under our keys.

    Args:
        said: keys and sections of ours that the command line sets, and to what; the file's own are not taken then.

    Raises:
        ConfigError: the file is more than data, a key is unknown, or one cannot be honoured.
    """
    said = said or {}
    names, used = read_names(file)
    for name, value in names.items():
        if isinstance(value, dict) and name not in used and name not in SECTIONS:
            raise ConfigError(f"{file}: unknown section {name}: {nearest(name, SECTIONS)}")
    found: dict[str, tuple[str, Any]] = {}  # by the key of the quick start: as it is spelled, value
    for theirs, value in _leaves({name: names[name] for name in SECTIONS if name in names}):
        if (key := _current(theirs)) not in RULES:
            raise ConfigError(f"{file}: unknown key {theirs}: {nearest(key, RULES)}")
        if key in found:
            raise ConfigError(f"{file}: {found[key][0]} and {theirs} are the same key: leave one out")
        found[key] = theirs, value
    defaults = {key: rule.default for key, rule in RULES.items() if rule.default is not ABSENT}
    values = defaults | {key: value for key, (_, value) in found.items()}
    mapped = Mapped(file)
    for key, (theirs, _) in found.items():
        _apply(mapped, key, theirs, values, said)
    for key in defaults:
        if key not in found and RULES[key].ours not in mapped.values:
            _apply(mapped, key, f"{key} (default)", values, said)
    _complete(mapped, said)
    return mapped


def _apply(mapped: Mapped, key: str, theirs: str, values: Mapping[str, Any], said: Mapping[str, str]) -> None:
    rule, value = RULES[key], values[key]
    spelled = f"{theirs}={_short(value)}"
    if rule.ours is not None and _issaid(rule.ours, said):
        mapped.rows.append((theirs, _short(value), f"{rule.ours} is said on the command line"))
        return
    try:
        ours = rule.convert(value, values)
    except Refused as error:
        hint = f"; {rule.ours}=... on the command line has the last word" if rule.ours else ""
        raise ConfigError(f"{mapped.file}: {spelled}: {error}{hint}") from None
    except (TypeError, AttributeError, ZeroDivisionError):
        raise ConfigError(f"{mapped.file}: {spelled} is of the wrong kind") from None
    if rule.ours is None or ours is AS_OURS:
        mapped.rows.append((theirs, _short(value), f"ignored: {rule.why}" if rule.why else "default"))
        return
    if rule.ours in mapped.values and mapped.values[rule.ours] != ours:
        raise ConfigError(
            f"{mapped.file}: {mapped.origins[rule.ours]} and {spelled} differ, and one {rule.ours} serves both:"
            f" {rule.ours}=... on the command line has the last word"
        )
    mapped.values[rule.ours] = ours
    mapped.origins.setdefault(rule.ours, spelled)
    mapped.rows.append((theirs, _short(value), f"{rule.ours} = {_short(ours)}"))


def _complete(mapped: Mapped, said: Mapping[str, str]) -> None:
    """What the file does not say, or not under a key of its own."""
    values = mapped.values
    for ours, theirs in REQUIRED.items():
        if ours not in values and not _issaid(ours, said):
            raise ConfigError(f"{mapped.file}: {theirs} is not there: set it, or {ours}=... on the command line")
    fixed = FIXED | {"output_dir": f"runs/{Path(mapped.file).stem}"}
    if "ppo.score_scale" in values:
        fixed["ppo.score_center"] = values["ppo.score_scale"]
    keys = ("data.max_prompt_len", "rollout.max_new_tokens", "data.max_seq_len")
    lengths = [str(said.get(key, values.get(key, 0))) for key in keys]
    if all(length.isdecimal() for length in lengths):  # others are refused with the rest of the configuration
        prompt, response, text = map(int, lengths)
        fixed["data.max_seq_len"] = max(prompt + response, text)
    for ours, value in fixed.items():
        if not _issaid(ours, said):
            values[ours] = value
            mapped.rows.append(("(no key)", "", f"{ours} = {_short(value)}"))


def _leaves(value: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _current(key: str) -> str:
    """The key of the quick start for one of the later examples."""
    for later, ours in RENAMED.items():
        if key.startswith(later):
            return ours + key.removeprefix(later)
    return key


def said(overrides: Sequence[str]) -> dict[str, str]:
    """Keys and values of a command line."""
    pairs = (text.lstrip("+").partition("=") for text in overrides)
    return {key: value for key, _, value in pairs}


def _issaid(ours: str, said: Mapping[str, str]) -> bool:
    return ours in said or ours.partition(".")[0] in said


def _short(value: Any) -> str:
    """A value as our command line spells it, cut where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 36 else f"{text[:32]} ..."
