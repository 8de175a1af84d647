"""The mixture: which sources, in which shares, under which presets; read and checked row by row.

Neither torch nor a library that is not needed is imported, so that a bad file is refused early.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..config import PAIRED, SAMPLING, ConfigError, nearest
from . import hh_mini
from .files import read_rows
from .formats import Row, read_row

NUM_EVAL_ROWS = 256
GoldFn = Callable[[str, str], float]  # prompt text, response text -> score

HH_MINI = tuple(f"hh_mini/{subset}" for subset in hh_mini.SUBSETS)  # the embedded sources

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
        name: a file, a folder, a data set of the hub, or one of `HH_MINI`.
        system: preset that the policy reads in front of each dialogue.
        reward: preset that the reward model reads instead; None: it reads what the policy reads.
    """

    name: str
    weight: float = 1.0
    system: str = "default"
    reward: str | None = None


@dataclass
class Source:
    """One source of a mixture: rows to train on and rows held out, and its share of the mixture."""

    spec: Spec
    share: float
    train: list[Row]
    held_out: list[Row]


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


def read_sources(
    names: Sequence[str], num_rows: int, num_eval_rows: int | None, seed: int, key: str = "data.sources"
) -> list[Source]:
    """Every source of a mixture, read and checked.

    Args:
        names: as `parse_spec` reads them.
        num_rows: generated for all of `HH_MINI` together.
        num_eval_rows: held out of all sources together: the test split of `HH_MINI`, the last rows of others. May be 0.
            None: `NUM_EVAL_ROWS`, but of no file more than a tenth.

    Raises:
        ConfigError: names the source, the file and the row, and what would be right.
    """
    specs = [parse_spec(name, key) for name in names]
    if num_eval_rows is not None and 0 < num_eval_rows < len(specs):
        raise ConfigError(f"data.num_eval_rows={num_eval_rows}: each source needs one row held out at least")
    total = sum(spec.weight for spec in specs)
    sources = []
    for spec in specs:
        share = spec.weight / total
        wanted = NUM_EVAL_ROWS if num_eval_rows is None else num_eval_rows
        num_eval = max(1, round(wanted * share)) if wanted else 0
        if spec.name.split("/")[0] == "hh_mini":
            if spec.name not in HH_MINI:
                raise ConfigError(f"{key}={spec.name}: {nearest(spec.name, HH_MINI)}")
            train = _generate(spec.name, "train", max(1, round(num_rows * share)), seed)
            held_out = _generate(spec.name, "test", num_eval, seed)
        else:
            rows = [read_row(row, where) for where, row in read_rows(spec.name, key)]
            if num_eval_rows is None:
                num_eval = min(num_eval, max(1, len(rows) // 10))
            if len(rows) <= num_eval:
                raise ConfigError(
                    f"{key}: {spec.name} has {len(rows)} rows, no more than the {num_eval} held out of it: lower"
                    " data.num_eval_rows or add rows"
                )
            train, held_out = rows[: len(rows) - num_eval], rows[len(rows) - num_eval :]
        sources.append(Source(spec, share, train, held_out))
    return sources


def _generate(name: str, split: str, num_rows: int, seed: int) -> list[Row]:
    rows = hh_mini.pairs(name.removeprefix("hh_mini/"), split, num_rows, seed)
    return [read_row(row, f"{name}:{i}") for i, row in enumerate(rows, 1)]


def needs(phase: str) -> str:
    """What a phase learns from."""
    if phase in PAIRED:
        return "two different answers to one prompt"
    return "a prompt" if phase in SAMPLING else "an answer or text"


def serves(row: Row, phase: str) -> bool:
    """Whether a row has what a phase learns from."""
    if phase in PAIRED:
        answers = {(answer or "").strip() for answer in (row.chosen, row.rejected)}
        return bool(row.prompt) and len(answers - {""}) == 2
    if phase in SAMPLING:
        return bool(row.prompt and row.prompt[-1]["content"].strip())
    return bool(row.chosen and row.chosen.strip())


def check_sources(sources: Sequence[Source], phases: Sequence[str], key: str = "data.sources") -> None:
    """Each phase has a row to learn from, and each source a phase that learns from it.

    Raises:
        ConfigError: names the phase, or the file.
    """
    served = {phase: [any(serves(row, phase) for row in s.train) for s in sources] for phase in phases}
    wanted = {phase: f"{phase} needs {needs(phase)} in each row" for phase in phases}
    for phase, found in served.items():
        if not any(found):
            raise ConfigError(f"{key}: {wanted[phase]}, and none in {', '.join(s.spec.name for s in sources)} has it")
    for i, source in enumerate(sources):
        if not any(found[i] for found in served.values()):
            raise ConfigError(f"{key}: no row of {source.spec.name} is of use: {', '.join(wanted.values())}")


def gold_rule(sources: Sequence[Source]) -> GoldFn | None:
    """The true preference behind the data, where it is known."""
    embedded = all(source.spec.name in HH_MINI for source in sources)
    return hh_mini.gold_score if sources and embedded else None
