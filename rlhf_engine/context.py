"""What a stage body may know besides its fields."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .config import Base, GuardConfig, ModelConfig, RunConfig
from .data.dataset import Dataset, Example
from .data.sources import GoldFn
from .data.tokenizer import Tokenizer
from .environments.pool import Environments
from .experience import Experience
from .mesh import ParallelMesh
from .models.role import RoleModel
from .observing.metrics import Metrics
from .observing.trace import Trace
from .rewards.scoring import Rewards
from .signals import Stop, noted
from .surviving.guard import Guard, Skipped


@dataclass
class RunningMoments:
    """Count, mean and variance of all scores so far (Chan et al. 1979)."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, values: Sequence[float]) -> None:
        """Adds the values, one after the other."""
        for value in values:
            self.count += 1
            delta = value - self.mean
            self.mean += delta / self.count
            self.m2 += delta * (value - self.mean)

    @property
    def std(self) -> float:
        """Of all values so far; 1 while there are fewer than two."""
        return (self.m2 / self.count) ** 0.5 if self.count > 1 else 1.0


@dataclass
class TrainState:
    """Everything that a resumed run needs besides weights and optimizers. Noise and order are functions of the
    seed and these counters, so there is no generator state to keep."""

    iteration: int = 0  # iterations done
    position: int = 0  # rows drawn from the data set
    kl_coef: float = 0.0
    log_prob_gap: float | None = None  # between sampler and trainer, when it was last measured
    scores: RunningMoments = field(default_factory=RunningMoments)
    skipped: Skipped = field(default_factory=Skipped)
    carried: Experience | None = None  # responses that the next iteration goes on with (algorithms/carry.py)
    tail: int | None = None  # new tokens at which enough of the last iteration's responses were done
    # of an iteration that was left between two of its stages or updates
    experience: Experience | None = None
    metrics: dict[str, Any] | None = None  # Metrics.held
    ending: dict[str, float] | None = None  # figures of the final evaluation, where it has changed a role
    data: str | None = None  # digest of the rows that it is made from

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainState:
        """The inverse of `to_dict`."""
        nested = {"scores": RunningMoments, "skipped": Skipped, "experience": Experience, "carried": Experience}
        made = {k: kind(**values[k]) for k, kind in nested.items() if values.get(k) is not None}
        return cls(**{**values, **made})


@dataclass
class Context:
    """The surroundings of a stage body."""

    config: RunConfig
    bases: Mapping[str, Base]
    mesh: ParallelMesh
    tokenizer: Tokenizer
    datasets: Mapping[str, Dataset]  # by phase, and "ptx"
    gold: GoldFn | None
    rewards: Rewards | None  # functions that score, where no reward model does
    user_tokenizer: Tokenizer | None = None  # of the model that environments ask
    build: Callable[[str, Any], RoleModel] = field(init=False, repr=False)  # makes a role of a name and its RoleSpec
    phase: str = ""  # that runs, and the name of its section of the configuration
    roles: dict[str, RoleModel] = field(default_factory=dict)
    finished: dict[str, Path | None] = field(default_factory=dict)  # last checkpoints of phases, as far as looked at
    state: TrainState = field(default_factory=TrainState)
    metrics: Metrics = field(default_factory=Metrics)
    trace: Trace = field(default_factory=Trace)
    watch: Callable[[str], AbstractContextManager] = contextlib.nullcontext  # a stage, given only so much time
    has_told_rewriting: bool = False  # it was looked whether the template writes earlier turns otherwise
    guard: Guard = field(default_factory=lambda: Guard(GuardConfig(), False, Skipped()))

    @functools.cached_property
    def environments(self) -> Environments:
        """Those that answer this rank's samples."""
        return Environments(self.config.env)

    @property
    def model(self) -> ModelConfig:
        """The policy's."""
        return self.bases["policy"].model

    @property
    def settings(self) -> Any:
        """The section of the phase that runs."""
        return getattr(self.config, self.phase)

    def stop_if_asked(self) -> None:
        """Every rank calls it at the same point.

        Raises:
            Stop: a rank has noted a signal.
        """
        if self.mesh.any_rank(torch.tensor([noted()], device=self.mesh.device))[0]:
            raise Stop

    def draw(self, phase: str, count: int) -> list[Example]:
        """The next rows of a phase's data."""
        examples = self.datasets[phase].batch(self.state.position, count)
        self.state.position += count
        return examples
