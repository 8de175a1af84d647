"""Stages of every algorithm that samples: rollouts, log-probs of them, scores, and the minibatches of their updates.

Settings are those of the phase that runs (`ctx.settings`), a `SamplingConfig`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_kernels import importance_weights

from ..config import RunConfig, SamplingConfig
from ..context import Context
from ..experience import Experience, last_of, last_turns, pad_rows, reach
from ..models.role import RoleModel
from ..models.work import Batch, Work
from ..rollout.sampling import sample_keys
from ..schedule import Stage, Works
from . import carry, replay, turns, user
from .algorithm import RoleSpec
from .heads import choose, last_scores, policy_log_probs, score_batch
from .responding import as_fields, as_sample, record_rollout, respond, scoring

SEQUENCE = ("tokens", "lengths", "response_mask")
BEFORE = (("sft", "policy"),)  # the weights that policy and reference start from
PROVIDED = frozenset({"prompts", "reward_prompts", "row_fields", "sample_ids"})  # what `draw` fills

# What sampler and trainer may differ by, nats, for one's log-probs to stand for the other's, where nothing is said: the
# rounding of hidden states by kernels that add up in different orders.
_MAX_LOG_PROB_GAP = {torch.float32: 1e-4, torch.bfloat16: 0.5}


def stages(config: RunConfig, reference: bool = True) -> list[Stage]:
    """Rows of a table: from prompts to responses, their log-probs and scores; reward functions and environments take
    the place of the reward model's row, and `carry.rollout` or `turns.rollout`, which read and write more, that of the
    rollout.

    Args:
        reference: whether there is one.
    """
    answered = ("prompts", "row_fields", "tokens", "lengths", "response_mask")
    by_function = Stage("score", "local", score_by_functions, None, answered, ("scores",))
    by_model = Stage("score", "infer", score, "reward", ("prompts", "reward_prompts", "tokens", "lengths"), ("scores",))
    made = (*SEQUENCE, "finished", "sampler_log_probs")
    drawn = Stage("rollout", "rollout", rollout, "policy", ("prompts", "row_fields", "sample_ids"), made)
    if is_carrying := config.rollout.carries:
        provided = tuple(sorted(PROVIDED))
        drawn = Stage("rollout", "rollout", carry.rollout, "policy", provided, (*provided, *made, "older"))
    if config.env.fn is not None:
        written = ("prompts", "reward_prompts", *made, "failed", "turn_rewards")
        beside = "user" if config.user.path is not None else None
        drawn = Stage("rollout", "rollout", turns.rollout, "policy", ("row_fields", "sample_ids"), written, beside)
        read = (*answered, "failed", "turn_rewards") if config.reward.fns else ("turn_rewards",)
        by_function = Stage("score", "local", score_by_environments, None, read, ("scores",))
    if config.rollout.replay is not None:
        drawn = replace(drawn, body=replay.rollout, reads=("prompts", "reward_prompts", "row_fields"))
    measured = (*SEQUENCE, "sampler_log_probs", *(["older"] if is_carrying else []))
    by_reference = Stage("ref_log_probs", "infer", ref_log_probs, "reference", SEQUENCE, ("ref_log_probs",))
    return [
        drawn,
        Stage("log_probs", "infer", log_probs, "policy", measured, ("log_probs",)),
        *([by_reference] if reference else []),
        by_model if scorer(config) is not None else by_function,
    ]


def importance_stages(config: RunConfig, settings: SamplingConfig) -> list[Stage]:
    """The row that weights what the sampler has drawn, where that is asked for."""
    older = ["older"] if config.rollout.carries else []
    reads = ("log_probs", "sampler_log_probs", "response_mask", *older)
    row = Stage("importance", "local", importance, None, reads, ("importance",))
    return [row] if settings.importance != "none" else []


def scorer(config: RunConfig) -> RoleSpec | None:
    """The reward model, from the reward phase or `reward.path`; None with reward functions or environments."""
    if config.reward.fns or config.env.fn is not None:
        return None
    return RoleSpec("scalar", (("reward", "reward"),), base="reward")


def others(config: RunConfig, settings: SamplingConfig) -> dict[str, RoleSpec]:
    """Roles that are neither trained nor compared with: the reward model, and the one that environments ask."""
    found = {"reward": scorer(config) if settings.is_scored else None, "user": user.SPEC if config.user.path else None}
    return {name: spec for name, spec in found.items() if spec is not None}


def draw(ctx: Context, count: int | None = None) -> Experience:
    """So many prompts, by default those of an iteration, each as often as it is sampled."""
    drawn = ctx.draw(ctx.phase, ctx.settings.prompts_per_iteration if count is None else count)
    size = ctx.settings.samples_per_prompt
    examples = [example for example in drawn for _ in range(size)]
    return Experience(
        prompts=[example.prompt for example in examples],
        reward_prompts=[example.reward_prompt for example in examples],
        row_fields=turns.row_fields(ctx, examples, ctx.state.iteration, size),
        sample_ids=torch.arange(len(examples)),
    )


def rollout(ctx: Context, policy: RoleModel, x) -> dict[str, Tensor]:
    """Samples a response to every prompt from the training weights; functions that can begin to score, do."""
    started = time.perf_counter()
    keys = sample_keys(ctx.config.seed, ctx.state.iteration, x.sample_ids)
    found, progress = respond(ctx, policy, x.prompts, keys, ctx.config.rollout, scoring(ctx, x))
    fields = as_fields(ctx, x.prompts, found)
    record_rollout(ctx, fields, progress, time.perf_counter() - started)
    return fields


def log_probs(ctx: Context, policy: RoleModel, x) -> Works:
    """The policy's own view of its rollout: by the forward that training uses, or as the sampler had it."""
    config, state = ctx.settings, ctx.state
    last, is_due = state.log_prob_gap, state.iteration % config.measure_gap_every == 0
    most = config.max_log_prob_gap if config.max_log_prob_gap is not None else _MAX_LOG_PROB_GAP[policy.dtype]
    if config.old_log_probs == "sampler" and not is_due and last is not None and last <= most:
        return {"log_probs": x.sampler_log_probs}
    both = yield log_probs_work(ctx, policy, x)
    log_probs, entropy = both.unbind(1)
    gaps = log_probs - x.sampler_log_probs
    if hasattr(x, "older"):  # which other weights have drawn
        gaps = gaps.masked_fill(x.older, 0.0)
    state.log_prob_gap = float(gaps.abs().max())
    ctx.metrics.record("rollout/log_prob_gap", state.log_prob_gap)
    if config.old_log_probs == "sampler" and ctx.mesh.is_main:
        suffices = state.log_prob_gap <= most
        print(
            f"{ctx.phase} {state.iteration + 1}/{config.iterations}  log-probs of sampler and trainer differ by"
            f" {state.log_prob_gap:.1e} at most: the {'sampler' if suffices else 'trainer'}'s are taken",
            flush=True,
        )
    ctx.metrics.mean("policy/entropy", entropy, x.response_mask)
    return {"log_probs": log_probs}


