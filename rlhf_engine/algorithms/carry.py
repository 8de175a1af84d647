"""Partial rollouts: an iteration learns from the prompts that are done first, and the next one goes on with the others
(Kimi Team 2025, arXiv:2501.12599, section 2.6.2; Zhou et al. 2025, arXiv:2509.18521, APRIL).

| stage   | role   | kind    | reads                    | writes                                        |
|---------|--------|---------|--------------------------|-----------------------------------------------|
| rollout | policy | rollout | what a phase starts from | the same of other prompts, as rollout; older  |

So many prompts are under way that those which an iteration learns from are `rollout.done_share` of them. Each response
gets so many new tokens at most, and more where too few prompts are done then, which they are with their last response.
Of those that are done the first drawn are learned from; the others are carried, with tokens, log-probs and noise.

How many new tokens is what would just have sufficed in the last iteration: no mesh, no slots and no clock can enter.

The loss takes ratios to the policy before the iteration's updates at all tokens, and what another policy has drawn by
its importance weight (Hilton et al. 2021, arXiv:2110.00641, the decoupled objective).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from ..context import Context
from ..experience import Experience, spans
from ..models.role import RoleModel
from ..rollout.progress import Progress, Response
from ..rollout.responses import Responses
from ..rollout.sampling import sample_keys
from ..schedule import Fields
from .responding import Begin, as_fields, record_rollout, respond, scoring

_FIRST_SHARE = 0.25  # of rollout.max_new_tokens, what responses get where there was no iteration before
_GROWTH = 1.25  # of what they get, where too few are done: those that go on are computed again, so rounds are to be few
_OF_PROMPTS = ("prompts", "reward_prompts", "row_fields")


def num_new_prompts(ctx: Context) -> int:
    """That an iteration draws, beside those that are carried."""
    carried = 0 if ctx.state.carried is None else len(ctx.state.carried.prompts or ())
    return max(0, ctx.settings.prompts_under_way(ctx.config.rollout) - carried // ctx.settings.samples_per_prompt)


def rollout(ctx: Context, policy: RoleModel, x) -> Fields:
    """Responses to as many prompts as an iteration learns from; the others are carried."""
    started, size, wanted = time.perf_counter(), ctx.settings.samples_per_prompt, ctx.settings.prompts_per_iteration
    x, begun = under_way(ctx, x)
    responses, progress = until_enough(ctx, policy, x, begun)
    done = new_tokens(ctx, begun, responses)
    ctx.state.tail = sorted(done.values())[wanted - 1] or ctx.state.tail
    taken = [prompt * size + i for prompt in list(done)[:wanted] for i in range(size)]
    left = sorted({*range(len(responses))} - {*taken})
    ctx.state.carried = Experience(**_part(ctx, x, responses, left), noise_keys=x.noise_keys[left]) if left else None
    fields = _part(ctx, x, responses, taken)
    starts = torch.tensor([len(prompt) for prompt in fields["prompts"]])
    counts = torch.tensor([len(begun[i].tokens) for i in taken])
    fields["older"] = spans(starts, starts + counts, fields["tokens"].shape[1])
    record_rollout(ctx, fields, progress, time.perf_counter() - started)
    ctx.metrics.record("rollout/carried", len(left))
    ctx.metrics.record("rollout/older_tokens", fields["older"].sum() / fields["response_mask"].sum())
    return {**fields, "sample_ids": torch.arange(len(taken))}


def under_way(ctx: Context, x) -> tuple[SimpleNamespace, list[Response]]:
    """What is carried and, behind it, what was drawn now, with noise of its own; and what there is of responses."""
    rows = {name: list(getattr(x, name)) for name in _OF_PROMPTS}
    keys = sample_keys(ctx.config.seed, ctx.state.iteration, x.sample_ids)
    begun = [Response([], [], False)] * len(x.prompts)
    old: Any = ctx.state.carried
    if old is not None:
        fields = (old.prompts, old.lengths, old.tokens, old.sampler_log_probs, old.finished)
        each = zip(*(field if isinstance(field, list) else field.tolist() for field in fields), strict=True)
        begun = [Response(t[len(p) : n], found[len(p) : n], ended) for p, n, t, found, ended in each] + begun
        rows, keys = {name: getattr(old, name) + rows[name] for name in rows}, torch.cat([old.noise_keys, keys])
    return SimpleNamespace(**rows, noise_keys=keys), begun


def until_enough(ctx: Context, policy: RoleModel, x, begun: Sequence[Response]) -> tuple[list[Response], Progress]:
    """Responses that have got the same number of new tokens at most, with which enough prompts are done."""
    config, wanted, parts = ctx.config.rollout, ctx.settings.prompts_per_iteration, list[Progress]()
    most = ctx.state.tail or math.ceil(_FIRST_SHARE * config.max_new_tokens)
    if wanted * ctx.settings.samples_per_prompt == len(begun):  # all of them are
        most = config.max_new_tokens
    begin, responses = scoring(ctx, x), list(begun)
    while True:
        limits = [min(config.max_new_tokens, len(response.tokens) + most) for response in begun]
        responses, progress = go_on(ctx, policy, x, responses, limits, begin)
        parts.append(progress)
        if len(new_tokens(ctx, begun, responses)) >= wanted:
            ctx.metrics.record("rollout/rounds", len(parts))
            return responses, Progress.in_turn(parts)
        most = math.ceil(_GROWTH * most)


def go_on(
    ctx: Context, policy: RoleModel, x, responses: Sequence[Response], limits: Sequence[int], begin: Begin | None
) -> tuple[list[Response], Progress]:
    """Responses with as many tokens as these limits allow, or whole; what is done begins to be scored."""
    rows = [i for i, response in enumerate(responses) if not response.finished and len(response.tokens) < limits[i]]
    if not rows:
        return list(responses), Progress()

    def tell(found: Mapping[int, Response]) -> None:
        assert begin is not None
        begin({rows[i]: response for i, response in found.items() if is_done(ctx, response)})

    prompts, begun, most = [x.prompts[i] for i in rows], [responses[i] for i in rows], [limits[i] for i in rows]
    told = begin and tell
    found, progress = respond(ctx, policy, prompts, x.noise_keys[rows], ctx.config.rollout, told, begun, most)
    return list((dict(enumerate(responses)) | dict(zip(rows, found, strict=True))).values()), progress


def new_tokens(ctx: Context, begun: Sequence[Response], responses: Sequence[Response]) -> dict[int, int]:
    """Of the prompts that are done, by their numbers: the most tokens that one of their responses has got."""
    size, found = ctx.settings.samples_per_prompt, {}
    for prompt in range(len(responses) // size):
        rows = range(prompt * size, (prompt + 1) * size)
        if all(is_done(ctx, responses[i]) for i in rows):
            found[prompt] = max(len(responses[i].tokens) - len(begun[i].tokens) for i in rows)
    return found


def is_done(ctx: Context, response: Response) -> bool:
    """By its end, or as long as it may be."""
    return response.finished or len(response.tokens) >= ctx.config.rollout.max_new_tokens


def _part(ctx: Context, x, responses: Sequence[Response], rows: Sequence[int]) -> dict[str, Any]:
    """Some of the rows, as fields."""
    prompts = {name: [getattr(x, name)[i] for i in rows] for name in _OF_PROMPTS}
    return {**prompts, **as_fields(ctx, prompts["prompts"], Responses.of([responses[i] for i in rows]))}
