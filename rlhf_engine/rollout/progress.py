"""What a rollout gives, and tells while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass
class Response:
    """What was generated for one prompt: `tokens` with their `log_probs`; `finished` by its own end, or cut.

    `sampled` says which of the tokens the model has said, where it was answered between its turns; None: all. The
    log-probs of the others are 0.
    """

    tokens: list[int]
    log_probs: list[float]
    finished: bool
    sampled: list[bool] | None = None

    @property
    def said(self) -> list[bool]:
        """`sampled`, of each token."""
        return self.sampled or [True] * len(self.tokens)


@dataclass
class Progress:
    """How far a rollout is, on one replica while it runs and over all of them at its end."""

    num_rows: int = 0
    rows_done: int = 0
    preempted: int = 0  # times that a row stepped back
    away_seconds: float = 0.0  # with nothing to decode, as all rows waited for their answers
    tokens: int = 0  # generated
    seconds: float = 0.0  # of the slowest replica
    prefill_seconds: float = 0.0  # of all replicas, as are the sums below
    busy_seconds: float = 0.0
    rows_decoded: int = 0  # over all steps
    slots_offered: int = 0  # over all steps
    idle_share: float = 0.0  # of the replicas' time: waiting for the slowest

    @property
    def slot_occupancy(self) -> float:
        """Share of slots that decoded a sequence."""
        return self.rows_decoded / max(1, self.slots_offered)

    @property
    def prefill_share(self) -> float:
        """Share of the seconds that went into prompts."""
        return self.prefill_seconds / max(1e-9, self.busy_seconds)

    @classmethod
    def in_turn(cls, parts: Sequence[Progress]) -> Progress:
        """The progress of several rollouts, one after the other."""
        whole = cls(*(sum(getattr(part, name) for part in parts) for name in cls.__dataclass_fields__))
        whole.idle_share = sum(part.idle_share * part.seconds for part in parts) / max(1e-9, whole.seconds)
        return whole

    @classmethod
    def over(cls, parts: Sequence[Progress]) -> Progress:
        """The progress of all replicas together."""
        whole = cls(*(sum(getattr(part, name) for part in parts) for name in cls.__dataclass_fields__))
        whole.seconds = max(part.seconds for part in parts)
        whole.idle_share = 1 - whole.busy_seconds / max(1e-9, whole.seconds * len(parts))
        return whole


Report = Callable[[Progress], None]
Finished = Callable[[Mapping[int, Response]], None]