def ref_log_probs(ctx: Context, reference: RoleModel, x) -> Works:
    """The frozen reference's view of it."""
    both = yield log_probs_work(ctx, reference, x)
    return {"ref_log_probs": both[:, 0]}


def score(ctx: Context, reward: RoleModel, x) -> Works:
    """The reward model's score of each response."""
    scores = yield scores_work(ctx, reward, x)
    return {"scores": scores}


def score_by_functions(ctx: Context, _, x) -> dict[str, Tensor]:
    """The same from Python functions."""
    scores, means = function_scores(ctx, x)
    for label, mean in means.items() if not hasattr(x, "is_part") else ():
        ctx.metrics.record(f"score/{label}", mean)
    return {"scores": scores}


def score_by_environments(ctx: Context, _, x) -> dict[str, Tensor]:
    """What the environments have rewarded, and functions, if there are some, for the last turn."""
    scores = x.turn_rewards.double().sum(1).float()
    return {"scores": scores + score_by_functions(ctx, None, x)["scores"] if ctx.rewards is not None else scores}


def function_scores(ctx: Context, x) -> tuple[Tensor, dict[str, float]]:
    """Scores `(B,)` of responses, each the last turn of its row, and the mean of each function, which the main rank
    calls; 0 where an environment has failed."""
    scores, means, failed = None, dict[str, float](), getattr(x, "failed", None)
    if ctx.mesh.is_main:
        assert ctx.rewards is not None
        starts = last_turns(x.response_mask, x.lengths).tolist()
        rows = zip(x.prompts, x.tokens.tolist(), starts, x.lengths.tolist(), x.row_fields, strict=True)
        samples = [as_sample(ctx, p, row[i:n], fields) for p, row, i, n, fields in rows]
        of = list(range(len(samples))) if failed is None else (~failed).nonzero().flatten().tolist()
        found, means = ctx.rewards([samples[i] for i in of]) if of else ([], means)
        scores = torch.zeros(len(samples))
        scores[of] = torch.tensor(found, dtype=torch.float32)
    return ctx.mesh.tensor_from_main(scores, [len(x.prompts)], torch.float32), ctx.mesh.from_main(means)


def importance(ctx: Context, _, x) -> dict[str, Tensor]:
    """How much each token counts, by how probable it is to the trainer and was to the sampler."""
    config, both = ctx.settings, (x.log_probs, x.sampler_log_probs, x.response_mask)
    found = importance_weights(
        *both, config.importance, of=config.importance_of, limit=config.importance_limit, low=config.importance_low
    )
    plain = importance_weights(*both, of=config.importance_of, limit=torch.inf)
    ctx.metrics.mean("importance/mean", found, x.response_mask)
    ctx.metrics.mean("importance/cut", (found != plain).float(), x.response_mask)
    if hasattr(x, "older"):
        ctx.metrics.mean("importance/older", found, x.older)
    return {"importance": found}


