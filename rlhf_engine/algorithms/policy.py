"""What algorithms that sample answers share: the policy's update, and the phase around it."""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rlhf_kernels import clipped_policy_loss, kl_estimate, whiten
from rlhf_kernels.reference import KLTerm

from ..config import RunConfig
from ..context import Context
from ..experience import Experience
from ..models.role import RoleModel
from ..models.work import Batch, Work
from ..schedule import Body, Stage, Works
from .algorithm import Evaluation
from .carry import num_new_prompts
from .heads import policy_log_probs
from .rollouts import PROVIDED, SEQUENCE, draw, minibatches, sampled
from .samples import compare


def train_policy(ctx: Context, policy: RoleModel, x) -> Works:
    """One step on each minibatch."""
    for _, work, _ in policy_works(ctx, policy, x):
        yield work
    return None


def update_stage(
    config: RunConfig, name: str, body: Body = train_policy, also: Sequence[str] = (), beside: str | None = None
) -> Stage:
    """The row of the policy's update, which reads what its loss needs.

    Args:
        name: of the phase.
        also: fields that it reads besides.
        beside: see `Stage`.
    """
    section, reads = getattr(config, name), [*SEQUENCE, "log_probs", "advantages", *also]
    if section.kl in typing.get_args(KLTerm) and section.kl_coef > 0:  # it is in the loss
        reads.append("ref_log_probs")
    if section.importance != "none":
        reads.append("importance")
    return Stage("train_policy", "train", body, "policy", tuple(reads), beside=beside)


def policy_works(ctx: Context, policy: RoleModel, x) -> Iterator[tuple[int, Work, Tensor]]:
    """For each minibatch its number, the work of its step, and the count that the step divides its losses by."""
    config, moments = ctx.settings, getattr(x, "advantage_moments", None)
    if is_weighted := hasattr(x, "importance"):
        whitened = x.advantages if moments is None else whiten(x.advantages, x.response_mask, moments=moments)
        x.advantages, moments = whitened * x.importance, None
    elif moments is not None:
        moments = moments.to(ctx.mesh.device)
    has_reference = hasattr(x, "ref_log_probs")
    # of the others a part stands in the loss and not in its gradient (`clipped_policy_loss`)
    # advantages are the same throughout a response
    is_even = not is_weighted and moments is None and getattr(config, "credit", "trajectory") == "trajectory"
    is_derivative = config.loss in ("ppo", "reinforce") or (config.loss == "gspo" and is_even)
    is_derivative = is_derivative and config.kl not in ("k1", "k3+")

    def loss(hidden: Tensor, batch: Batch, is_first: bool):
        mask = batch["response_mask"]
        log_probs, entropy = policy_log_probs(policy, hidden, batch, ctx.config.rollout.temperature)
        weights, count = averaging(mask, config.loss_mean, ctx.config.most_new_tokens)
        term = dict(ref_log_probs=batch["ref_log_probs"], kl=config.kl, kl_coef=config.kl_coef) if has_reference else {}
        result = clipped_policy_loss(
            log_probs,
            batch["log_probs"],
            batch["advantages"],
            mask,
            kind=config.loss,
            clip_ratio=config.clip_ratio,
            clip_ratio_high=config.clip_ratio_high,
            dual_clip=config.dual_clip,
            weights=weights,
            moments=moments,
            **term,
        )
        num_tokens = mask.sum()
        sums = {"clip_fraction": result.clip_fraction, "approx_kl": result.approx_kl, "ratio": result.ratio}
        if is_first:  # nothing was updated yet: every ratio must be 1
            sums["ratio_first"] = result.ratio
        if has_reference:
            sums["kl"] = (kl_estimate(log_probs.detach(), batch["ref_log_probs"]) * mask).sum()
        bonus = config.entropy_coef * (entropy.sum(1) * weights).sum()
        return result.loss - bonus, count, {name: (value, num_tokens) for name, value in sums.items()}

    fields = ["log_probs", "advantages", *(["ref_log_probs"] if has_reference else [])]
    for i, batch in minibatches(ctx, x, *SEQUENCE, *fields):
        fn = functools.partial(loss, is_first=i == 0)
        work = Work(policy, batch, fn, config.micro_batch_size, 1, is_derivative, sampled(ctx, policy))
        yield i, work, averaging(batch["response_mask"], config.loss_mean, 1)[1]


def averaging(mask: Tensor, over: str, length: int) -> tuple[Tensor, Tensor]:
    """Weights `(B,)` of the rows of a mask `(B, T)`, and the count, that make of sums over tokens a mean over tokens,
    over sequences of the mean of each, or over sequences of the sum of each divided by a length ("constant").

    A row is a whole sequence, however many turns it has and however rows are dealt to replicas and micro-batches. One
    without any token is none.
    """
    lengths = mask.sum(1)
    if over == "tokens":
        return torch.ones_like(lengths, dtype=torch.float32), lengths.sum()
    divisors = lengths.clamp_min(1) if over == "sequences" else torch.full_like(lengths, length)
    return 1 / divisors, (lengths > 0).sum()


class SamplingAlgorithm:
    """A phase that samples; its roles and its table are the algorithm's own."""

    name: str
    provided = PROVIDED
    changes_at_end = False
    stages: Sequence[Stage]

    def __init__(self, config: RunConfig):
        self.run, self.config = config, getattr(config, self.name)
        self.iterations, self.save_every = self.config.iterations, self.config.save_every
        self.eval_every = self.config.eval_every
        self.steps = self.iterations * self.config.epochs * self.config.num_minibatches

    def batch(self, ctx: Context) -> Experience:
        """`prompts_per_iteration` prompts, each `samples_per_prompt` times; with `rollout.tail=carry` as many as are
        missing of those under way."""
        if ctx.state.iteration == 0:
            ctx.state.kl_coef = self.config.kl_coef
        return draw(ctx, num_new_prompts(ctx))

    def evaluate(self, ctx: Context, final: bool) -> Evaluation:
        """The policy, beside the reference where there is one; while it trains `eval.samples` may say enough."""
        return Evaluation({}) if self.run.eval.samples and not final else self.compare(ctx)

    def compare(self, ctx: Context) -> Evaluation:
        """Responses to held-out prompts, of the policy and of the reference where there is one."""
        return compare(ctx)
