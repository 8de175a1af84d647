"""A run's tokenizer and its rows, made where they are not there yet: by the first process that asks, of any rank, and
before there are ranks where our own launcher starts them."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator
from pathlib import Path

from ..config import JOBS, RunConfig
from ..data.dataset import Dataset, build_datasets
from ..data.sources import Source
from ..data.tokenizer import Tokenizer, train_tokenizer
from ..surviving.places import Lock
from .preflight import Plan

_ROWS_TO_LEARN = 100_000  # of each source, for a tokenizer that is trained on them: it holds them in memory


def prepare(plan: Plan, is_checking: bool = True) -> dict[str, Dataset]:
    """The rows of a run, so that its ranks find them made.

    Raises:
        ConfigError, RunError: of `datasets_of`.
    """
    tokenizer = tokenizer_of(plan)
    if tokenizer.template.is_dated:
        tokenizer.date = plan.config.tokenizer.date or str(datetime.date.today())
    return datasets_of(plan, tokenizer, is_checking)


def datasets_of(plan: Plan, tokenizer: Tokenizer, is_checking: bool) -> dict[str, Dataset]:
    """What each phase draws from, and what is read beside, as "ptx" and "eval".

    Args:
        is_checking: reads what was prepared before once, to be sure of it.
    """
    phases = [phase for phase in plan.config.phases if phase not in JOBS]
    datasets = build_datasets(phases, plan.sources, tokenizer, plan.config, is_checking)
    for name, sources in plan.beside.items():
        datasets |= build_datasets([name], sources, tokenizer, plan.config, is_checking)
    return datasets


def tokenizer_of(plan: Plan) -> Tokenizer:
    """The one that there is, or one that is trained on the rows at first use."""
    return plan.tokenizer or _trained(plan.config, plan.sources)


def _trained(config: RunConfig, sources: list[Source]) -> Tokenizer:
    path = Path(config.output_dir) / "tokenizer" / "tokenizer.model"
    lock = Lock(path.with_name("lock"), "the training of the tokenizer")
    if lock.acquire_unless(path.is_file):
        try:
            train_tokenizer(_said(sources), path, config.tokenizer.vocab_size)
        finally:
            lock.release()
    return Tokenizer(str(path), config.tokenizer.template)


def _said(sources: list[Source]) -> Iterator[str]:
    """What is said in the rows, each text behind either speaker's name."""
    rows = itertools.chain.from_iterable(source.first_rows(_ROWS_TO_LEARN)[0] for source in sources)
    for row in rows:
        for text in (*(turn["content"] for turn in row.prompt), row.chosen, row.rejected):
            if text is not None:
                yield from (speaker + text for speaker in ("\n\nHuman: ", "\n\nAssistant: "))
