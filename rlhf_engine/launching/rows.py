"""A run's tokenizer and its rows, made where they are not there yet: by the first process that asks, of any rank, and
before there are ranks where our own launcher starts them."""

from __future__ import annotations

import datetime

from ..config import JOBS
from ..data.dataset import Dataset, build_datasets
from ..data.tokenizer import Tokenizer
from ..data.trained import trained_tokenizer
from .preflight import Plan


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
    return plan.tokenizer or trained_tokenizer(plan.config, plan.sources)
