"""What the model talks to between its turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .reading import ConfigError
from .rollout import RolloutConfig


@dataclass
class EnvConfig:
    """The environment of each trajectory (docs/environments.md)."""

    # package.module:Class, package.module:function for one turn, or a built-in one of calculator, python, retrieve and
    # guess; null: a response is one turn, and nothing answers it
    fn: str | None = None
    args: dict[str, Any] = field(default_factory=dict)  # by name, what each is made with
    max_turns: int = 8  # of the model; each has rollout.max_new_tokens at most
    # of a trajectory behind its prompt, with what is observed; null: data.max_seq_len without data.max_prompt_len
    max_tokens: int | None = None
    timeout: float = 60.0  # seconds of a reset or step
    # what becomes of a trajectory whose environment raises, takes too long or gives what it must not: nothing is
    # learned from it, or its rewards are 0, or the run stops
    on_failure: Literal["drop", "zero", "stop"] = "drop"


def check_env(env: EnvConfig, rollout: RolloutConfig, phases: Sequence[str]) -> None:
    """Refuses what trajectories of several turns have no meaning for."""
    if env.fn is None:
        if env.args:
            raise ConfigError(f"env.args={env.args} belongs to env.fn, which is not set")
        return
    if "reward" in phases:
        raise ConfigError(f"phases has reward, whose model would score nothing: env.fn={env.fn} gives the rewards")
    if rollout.carries:
        raise ConfigError(f"rollout.tail=carry goes on with single turns: use rollout.tail=finish with env.fn={env.fn}")
    if env.max_tokens is not None and env.max_tokens < rollout.max_new_tokens:
        raise ConfigError(
            f"env.max_tokens={env.max_tokens} is less than one turn may have: rollout.max_new_tokens="
            f"{rollout.max_new_tokens}"
        )