def minibatches(ctx: Context, x, *fields: str) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Minibatches of all epochs, numbered: slices of a permutation that depends on seed, iteration and epoch."""
    config = ctx.settings
    num_rows = len(x.tokens)
    size = num_rows // config.num_minibatches
    for epoch in range(config.epochs):
        seed = (ctx.config.seed * 1_000_003 + ctx.state.iteration) * 1_009 + epoch
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
        for i, rows in enumerate(order.split(size)):
            batch = {name: getattr(x, name)[rows] for name in fields}
            yield epoch * config.num_minibatches + i, {"samples": rows, **batch}


def sampled(ctx: Context, role: RoleModel) -> Callable[[Batch], Batch]:
    """What prepares a micro-batch for the log-probs of its response tokens under the sampler's distribution."""
    ban = (ctx.tokenizer.end_ids, ctx.config.rollout.min_new_tokens)
    return functools.partial(choose, role, mask="response_mask", ban=ban)


def log_probs_work(ctx: Context, role: RoleModel, x) -> Work:
    """Log-probs and entropy stacked, `(B, 2, T)`."""

    def fn(hidden: Tensor, batch: Batch) -> Tensor:
        return torch.stack(policy_log_probs(role, hidden, batch, ctx.config.rollout.temperature), 1)

    batch = {"tokens": x.tokens, "lengths": x.lengths, "response_mask": x.response_mask}
    return Work(role, batch, fn, ctx.settings.micro_batch_size, prepare=sampled(ctx, role))


def scores_work(ctx: Context, reward: RoleModel, x) -> Work:
    """One score a row, `(B,)`, of the responses behind the prompts that the reward model reads."""
    rows = zip(x.reward_prompts, x.prompts, x.tokens.tolist(), x.lengths.tolist(), strict=True)
    tokens, lengths = pad_rows([own + row[len(prompt) : n] for own, prompt, row, n in rows], ctx.mesh.tp)
    return Work(reward, score_batch(reward, tokens, lengths), last_scores, ctx.settings.micro_batch_size)


def shape_scores(ctx: Context, scores: Tensor, finished: Tensor, is_new: bool = True) -> Tensor:
    """Scores as they enter the reward: clipped, standardised, and less for a response that was cut.

    Args:
        is_new: they count among those that scores are standardised by.
    """
    config, seen = ctx.settings, ctx.state.scores
    if config.score_min is not None or config.score_max is not None:
        scores = scores.clamp(config.score_min, config.score_max)
    if is_new:
        seen.update(scores.tolist())
    if config.score_center:
        scores = scores - seen.mean
    if config.score_scale:
        scores = scores / (seen.std + 1e-8)
    return scores - config.missing_eos_penalty * (~finished).float()


def overlong(ctx: Context, lengths: Tensor) -> Tensor:
    """What responses of these lengths `(B,)` lose for being nearly as long as can be (Yu et al. 2025, arXiv:2503.14476,
    eq. 13)."""
    config = ctx.settings
    beyond = lengths - (ctx.config.most_new_tokens - config.overlong_buffer)
    return config.overlong_penalty * beyond.clamp_min(0) / max(1, config.overlong_buffer)


def shaped(ctx: Context, scores: Tensor, finished: Tensor, mask: Tensor, is_new: bool = True) -> Tensor:
    """The same with what long responses lose; a row without a sampled token counts nowhere, and has 0.

    Args:
        mask: `(B, T)`, of sampled tokens.
    """
    said, found = mask.any(1), torch.zeros_like(scores)
    found[said] = shape_scores(ctx, scores[said], finished[said], is_new) - overlong(ctx, reach(mask[said]))
    return found


def at_tokens(scores: Tensor, mask: Tensor, turn_rewards: Tensor | None = None) -> Tensor:
    """What scores `(B,)` give each sampled token, `(B, T)`: turns have their rewards, whose sum is a part of the score,
    and the rest of it stands at a row's last token, as all of it does without an environment."""
    if turn_rewards is None:
        found, rest = torch.zeros(mask.shape, dtype=scores.dtype), scores
    else:
        found = torch.where(mask, turn_rewards, 0.0)
        rest = scores - found.double().sum(1).to(scores.dtype)  # exactly 0 where the score is the sum alone
    return found.scatter_add(1, last_of(mask).clamp_min(0).unsqueeze(1), (rest * mask.any(1)).unsqueeze(1))


def record_scores(ctx: Context, scores: Tensor) -> None:
    """Those of rows that something was sampled in."""
    ctx.metrics.mean("score/mean", scores)
    if len(scores):
        ctx.metrics.record("score/std", scores.std(correction=0))


def equal_groups(scores: Tensor, mask: Tensor, size: int) -> Tensor:
    """Which groups of `size` neighbouring rows tell nothing, since all that something was sampled in score alike."""
    said = mask.any(1)
    most = scores.masked_fill(~said, -torch.inf).view(-1, size).amax(1)
    return most <= scores.masked_fill(~said, torch.inf).view(-1, size).amin(1)
