"""Numbers gone bad: what is said of them, how many updates in a row they cost, and when a run is to stop."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..config import GuardConfig
from ..signals import RunError

_LIMITED = {"kl/mean": "max_kl", "rollout/log_prob_gap": "max_log_prob_gap"}  # figures, and keys with their limits


class NotFinite(ArithmeticError):
    """A stage gave numbers that are not finite: no update of this iteration can be made with them."""


class BadNumbers(RunError):
    """Too many updates were skipped, or a figure is beyond its limit. The run is saved as it was before."""

    code = os.EX_DATAERR  # 65, of sysexits.h


@dataclass
class Skipped:
    """Updates that were not made, by role."""

    in_a_row: dict[str, int] = field(default_factory=dict)
    now: dict[str, int] = field(default_factory=dict)  # in this iteration


class Guard:
    """Counts. Every rank tells it the same and comes to the same conclusion.

    Args:
        speaks: whether this rank prints.
        skipped: the counts, which a resumed run goes on with.
    """

    def __init__(self, config: GuardConfig, speaks: bool, skipped: Skipped):
        self.config, self.speaks, self.skipped = config, speaks, skipped

    def stepped(self, role: str, problem: str | None = None) -> None:
        """A role was updated, or was not because of `problem`."""
        if problem is None:
            self.skipped.in_a_row[role] = 0
            return
        for counts in (self.skipped.in_a_row, self.skipped.now):
            counts[role] = counts.get(role, 0) + 1
        self._say(f"{problem}; update skipped, {self.skipped.in_a_row[role]} in a row")

    def look(self, figures: Mapping[str, float]) -> tuple[dict[str, float], str | None]:
        """At the end of an iteration: the updates that it cost, `skipped/ROLE`, and why to stop the run, if there is
        a reason."""
        reasons = [
            f"{role}: {count} updates in a row were skipped (guard.max_bad_steps={self.config.max_bad_steps})"
            for role, count in self.skipped.in_a_row.items()
            if count >= self.config.max_bad_steps
        ]
        for name, key in _LIMITED.items():
            limit = getattr(self.config, key)
            if limit is not None and figures.get(name, 0.0) > limit:
                beyond = f"{name} is {figures[name]:.4g}, above guard.{key}={limit:g}"
                self._say(f"warning: {beyond}")
                if self.config.stop:
                    reasons.append(beyond)
        skipped = {f"skipped/{role}": float(count) for role, count in self.skipped.now.items()}
        self.skipped.now.clear()
        return skipped, reasons[0] if reasons else None

    def _say(self, line: str) -> None:
        if self.speaks:
            print(line, flush=True)
