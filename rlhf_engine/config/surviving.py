"""What keeps a run alive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class CheckpointConfig:
    keep_last: int = 2  # the newest so many
    keep_every: int | None = None  # and those of iterations that are a multiple of it; null: none
    best: str | None = None  # a figure of the evaluations, as eval/pass@1: the one where it was best stays besides
    best_is: Literal["max", "min"] = "max"
    build_on: Literal["last", "best"] = "last"  # which of a finished phase is exported, and what later ones begin from
    async_save: bool = True  # written while training goes on, from a copy in host memory


@dataclass
class GuardConfig:
    """Numbers gone bad. An update whose loss or gradient is not finite is skipped and counted (`skipped/ROLE`), and so
    are all updates of an iteration in which a stage gave something that is not."""

    max_bad_steps: int = 5  # of one role in a row; then the run stops, saved
    max_kl: float | None = None  # nats per response (kl/mean) above which it is said; null: any
    max_log_prob_gap: float | None = None  # between sampler and trainer (rollout/log_prob_gap), likewise
    stop: bool = False  # and the run stops, saved


@dataclass
class TimeoutConfig:
    stage: float = 1800.0  # seconds; a stage, a save or an evaluation that takes longer ends the run, explained
