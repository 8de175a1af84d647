"""How responses are sampled."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from .reading import ConfigError, size


@dataclass
class RolloutConfig:
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0  # tokens below this share of the likeliest one's probability have none; 0: off
    greedy: bool = False
    max_new_tokens: int = size(64)
    min_new_tokens: int = 1  # the end token has no probability before
    # strings that end a response; it is cut behind the token in which the first of them completes. As a shell hands on
    # what stands in quotes, \n, \t and \\ in them are a line break, a tab and a backslash
    stop: list[str] = field(default_factory=list)
    slots: int = 256  # sequences decoded at once on one replica
    kv_tokens: int | None = None  # positions of the KV cache of one replica; null: what cache_share holds
    cache_share: float = 0.5  # of the free memory, for the KV cache: prefill and logits need some too
    # carry: an iteration learns from the prompts whose responses are done first, and what is unfinished then goes on in
    # the next one, with its weights (docs/algorithms.md)
    tail: Literal["finish", "carry"] = "finish"
    done_share: float = 0.8  # of the prompts under way, what is done and learned from when the others are carried
    # folder of recorded responses, as write_arrays=true leaves OUTPUT_DIR/PHASE/rollouts: iterations learn from them
    # instead of new ones (docs/environments.md)
    replay: str | None = None
    cuda_graphs: bool = True  # launch a decode step as one; false: to compare with

    @property
    def carries(self) -> bool:
        """Whether an iteration may leave responses to the next one."""
        return self.tail == "carry"

    @property
    def stop_texts(self) -> list[str]:
        """`stop`, its escapes read."""
        read = {"n": "\n", "t": "\t", "\\": "\\"}
        return [re.sub(r"\\([nt\\])", lambda found: read[found[1]], text) for text in self.stop]


def check_rollout(rollout: RolloutConfig) -> None:
    """Refuses settings that are out of their range."""
    if rollout.top_p > 1:
        raise ConfigError(f"rollout.top_p={rollout.top_p} must lie in (0, 1]")
    if rollout.cache_share >= 1:
        raise ConfigError(f"rollout.cache_share={rollout.cache_share} must lie in (0, 1): a share of free memory")
    if rollout.done_share > 1:
        raise ConfigError(f"rollout.done_share={rollout.done_share} must lie in (0, 1]: a share of what is under way")
    if rollout.replay is not None and rollout.carries:
        raise ConfigError(f"rollout.replay={rollout.replay} has whole responses: use rollout.tail=finish")
    if rollout.min_p > 1:
        raise ConfigError(f"rollout.min_p={rollout.min_p} must lie in [0, 1]")
    if "" in rollout.stop:
        raise ConfigError("rollout.stop holds an empty string, which every response has")
    if rollout.min_new_tokens > rollout.max_new_tokens:
        raise ConfigError(
            f"rollout.min_new_tokens={rollout.min_new_tokens} exceeds rollout.max_new_tokens={rollout.max_new_tokens}"
        )


def check_sampled_from(rollout: RolloutConfig) -> None:
    """Refuses what changes the distribution whose log-probs an algorithm needs."""
    if rollout.top_k or rollout.top_p < 1 or rollout.min_p or rollout.greedy:
        raise ConfigError(
            "training on samples needs the log-probs of the distribution sampled from: rollout.top_k=0,"
            " rollout.top_p=1, rollout.min_p=0 and rollout.greedy=false (rollout.temperature is free)"
        )
