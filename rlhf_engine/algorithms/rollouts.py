"""Stages of every algorithm that samples: rollouts, log-probs of them, scores, and the minibatches of their updates.

Settings are those of the phase that runs (`ctx.settings`), a `SamplingConfig`.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from rlhf_kernels import importance_weights

from ..config import RolloutConfig, RunConfig, SamplingConfig
from ..context import Context
from ..data.dataset import Example
from ..experience import Experience, pad_rows, spans
from ..models.role import RoleModel
from ..models.work import Batch, Work
from ..rewards.functions import Sample
from ..rollout.generate import rollout as generate
from ..rollout.progress import Progress, Response
from ..rollout.sampling import sample_keys
from ..schedule import Stage, Works
from .algorithm import RoleSpec
from .heads import choose, last_scores, policy_log_probs, score_batch

SEQUENCE = ("tokens", "lengths", "response_mask")
BEFORE = (("sft", "policy"),)  # the weights that policy and reference start from
PROVIDED = frozenset({"prompts", "reward_prompts", "row_fields", "sample_ids"})  # what `draw` fills

# What sampler and trainer may differ by, nats, for one's log-probs to stand for the other's, where nothing is said: the
# rounding of hidden states by kernels that add up in different orders.
_MAX_LOG_PROB_GAP = {torch.float32: 1e-4, torch.bfloat16: 0.5}


def stages(config: RunConfig, reference: bool = True) -> list[Stage]:
    """Rows of a table: from prompts to responses, their log-probs and scores; reward functions take the place of the
    reward model's row.

    Args:
        reference: whether there is one.
    """
    answered = ("prompts", "row_fields", "tokens", "lengths")
    by_function = Stage("score", "local", score_by_functions, None, answered, ("scores",))
    by_model = Stage("score", "infer", score, "reward", ("prompts", "reward_prompts", "tokens", "lengths"), ("scores",))
    made = (*SEQUENCE, "finished", "sampler_log_probs")
    by_reference = Stage("ref_log_probs", "infer", ref_log_probs, "reference", SEQUENCE, ("ref_log_probs",))
    return [
        Stage("rollout", "rollout", rollout, "policy", ("prompts", "row_fields", "sample_ids"), made),
        Stage("log_probs", "infer", log_probs, "policy", (*SEQUENCE, "sampler_log_probs"), ("log_probs",)),
        *([by_reference] if reference else []),
        by_function if config.reward.fns else by_model,
    ]


def importance_stages(settings: SamplingConfig) -> list[Stage]:
    """The row that weights what the sampler has drawn, where that is asked for."""
    reads = ("log_probs", "sampler_log_probs", "response_mask")
    row = Stage("importance", "local", importance, None, reads, ("importance",))
    return [row] if settings.importance != "none" else []


def scorer(config: RunConfig) -> RoleSpec | None:
    """The reward model, from the reward phase or `reward.path`; None with reward functions."""
    if config.reward.fns:
        return None
    return RoleSpec("scalar", (("reward", "reward"),), base="reward")


def draw(ctx: Context, count: int | None = None) -> Experience:
    """So many prompts, by default those of an iteration, each as often as it is sampled."""
    drawn = ctx.draw(ctx.phase, count or ctx.settings.prompts_per_iteration)
    examples = [example for example in drawn for _ in range(ctx.settings.samples_per_prompt)]
    return Experience(
        prompts=[example.prompt for example in examples],
        reward_prompts=[example.reward_prompt for example in examples],
        row_fields=row_fields(examples),
        sample_ids=torch.arange(len(examples)),
    )


def row_fields(examples: Sequence[Example]) -> list[str]:
    """What else the rows of examples have, for `Experience.row_fields`; as text, that of what JSON does not know."""
    return [json.dumps(example.fields, default=str) for example in examples]


def rollout(ctx: Context, policy: RoleModel, x) -> dict[str, Tensor]:
    """Samples a response to every prompt from the training weights; functions that can begin to score, do."""
    started = time.perf_counter()
    begins = ctx.settings.is_scored and ctx.mesh.is_main and ctx.rewards is not None and ctx.rewards.apart
    begin = _scoring(ctx, x) if begins else None
    fields, progress = respond(ctx, policy, x, ctx.config.rollout, begin)
    seconds = time.perf_counter() - started
    record_responses(ctx, fields["response_mask"], fields["finished"])
    ctx.metrics.record("throughput/slot_occupancy", progress.slot_occupancy)
    ctx.metrics.record("throughput/prefill_share", progress.prefill_share)
    ctx.metrics.record("idle/rollout", progress.idle_share)
    ctx.metrics.record("rollout/preempted", progress.preempted)
    ctx.metrics.record("throughput/generated_tokens_per_second", fields["response_mask"].sum() / seconds)
    return fields


def respond(
    ctx: Context,
    policy: RoleModel,
    x,
    config: RolloutConfig,
    begin: Callable[[Mapping[int, Response]], None] | None = None,
) -> tuple[dict[str, Tensor], Progress]:
    """A response to every prompt, as fields, and how that went.

    Args:
        begin: is told of responses as they are finished.
    """
    keys = sample_keys(ctx.config.seed, ctx.state.iteration, x.sample_ids)
    progress = Progress()

    def report(now: Progress) -> None:
        nonlocal progress
        progress = now
        if ctx.mesh.is_main and now.rows_done < now.num_rows:
            place = f"{ctx.phase} {ctx.state.iteration + 1}/{ctx.settings.iterations}"
            speed = f"{now.tokens / now.seconds:.4g} tokens/s  {now.slot_occupancy:.0%} of slots busy"
            print(f"{place}  rollout {now.rows_done}/{now.num_rows}  {speed}", flush=True)

    responses = generate(
        policy,
        x.prompts,
        keys,
        config,
        ctx.tokenizer.end_ids,
        decode=ctx.tokenizer.decode,
        report=report,
        finished=begin,
    )
    if begin is not None:
        begin(dict(enumerate(responses)))
    tokens, lengths = pad_rows([p + r.tokens for p, r in zip(x.prompts, responses, strict=True)], ctx.mesh.tp)
    starts = torch.tensor([len(p) for p in x.prompts])
    response_mask = spans(starts, lengths, tokens.shape[1])
    flat = torch.tensor([log_prob for r in responses for log_prob in r.log_probs])
    finished = torch.tensor([r.finished for r in responses])
    fields = {
        "tokens": tokens,
        "lengths": lengths,
        "response_mask": response_mask,
        "finished": finished,
        "sampler_log_probs": torch.zeros(tokens.shape).masked_scatter(response_mask, flat),
    }
    return fields, progress


def record_responses(ctx: Context, response_mask: Tensor, finished: Tensor) -> None:
    """How long they are, and how many came to their end."""
    ctx.metrics.record("rollout/response_length", response_mask.sum() / len(response_mask))
    ctx.metrics.record("rollout/finished", finished.float().mean())


def log_probs(ctx: Context, policy: RoleModel, x) -> Works:
    """The policy's own view of its rollout: by the forward that training uses, or as the sampler had it."""
    config, state = ctx.settings, ctx.state
    last, is_due = state.log_prob_gap, state.iteration % config.measure_gap_every == 0
    most = config.max_log_prob_gap if config.max_log_prob_gap is not None else _MAX_LOG_PROB_GAP[policy.dtype]
    if config.old_log_probs == "sampler" and not is_due and last is not None and last <= most:
        return {"log_probs": x.sampler_log_probs}
    both = yield log_probs_work(ctx, policy, x)
    log_probs, entropy = both.unbind(1)
    state.log_prob_gap = float((log_probs - x.sampler_log_probs).abs().max())
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


