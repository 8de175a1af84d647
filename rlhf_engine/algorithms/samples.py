"""Responses of a policy to held-out prompts, for evaluations and reports."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..context import Context
from ..data.dataset import Example
from ..models.role import RoleModel
from ..rollout.generate import Response, rollout
from ..rollout.sampling import sample_keys

EVAL_ITERATION = 1 << 40  # no training iteration shares its noise
NUM_CARDS = 8


@dataclass
class Samples:
    """What one policy said to some prompts."""

    examples: list[Example]
    responses: list[Response]
    texts: list[str]
    golds: list[float] | None

    def cards(self) -> list[dict[str, object]]:
        """The first few dialogues as the report shows them."""
        return [
            {
                "prompt": example.prompt_text.strip(),
                "after": self.texts[i].strip(),
                "gold_after": self.golds[i] if self.golds is not None else None,
            }
            for i, example in enumerate(self.examples[:NUM_CARDS])
        ]


def sample_dialogues(ctx: Context, policy: RoleModel, examples: list[Example]) -> Samples:
    """One response to each prompt, with the same noise whichever policy speaks."""
    keys = sample_keys(ctx.config.seed, EVAL_ITERATION, torch.arange(len(examples)))
    prompts = [example.prompt for example in examples]
    tokenizer = ctx.tokenizer
    responses = rollout(policy, prompts, keys, ctx.config.rollout, tokenizer.end_ids, decode=tokenizer.decode)
    texts = [tokenizer.decode(response.tokens) for response in responses]
    golds = None
    if ctx.gold is not None:
        golds = [ctx.gold(e.prompt_text, text) for e, text in zip(examples, texts, strict=True)]
    return Samples(examples, responses, texts, golds)
