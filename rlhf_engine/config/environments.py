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

    # package.module:Class, package.module:function for one turn, or a built-in one of calculator, python, retrieve,
    # user and guess; null: a response is one turn, and nothing answers it
    fn: str | None = None
    args: dict[str, Any] = field(default_factory=dict)  # by name, what each is made with
    max_turns: int = 8  # of the model; each has rollout.max_new_tokens at most
    # of a trajectory behind its prompt, with what is observed; null: data.max_seq_len without data.max_prompt_len
    max_tokens: int | None = None
    timeout: float = 60.0  # seconds of a reset or step
    # what becomes of a trajectory whose environment raises, takes too long or gives what it must not: nothing is
    # learned from it, or its rewards are 0, or the run stops
    on_failure: Literal["drop", "zero", "stop"] = "drop"


@dataclass
class UserConfig:
    """The model that environments may ask, as env.fn=user does: a user, an opponent, a judge (docs/environments.md)."""

    # HF folder, or what tools/convert_hf made of one; of any size, with a tokenizer and a template of its own or else
    # the policy's; null: there is none
    path: str | None = None
    ignore_keys: list[str] = field(default_factory=list)  # of its config.json, read as if they were not there
    max_new_tokens: int = 64  # of what it says at once
    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = False


def check_env(env: EnvConfig, user: UserConfig, rollout: RolloutConfig, phases: Sequence[str]) -> None:
    """Refuses what trajectories of several turns have no meaning for."""
    if env.fn is None:
        if env.args:
            raise ConfigError(f"env.args={env.args} belongs to env.fn, which is not set")
        if user.path is not None:
            raise ConfigError(f"user.path={user.path} answers for an environment, and env.fn is not set: env.fn=user")
        return
    if env.fn == "user" and user.path is None:
        raise ConfigError("env.fn=user has no model to ask: user.path=DIR names an HF folder")
    if user.top_p > 1:
        raise ConfigError(f"user.top_p={user.top_p} must lie in (0, 1]")
    if "reward" in phases:
        raise ConfigError(f"phases has reward, whose model would score nothing: env.fn={env.fn} gives the rewards")
    if rollout.carries:
        raise ConfigError(f"rollout.tail=carry goes on with single turns: use rollout.tail=finish with env.fn={env.fn}")
    if env.max_tokens is not None and env.max_tokens < rollout.max_new_tokens:
        raise ConfigError(
            f"env.max_tokens={env.max_tokens} is less than one turn may have: rollout.max_new_tokens="
            f"{rollout.max_new_tokens}"
        )
