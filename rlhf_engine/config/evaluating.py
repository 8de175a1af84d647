"""What a policy is asked while it trains, and by which figure a checkpoint is the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .reading import ConfigError, nearest
from .surviving import CheckpointConfig


@dataclass
class EvalConfig:
    """Prompts that nothing is learned from, answered several times and scored by reward.fns, at each evaluation of a
    phase that trains a policy (docs/evaluation.md)."""

    samples: int = 0  # responses to each prompt; 0: off
    k: list[int] = field(default_factory=lambda: [1])  # eval/pass@k for each of them
    sources: list[str] = field(default_factory=list)  # as data.sources, all rows; none: those held out of data.sources
    prompts: int | None = None  # of each source the first so many; null: all
    passed_at: float = 1.0  # a response has passed whose score is at least this
    temperature: float | None = None  # null: rollout's
    top_p: float | None = None  # likewise

    @property
    def figures(self) -> list[str]:
        """Names of what is measured, of all sources together."""
        return [*(f"eval/pass@{k}" for k in self.k), f"eval/avg@{self.samples}"] if self.samples else []


def check_eval(config: EvalConfig, trained_on: Sequence[str], is_scored: bool) -> None:
    """Refuses an evaluation that would measure nothing, or something else.

    Args:
        trained_on: data.sources.
        is_scored: by reward.fns or env.fn.
    """
    if not config.samples:
        if config.sources:
            raise ConfigError(f"eval.sources={config.sources} is answered with eval.samples=N, the responses to each")
        return
    if not is_scored:
        raise ConfigError(
            f"eval.samples={config.samples} needs reward.fns or env.fn, whose scores say which response has passed"
        )
    if wrong := [k for k in config.k if not 1 <= k <= config.samples]:
        raise ConfigError(f"eval.k={wrong[0]} must lie between 1 and eval.samples={config.samples}")
    if config.top_p is not None and config.top_p > 1:
        raise ConfigError(f"eval.top_p={config.top_p} must lie in (0, 1]")
    plain = {name.partition("::")[0].partition("[")[0] for name in trained_on}
    if both := [name for name in config.sources if "/" in name and name.partition("[")[0] in plain]:
        raise ConfigError(f"eval.sources={both[0]} is one of data.sources: a set that is trained on tells nothing")


def check_best(config: CheckpointConfig, figures: Mapping[str, str | None]) -> None:
    """Refuses a figure by which no checkpoint can be the best.

    Args:
        figures: of the run's evaluations, each with the key to set for it to be measured while a phase trains.
    """
    if config.best is None:
        if config.build_on == "best":
            raise ConfigError("checkpoint.build_on=best needs checkpoint.best=FIGURE, as eval/pass@1")
        return
    if config.best not in figures:
        raise ConfigError(
            f"checkpoint.best={config.best}: {nearest(config.best, figures)}"
            if figures
            else f"checkpoint.best={config.best}: no phase of this run measures it (eval.samples=N)"
        )
    if key := figures[config.best]:
        raise ConfigError(f"checkpoint.best={config.best} is measured at the end alone: set {key}")
