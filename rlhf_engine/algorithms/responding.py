"""From prompts to responses: generation, what is recorded of it, and the scoring that begins meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..config import RolloutConfig
from ..context import Context
from ..models.role import RoleModel
from ..rewards.functions import Sample
from ..rollout.generate import rollout
from ..rollout.progress import Progress, Report, Response
from ..rollout.responses import Responses

Begin = Callable[[Mapping[int, Response]], None]  # is told of responses, by the numbers of their prompts


def respond(
    ctx: Context,
    policy: RoleModel,
    prompts: Sequence[list[int]],
    keys: Tensor,
    config: RolloutConfig,
    begin: Begin | None = None,
    begun: Sequence[Response] | None = None,
    limits: Sequence[int] | None = None,
) -> tuple[Responses, Progress]:
    """A response to every prompt, and how that went.

    Args:
        keys: of their noise.
        begin: is told of responses as they are finished.
        begun, limits: as `rollout` has them.
    """
    progress, lines = Progress(), progress_lines(ctx)

    def report(now: Progress) -> None:
        nonlocal progress
        progress = now
        lines(now)

    responses = rollout(
        policy,
        prompts,
        keys,
        config,
        ctx.tokenizer.end_ids,
        decode=ctx.tokenizer.decode,
        limits=limits,
        begun=begun,
        report=report,
        finished=begin,
    )
    if begin is not None:
        begin(dict(enumerate(responses)))
    return responses, progress


def progress_lines(ctx: Context) -> Report:
    """Prints how far a rollout is."""

    def report(now: Progress) -> None:
        if ctx.mesh.is_main and now.rows_done < now.num_rows:
            place = f"{ctx.phase} {ctx.state.iteration + 1}/{ctx.settings.iterations}"
            speed = f"{now.tokens / now.seconds:.4g} tokens/s  {now.slot_occupancy:.0%} of slots busy"
            print(f"{place}  rollout {now.rows_done}/{now.num_rows}  {speed}", flush=True)

    return report


def as_fields(ctx: Context, prompts: Sequence[list[int]], responses: Responses) -> dict[str, Tensor]:
    """What an Experience has of responses."""
    tokens, lengths, response_mask = responses.behind(prompts, ctx.mesh.tp)
    said = responses.log_probs[responses.sampled]
    return {
        "tokens": tokens,
        "lengths": lengths,
        "response_mask": response_mask,
        "finished": responses.finished,
        "sampler_log_probs": torch.zeros(tokens.shape).masked_scatter(response_mask, said),
    }


def record_rollout(ctx: Context, fields: Mapping[str, Tensor], progress: Progress, seconds: float) -> None:
    """What a rollout has given, and how it went."""
    record_responses(ctx, fields["response_mask"], fields["finished"])
    ctx.metrics.record("throughput/slot_occupancy", progress.slot_occupancy)
    ctx.metrics.record("throughput/prefill_share", progress.prefill_share)
    ctx.metrics.record("idle/rollout", progress.idle_share)
    ctx.metrics.record("rollout/preempted", progress.preempted)
    ctx.metrics.record("throughput/generated_tokens_per_second", progress.tokens / seconds)


def record_responses(ctx: Context, response_mask: Tensor, finished: Tensor) -> None:
    """How long they are, and how many came to their end."""
    ctx.metrics.record("rollout/response_length", response_mask.sum() / len(response_mask))
    ctx.metrics.record("rollout/finished", finished.float().mean())


def scoring(ctx: Context, x) -> Begin | None:
    """What has responses scored as they are finished, each once; None where no function can begin before all are."""
    rewards, begun = ctx.rewards, set[int]()
    if rewards is None or not (ctx.settings.is_scored and ctx.mesh.is_main and rewards.apart):
        return None
    rewards.forget()

    def begin(found: Mapping[int, Response]) -> None:
        new = [i for i in found if i not in begun]
        begun.update(new)
        rewards.start([as_sample(ctx, x.prompts[i], found[i].tokens, x.row_fields[i]) for i in new])

    return begin


def as_sample(ctx: Context, prompt: Sequence[int], response: Sequence[int], fields: str) -> Sample:
    """As reward functions see it."""
    decode = ctx.tokenizer.decode
    return Sample(decode(prompt), decode(response), tuple(prompt), tuple(response), fields)
