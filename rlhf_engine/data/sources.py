"""Where rows come from: the embedded generator or files, checked row by row. Standard library alone, so that a bad
file is refused before torch is imported.

A dialogue is a list of messages, `{"role": "user" | "assistant" | "system", "content": str}`.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError, DataConfig, nearest
from . import hh_mini

Messages = list[dict[str, str]]
GoldFn = Callable[[str, str], float]  # prompt text, response text -> score


@dataclass(frozen=True)
class PreferenceRow:
    """A prompt, ending with a user turn, and two answers to it."""

    prompt: Messages
    chosen: str
    rejected: str


@dataclass
class Source:
    """One source of a mixture: rows to train on and rows held out."""

    name: str
    weight: float
    train: list[PreferenceRow]
    held_out: list[PreferenceRow]
    num_unpaired: int = 0  # rows left out because their two sides answer different prompts


def read_sources(config: DataConfig, seed: int) -> list[Source]:
    """Every source of the mixture, read and checked.

    Raises:
        ConfigError: names the source, the file and the row, and what would be right.
    """
    names = config.sources or [*(hh_mini.SUBSETS if config.kind == "hh_mini" else ())]
    if not names:
        raise ConfigError("data.sources is empty: data.sources=[FILE.jsonl::1.0] names files in hh-rlhf's format")
    parsed = [parse_weight(name) for name in names]
    if config.num_eval_rows < len(parsed):
        raise ConfigError(f"data.num_eval_rows={config.num_eval_rows}: each source needs one row held out at least")
    total = sum(weight for _, weight in parsed)
    sources = []
    for name, weight in parsed:
        num_unpaired = 0
        num_eval = max(1, round(config.num_eval_rows * weight / total))
        if config.kind == "hh_mini":
            if name not in hh_mini.SUBSETS:
                raise ConfigError(f"data.sources={name}: {nearest(name, hh_mini.SUBSETS)}")
            num_train = max(1, round(config.num_rows * weight / total))
            train, held_out = (
                [row for raw in hh_mini.pairs(name, split, num_rows, seed) if (row := _pair(raw, name))]
                for split, num_rows in (("train", num_train), ("test", num_eval))
            )
        else:
            found = [_pair(row, where) for where, row in read_json_rows(name)]
            rows = [row for row in found if row is not None]
            num_unpaired = len(found) - len(rows)
            if len(rows) <= num_eval:
                raise ConfigError(f"{name} has {len(rows)} rows, no more than the {num_eval} held out of it")
            train, held_out = rows[:-num_eval], rows[-num_eval:]
        sources.append(Source(name, weight / total, train, held_out, num_unpaired))
    return sources


def gold_rule(config: DataConfig) -> GoldFn | None:
    """The true preference behind the data, where it is known."""
    return hh_mini.gold_score if config.kind == "hh_mini" else None


def parse_weight(source: str) -> tuple[str, float]:
    """`path::weight`, the weight 1 where it is left out."""
    name, separator, text = source.rpartition("::")
    if not separator:
        return source, 1.0
    try:
        weight = float(text)
    except ValueError:
        raise ConfigError(f"data.sources={source}: the weight {text!r} is not a number") from None
    if not 0 < weight < float("inf"):
        raise ConfigError(f"data.sources={source}: the weight must be positive")
    return name, weight


def read_json_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a .jsonl or .jsonl.gz file, each with its place "file:line".

    Raises:
        ConfigError: no such file, an empty one, or a line that is not a JSON object.
    """
    if not Path(path).is_file():
        raise ConfigError(f"data.sources: {path} is not there")
    opened = gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")  # noqa: SIM115
    number = count = 0
    with opened as file:
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line.decode("utf-8"))
                if not isinstance(row, dict):
                    raise ConfigError(f"{path}:{number}: a row is a JSON object, not {type(row).__name__}")
                count += 1
                yield f"{path}:{number}", row
        except (ValueError, EOFError, OSError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path}:{number + isinstance(error, OSError | EOFError)}: {error}") from None
    if not count:
        raise ConfigError(f"data.sources: {path} has no rows")


_TURN = re.compile(r"\n\n(Human|Assistant):")


def parse_hh(text: Any, where: str, field: str) -> Messages:
    """hh-rlhf's text, "\\n\\nHuman: … \\n\\nAssistant: …", to messages. Turns of one speaker in a row are joined.

    Raises:
        ConfigError: the text has another form.
    """
    parts = _TURN.split(text) if isinstance(text, str) else [""]
    if len(parts) < 3 or parts[0].strip() or parts[1] != "Human" or parts[-2] != "Assistant":
        raise ConfigError(
            f"{where}: {field!r} must be text that begins with a '\\n\\nHuman:' turn and ends with an"
            " '\\n\\nAssistant:' turn"
        )
    messages: Messages = []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + content.strip()
        else:
            messages.append({"role": role, "content": content.strip()})
    return messages


def _pair(row: dict[str, Any], where: str) -> PreferenceRow | None:
    """A checked row; None where its two sides answer different prompts."""
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ConfigError(f"{where}: no {key!r}; a row has 'chosen' and 'rejected', this one {sorted(row)}")
    chosen, rejected = (parse_hh(row[key], where, key) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        return None
    return PreferenceRow(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])
