"""The baseline of ReMax (Li et al. 2023, arXiv:2310.10505): what the likeliest response to a prompt scores.

| stage        | role   | kind    | reads                 | writes                                              |
|--------------|--------|---------|-----------------------|-----------------------------------------------------|
| greedy       | policy | rollout | prompts, sample_ids   | greedy_tokens, greedy_lengths, greedy_finished, ... |
| score_greedy | reward | infer   | as score, of these    | baselines                                           |

Fields have a row for each prompt, whatever the number of its samples.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..context import Context
from ..models.role import RoleModel
from ..rollout.sampling import sample_keys
from ..schedule import Fields, Stage, Works
from .redraw import taken
from .responding import as_fields, respond

_FIELDS = ("tokens", "lengths", "response_mask", "finished")


def stages(score: Stage) -> list[Stage]:
    """The rows, with the stage that scores the samples."""
    prompts = [name for name in score.reads if name not in _FIELDS]
    made = tuple(f"greedy_{name}" for name in _FIELDS)

    def part(ctx: Context, x) -> SimpleNamespace:
        first = torch.arange(0, len(x.prompts), ctx.settings.samples_per_prompt)
        said = {name: getattr(x, f"greedy_{name}") for name in _FIELDS}
        return SimpleNamespace(is_part=True, **said, **{name: taken(getattr(x, name), first) for name in prompts})

    def by_function(ctx: Context, role: Any, x) -> Fields:
        found: Any = score.body(ctx, role, part(ctx, x))
        return {"baselines": found["scores"]}

    def by_model(ctx: Context, role: Any, x) -> Works:
        works: Any = score.body(ctx, role, part(ctx, x))
        return {"baselines": (yield from works)["scores"]}

    body = by_model if score.kind == "infer" else by_function
    return [
        Stage("greedy", "rollout", greedy, "policy", ("prompts", "sample_ids"), made),
        Stage("score_greedy", score.kind, body, score.role, (*prompts, *made), ("baselines",)),
    ]


def greedy(ctx: Context, policy: RoleModel, x) -> dict[str, Tensor]:
    """The likeliest token at a time, once for each prompt."""
    n = ctx.settings.samples_per_prompt
    prompts, keys = x.prompts[::n], sample_keys(ctx.config.seed, ctx.state.iteration, x.sample_ids[::n])
    found, _ = respond(ctx, policy, prompts, keys, replace(ctx.config.rollout, greedy=True))
    fields = as_fields(ctx, prompts, found)
    return {f"greedy_{name}": fields[name] for name in _FIELDS}