def function_scores(ctx: Context, x) -> tuple[Tensor, dict[str, float]]:
    """Scores `(B,)` and the mean of each function, which the main rank calls."""
    found = None
    if ctx.mesh.is_main:
        assert ctx.rewards is not None
        rows = zip(x.prompts, x.tokens.tolist(), x.lengths.tolist(), x.row_fields, strict=True)
        found = ctx.rewards([_sample(ctx, p, row[len(p) : n], fields) for p, row, n, fields in rows])
    scores, means = ctx.mesh.from_main(found)
    return torch.tensor(scores, dtype=torch.float32), means


def _sample(ctx: Context, prompt: Sequence[int], response: Sequence[int], fields: str) -> Sample:
    decode = ctx.tokenizer.decode
    return Sample(decode(prompt), decode(response), tuple(prompt), tuple(response), fields)


def _scoring(ctx: Context, x) -> Callable[[Mapping[int, Response]], None]:
    """What has responses scored as they are finished, each once."""
    rewards, begun = ctx.rewards, set[int]()
    assert rewards is not None
    rewards.forget()

    def begin(found: Mapping[int, Response]) -> None:
        new = [i for i in found if i not in begun]
        begun.update(new)
        rewards.start([_sample(ctx, x.prompts[i], found[i].tokens, x.row_fields[i]) for i in new])

    return begin


def importance(ctx: Context, _, x) -> dict[str, Tensor]:
    """How much each token counts, by how probable it is to the trainer and was to the sampler."""
    config, both = ctx.settings, (x.log_probs, x.sampler_log_probs, x.response_mask)
    found = importance_weights(
        *both, config.importance, of=config.importance_of, limit=config.importance_limit, low=config.importance_low
    )
    plain = importance_weights(*both, of=config.importance_of, limit=torch.inf)
    ctx.metrics.mean("importance/mean", found, x.response_mask)
    ctx.metrics.mean("importance/cut", (found != plain).float(), x.response_mask)
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
    beyond = lengths - (ctx.config.rollout.max_new_tokens - config.overlong_buffer)
    return config.overlong_penalty * beyond.clamp_min(0) / max(1, config.overlong_buffer)
