"""What an algorithm is: stages, roles, rows, and an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ..config import OptimizerConfig
from ..context import Context
from ..experience import Experience
from ..hf.config import Head
from ..schedule import Stage


@dataclass(frozen=True)
class RoleSpec:
    """How a role is made. `weights` names (phase, role) checkpoints, and that of the first finished phase is taken;
    without any the role starts from the `base` of that name."""

    head: Head
    weights: tuple[tuple[str, str], ...] = ()
    optimizer: OptimizerConfig | None = None
    total_steps: int = 1
    base: Literal["policy", "reward", "teacher", "user"] = "policy"


@dataclass
class Evaluation:
    """Held-out figures, and dialogues for the report."""

    figures: dict[str, float]
    samples: list[dict[str, object]] = field(default_factory=list)


class Algorithm(Protocol):
    """A phase of training. Its module holds the stage table and the bodies."""

    name: str
    provided: frozenset[str]  # fields of the Experience that `batch` fills
    iterations: int
    eval_every: int
    save_every: int
    changes_at_end: bool  # whether the final evaluation changes a role

    @property
    def stages(self) -> Sequence[Stage]:
        """The table, in the order in which it runs."""
        ...

    def roles(self) -> dict[str, RoleSpec]:
        """How each role of the table is made."""
        ...

    def batch(self, ctx: Context) -> Experience:
        """The rows of iteration `ctx.state.iteration`; draws from the data set."""
        ...

    def evaluate(self, ctx: Context, final: bool) -> Evaluation:
        """Held-out figures; at the end of the phase (`final`) with dialogues."""
        ...
