"""Dynamic sampling (Yu et al. 2025, arXiv:2503.14476, eq. 11): further prompts in place of groups that tell nothing.

Rows of a table for one round, as often as `redraws` says; a round without such a group costs nothing:

| stage     | role   | kind    | reads                                     | writes                                  |
|-----------|--------|---------|-------------------------------------------|-----------------------------------------|
| redraw_i  | -      | local   | scores, response_mask, prompts, ...       | redrawn, what the phase starts from     |
| rollout_i | policy | rollout | as rollout, its fields, redrawn           | as rollout                              |
| score_i   | reward | infer   | as score, scores, redrawn                 | scores                                  |

It deviates from the paper in that a batch stays as large as it is: what tells nothing after the last round stays in it.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..context import Context
from ..schedule import Fields, Stage, Works
from . import responding, rollouts


def stages(rounds: int, rollout: Stage, score: Stage) -> list[Stage]:
    """The rows of so many rounds behind those two."""
    provided = tuple(sorted(rollouts.PROVIDED))
    table = []
    for i in range(1, rounds + 1):
        body = functools.partial(redraw, number=i)
        reads = ("scores", "response_mask", *provided)
        table.append(Stage(f"redraw_{i}", "local", body, None, reads, (*provided, "redrawn")))
        table += [again(rollout, i), again(score, i)]
    return table


def redraw(ctx: Context, _, x, number: int) -> Fields:
    """Further prompts in the place of those whose responses all have the same score."""
    is_equal = rollouts.equal_groups(x.scores, x.response_mask, ctx.settings.samples_per_prompt)
    ctx.metrics.record(f"rollout/redrawn_{number}", is_equal.sum())
    redrawn = is_equal.repeat_interleave(ctx.settings.samples_per_prompt)
    found: dict[str, Any] = {name: getattr(x, name) for name in rollouts.PROVIDED}
    if is_equal.any():
        rows, fresh = redrawn.nonzero().flatten(), rollouts.draw(ctx, int(is_equal.sum()))
        fresh.sample_ids = x.sample_ids[rows] + len(redrawn)  # noise and groups of their own
        found = {name: merged(value, getattr(fresh, name), rows) for name, value in found.items()}
    return {**found, "redrawn": redrawn}


def again(stage: Stage, number: int) -> Stage:
    """A stage once more, for the rows that were drawn anew; the others keep what they have."""

    def part(x) -> SimpleNamespace:
        rows = x.redrawn.nonzero().flatten()
        return SimpleNamespace(is_part=True, **{name: taken(getattr(x, name), rows) for name in stage.reads})

    def whole(x, found: Any) -> Fields:
        rows = x.redrawn.nonzero().flatten()
        return {name: merged(getattr(x, name), found[name], rows) for name in stage.writes}

    def run(ctx: Context, role: Any, x) -> Fields:
        if not x.redrawn.any():
            return {name: getattr(x, name) for name in stage.writes}
        found = whole(x, stage.body(ctx, role, part(x)))
        if stage.kind == "rollout":
            responding.record_responses(ctx, found["response_mask"], found["finished"])
        return found

    def infer(ctx: Context, role: Any, x) -> Works:
        if not x.redrawn.any():
            return {name: getattr(x, name) for name in stage.writes}
        works: Any = stage.body(ctx, role, part(x))
        return whole(x, (yield from works))

    reads = (*stage.reads, *(name for name in stage.writes if name not in stage.reads), "redrawn")
    body = infer if stage.kind == "infer" else run
    return Stage(f"{stage.name}_{number}", stage.kind, body, stage.role, reads, stage.writes)


def taken(value: Any, rows: Tensor) -> Any:
    """Rows of a field, which is a tensor or a list."""
    return value[rows] if isinstance(value, Tensor) else [value[i] for i in rows.tolist()]


def merged(value: Any, part: Any, rows: Tensor) -> Any:
    """A field with other rows in the place of some, right-padded to the wider of both."""
    if not isinstance(value, Tensor):
        found = list(value)
        for i, row in zip(rows.tolist(), part, strict=True):
            found[i] = row
        return found
    if value.dim() > 1:
        width = max(value.shape[1], part.shape[1])
        value, part = (F.pad(x, (0, width - x.shape[1])) for x in (value, part))
    return value.index_copy(0, rows, part)
