"""The model that answers where an environment asks one (`user.path`), beside the policy on the same mesh.

Each replica has it whole, as it has the policy, and lets it speak to those of its own samples that ask, all at once.
Its noise belongs to the sample and to the question's number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..config import ConfigError
from ..context import Context
from ..models.role import RoleModel
from ..rollout.engine import Engine
from ..rollout.fold import whole_model
from ..rollout.generate import free_tokens
from ..rollout.sampling import Sampler, sample_keys
from .algorithm import RoleSpec

SPEC = RoleSpec("lm", base="user")


class User:
    """The model as long as a rollout takes, its role on the device. Made on all ranks at once.

    Args:
        role: whose weights they are.
    """

    def __init__(self, ctx: Context, role: RoleModel):
        assert ctx.user_tokenizer is not None
        config = ctx.config
        self.role, self.tokenizer, self.path = role, ctx.user_tokenizer, config.user.path
        self.config = replace(
            config.rollout,
            temperature=config.user.temperature,
            top_k=0,
            top_p=config.user.top_p,
            min_p=0.0,
            greedy=config.user.greedy,
            max_new_tokens=config.user.max_new_tokens,
            min_new_tokens=1,
            stop=[],
        )
        self.gpt = whole_model(role)
        # half of what the policy's cache leaves
        self.positions = free_tokens(role, (1 - config.rollout.cache_share) / 2)

    def prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """What it reads.

        Raises:
            ConfigError: its template refuses the dialogue, or its context has no room for it.
        """
        tokens, context = self.tokenizer.render_prompt(list(messages)), self.role.model.max_position_embeddings
        if not 0 < len(tokens) < context:
            raise ConfigError(f"a dialogue of {len(tokens)} tokens, and user.path={self.path} takes {context - 1}")
        return tokens

    def say(self, asked: Mapping[int, tuple[int, list[int]]]) -> dict[int, str]:
        """What it says, on all tensor parallel ranks alike.

        Args:
            asked: by the samples' numbers their noise's key and the tokens of `prompt`.

        Raises:
            FloatingPointError: a logit is not finite.
        """
        role, config = self.role, self.config
        keys, prompts = zip(*asked.values(), strict=True)
        limits = [min(config.max_new_tokens, role.model.max_position_embeddings - len(each)) for each in prompts]
        longest = max(len(each) + limit for each, limit in zip(prompts, limits, strict=True))
        sampler = Sampler(config, role.model.vocab_size or 0, self.tokenizer.end_ids, role.mesh.tp_group)
        engine = Engine(
            self.gpt, role.mesh, sampler, [tuple(each) for each in prompts], torch.tensor(keys), limits, list(asked),
            config.slots, max(longest, self.positions),
        )  # fmt: skip
        return {number: self.tokenizer.said(each.tokens) for number, each in zip(asked, engine.run(), strict=True)}


def key_of(key: int, number: int) -> int:
    """Of the noise of a sample's question."""
    return int(sample_keys(key, number, torch.zeros(1, dtype=torch.int64)))
