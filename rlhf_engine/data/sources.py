"""The mixture: which sources, in which shares, under which presets, and what their rows serve.

Neither torch nor a library that is not needed is imported, so that a bad file is refused early.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import ASKING, LABELLED, PAIRED, ConfigError, nearest
from . import hh_mini, sums, tool_sums
from .files import Meter, identity, read_rows
from .formats import Row, read_row, text_of

NUM_EVAL_ROWS = 256
LOOKED_AT = 1000  # rows of a source, before a run starts
GoldFn = Callable[[str, str], float]  # prompt text, response text -> score

HH_MINI = tuple(f"hh_mini/{subset}" for subset in hh_mini.SUBSETS)
# the embedded sources: split, number of rows and seed to rows
EMBEDDED: dict[str, Callable[[str, int, int], Iterator[dict[str, Any]]]] = {
    **{name: functools.partial(hh_mini.pairs, name.removeprefix("hh_mini/")) for name in HH_MINI},
    "sums": sums.rows,
    "tool_sums": tool_sums.rows,
}

# System messages that a source can have in front of its dialogues. `default` leaves them as they are.
PRESETS = {
    "default": None,
    "helpful": "You are an assistant who does what is asked, correctly and completely, and says what it does not know.",
    "harmless": "You are an assistant who does not help anyone to do harm, and says so kindly and without lecturing.",
    "hhh": "You are an assistant who is helpful, honest and harmless: useful wherever you can be, truthful about what"
    " you do not know, and unwilling to do harm.",
    "summarization": "Summarise the text that you are given: briefly, in your own words, with nothing that it does not"
    " say.",
    "math": "Solve the problem step by step, check each step, and end with the result on a line of its own.",
}


@dataclass(frozen=True)
class Spec:
    """What `name::weight[system=PRESET][reward=PRESET]` says.

    Args:
        name: a file, a folder, a data set of the hub, or one of `EMBEDDED`.
        system: preset that the policy reads in front of each dialogue.
        reward: preset that the reward model reads instead; None: it reads what the policy reads.
    """

    name: str
    weight: float = 1.0
    system: str = "default"
    reward: str | None = None


@dataclass(frozen=True)
class Source:
    """One source of a mixture.

    Args:
        share: of the mixture.
        held_out: rows that are not trained on: the last ones.
        at_most_a_tenth: of its rows.
        generated: number of rows and seed, of one of `EMBEDDED`.
        key: of the configuration, that errors name.
        split: of those rows; what is held out is of the test split.
    """

    spec: Spec
    share: float
    held_out: int
    at_most_a_tenth: bool = False
    generated: tuple[int, int] | None = None
    key: str = "data.sources"
    split: str = "train"

    def raw_rows(self, meter: Meter | None = None) -> Iterator[tuple[str, Any]]:
        """Every row as it is written, with its place; those held out are the last ones.

        Raises:
            ConfigError: there are none, or one cannot be read.
        """
        if self.generated is None:
            yield from read_rows(self.spec.name, self.key, meter)
        else:
            count, seed = self.generated
            for split, rows in ((self.split, count), ("test", self.held_out)):
                made = EMBEDDED[self.spec.name](split, rows, seed)
                yield from ((f"{self.spec.name}:{i}", row) for i, row in enumerate(made, 1))

    def rows(self) -> Iterator[Row]:
        """Every row, read and checked.

        Raises:
            ConfigError: names the file and the row, and what would be right.
        """
        return (read_row(row, where) for where, row in self.raw_rows())

    def identity(self) -> list[Any]:
        """What tells whether its rows have changed."""
        return [*self.generated, self.held_out] if self.generated else identity(self.spec.name, self.key)

    def num_held_out(self, num_rows: int) -> int:
        """How many of so many rows are held out.

        Raises:
            ConfigError: no row would be left.
        """
        count = self.held_out
        if self.at_most_a_tenth:
            count = min(count, max(1, num_rows // 10))
        if num_rows <= count:
            raise ConfigError(
                f"{self.key}: {self.spec.name} has {num_rows} rows, no more than the {count} held out of it: lower"
                " data.num_eval_rows or add rows"
            )
        return count

    def first_rows(self, count: int) -> tuple[list[Row], bool]:
        """The first rows that are trained on, so many at most, and whether they are all of these."""
        rows = list(itertools.islice(self.rows(), count + self.held_out + 1))
        if len(rows) > count + self.held_out:
            return rows[:count], False
        return rows[: len(rows) - self.num_held_out(len(rows))], True


_SUFFIX = re.compile(r"\[(\w+)(?:=([^\[\]]*)\]|\]:([^\[\]]*))")
_SPEC = re.compile(rf"(.+?)(?:::([^:\[\]]*))?((?:{_SUFFIX.pattern})*)")
# XTuner-RLHF's names beside our own
_PRESET_KEYS = {
    "system": "system", "SYS_PROMPT": "system", "META": "system",
    "reward": "reward", "RM_PROMPT": "reward", "REWARD_META": "reward",
}  # fmt: skip


def parse_spec(text: str, key: str = "data.sources") -> Spec:
    """`name::weight[system=PRESET][reward=PRESET]`; all but the name may be left out, and the weight is 1 then.

    XTuner-RLHF's suffixes `[SYS_PROMPT]:PRESET` or `[META]:PRESET` (system) and `[RM_PROMPT]:PRESET` or
    `[REWARD_META]:PRESET` (reward) are read too.

    Args:
        key: of the configuration, that errors name.

    Raises:
        ConfigError: the weight is not a positive number, or there is no such preset.
    """
    match = _SPEC.fullmatch(text)
    if match is None:
        raise ConfigError(f"{key}={text!r} is not of the form name::weight[system=PRESET][reward=PRESET]")
    name, weight = match[1], 1.0
    if match[2] is not None:
        try:
            weight = float(match[2])
        except ValueError:
            raise ConfigError(f"{key}={text}: the weight {match[2]!r} is not a number") from None
        if not 0 < weight < float("inf"):
            raise ConfigError(f"{key}={text}: the weight must be positive")
    presets: dict[str, str] = {}
    for suffix in _SUFFIX.finditer(match[3]):
        preset = suffix[2] if suffix[2] is not None else suffix[3]
        if suffix[1] not in _PRESET_KEYS:
            raise ConfigError(f"{key}={text}: [{suffix[1]}…]: {nearest(suffix[1], _PRESET_KEYS)}")
        if preset not in PRESETS:
            raise ConfigError(f"{key}={text}: no preset {preset!r}: {nearest(preset, PRESETS)}")
        presets[_PRESET_KEYS[suffix[1]]] = preset
    return Spec(name, weight, **presets)


def mixture(
    names: Sequence[str], num_rows: int, num_eval_rows: int | None, seed: int, key: str = "data.sources"
) -> list[Source]:
    """The sources of a mixture, of which nothing is read yet.

    Args:
        names: as `parse_spec` reads them.
        num_rows: generated for all of `EMBEDDED` together.
        num_eval_rows: held out of all sources together: the test split of `EMBEDDED`, the last rows of others. May be
            0. None: `NUM_EVAL_ROWS`, but of no file more than a tenth.

    Raises:
        ConfigError: names the source and what would be right.
    """
    specs = [_known(parse_spec(name, key), key) for name in names]
    if num_eval_rows is not None and 0 < num_eval_rows < len(specs):
        raise ConfigError(f"data.num_eval_rows={num_eval_rows}: each source needs one row held out at least")
    total = sum(spec.weight for spec in specs)
    wanted = NUM_EVAL_ROWS if num_eval_rows is None else num_eval_rows
    sources = []
    for spec in specs:
        share = spec.weight / total
        held_out = max(1, round(wanted * share)) if wanted else 0
        generated = (max(1, round(num_rows * share)), seed) if spec.name in EMBEDDED else None
        sources.append(Source(spec, share, held_out, num_eval_rows is None and not generated, generated, key))
    return sources


def held_out_sets(names: Sequence[str], num_rows: int, seed: int, key: str = "eval.sources") -> list[Source]:
    """Sources of which nothing is trained on: files as a whole, and the test split of `EMBEDDED`.

    Args:
        num_rows: generated for each of `EMBEDDED`.

    Raises:
        ConfigError: names the source and what would be right.
    """
    sources = []
    for text in names:
        spec = _known(parse_spec(text, key), key)
        if spec.weight != 1:
            raise ConfigError(f"{key}={text}: all rows are answered, so that a weight says nothing: leave it out")
        generated = (num_rows, seed) if spec.name in EMBEDDED else None
        sources.append(Source(spec, 1 / len(names), 0, False, generated, key, "test"))
    return sources


def _known(spec: Spec, key: str) -> Spec:
    if spec.name.split("/")[0] == "hh_mini" and spec.name not in EMBEDDED:
        raise ConfigError(f"{key}={spec.name}: {nearest(spec.name, HH_MINI)}")
    return spec


# What a phase learns from; a row has a bit for each
KINDS = {
    "prompt": "a prompt",
    "pair": "two different answers to one prompt",
    "answer": "an answer or text",
    "label": "a prompt and an answer",  # good or bad
}


def kind_of(phase: str) -> str:
    """Of `KINDS`, what a phase learns from."""
    if phase in PAIRED | LABELLED:
        return "pair" if phase in PAIRED else "label"
    return "prompt" if phase in ASKING else "answer"


def serves(row: Row, kind: str) -> bool:
    """Whether a row has what is learned from."""
    if kind in ("pair", "label"):
        given = [text_of(answer).strip() for answer in (row.chosen, row.rejected) if answer is not None]
        return bool(row.prompt) and len({*given} - {""}) == (2 if kind == "pair" else max(1, len(given)))
    if kind == "prompt":
        return bool(row.prompt and row.prompt[-1]["content"].strip())
    return bool(row.chosen and text_of(row.chosen).strip())


def bits(row: Row) -> int:
    """The kinds that a row serves, a bit each."""
    return sum(1 << i for i, kind in enumerate(KINDS) if serves(row, kind))


def bit(phase: str) -> int:
    """The one of the kind that a phase learns from."""
    return 1 << list(KINDS).index(kind_of(phase))


def look(sources: Sequence[Source], phases: Sequence[str]) -> None:
    """Reads the first rows of each source, as many as are read in no time, and checks what they tell.

    Raises:
        ConfigError: names the source, the file and the row, and what would be right.
    """
    seen = []
    for source in sources:
        rows, are_all = source.first_rows(LOOKED_AT)
        seen.append(functools.reduce(int.__or__, map(bits, rows), 0) if are_all else ~0)
    check_served(sources, seen, phases)


def check_served(sources: Sequence[Source], seen: Sequence[int], phases: Sequence[str]) -> None:
    """Each phase has a row to learn from, and each source a phase that learns from it.

    Args:
        seen: `bits` of all rows of each source.

    Raises:
        ConfigError: names the phase, or the file.
    """
    wanted = {phase: f"{phase} needs {KINDS[kind_of(phase)]} in each row" for phase in phases}
    for phase, text in wanted.items():
        if not any(found & bit(phase) for found in seen):
            names = ", ".join(source.spec.name for source in sources)
            raise ConfigError(f"{sources[0].key}: {text}, and none in {names} has it")
    for source, found in zip(sources, seen, strict=True):
        if not any(found & bit(phase) for phase in phases):
            raise ConfigError(f"{source.key}: no row of {source.spec.name} is of use: {', '.join(wanted.values())}")


def gold_rule(sources: Sequence[Source]) -> GoldFn | None:
    """The true preference behind the data, where it is known."""
    embedded = all(source.spec.name in HH_MINI for source in sources)
    return hh_mini.gold_score if sources and embedded else None
