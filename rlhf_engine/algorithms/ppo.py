"""Proximal policy optimisation for language models (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022).

| stage         | role      | kind    | reads                                          | writes                      |
|---------------|-----------|---------|------------------------------------------------|-----------------------------|
| rollout       | policy    | rollout | prompts, sample_ids                            | tokens, lengths, finished,  |
|               |           |         |                                                | response_mask, sampler_...  |
| log_probs     | policy    | infer   | tokens, lengths, response_mask, sampler_...    | log_probs                   |
| ref_log_probs | reference | infer   | tokens, lengths, response_mask                 | ref_log_probs               |
| score         | reward    | infer   | prompts, reward_prompts, tokens, lengths       | scores                      |
| values        | critic    | infer   | tokens, lengths, response_mask                 | values                      |
| advantage     | -         | local   | log_probs, ref_log_probs, values, scores, ...  | rewards, advantages, ...    |
| train_critic  | critic    | train   | tokens, ..., values, returns                   | -                           |
| train_policy  | policy    | train   | tokens, ..., log_probs, advantages, ...        | -                           |
| gold          | -         | local   | prompts, tokens, lengths                       | golds                       |
| write         | -         | local   | prompts, tokens, scores, golds, log_probs, ... | -                           |
| write_arrays  | -         | local   | tokens, ..., advantages, returns               | -                           |

With a reward function, score is a local stage. Gold is measured where the true preference is known, and never
learned from. The last stages are there with `ppo.write_rollouts=true` and `ppo.write_arrays=true`.

Where it deviates from the papers:
1. Old log-probs come from the trainer's forward, so the first ratio of an iteration is exactly 1; the sampler's are
   taken on request (`ppo.old_log_probs`), as long as the two agree.
2. The KL to the reference is in the reward, per token (k1), and nowhere else.
3. Losses are means over the response tokens of a minibatch, not over sequences.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from rlhf_kernels import Advantages, clipped_policy_loss, clipped_value_loss, kl_advantages, kl_estimate

from ..config import RunConfig
from ..context import Context
from ..experience import Experience
from ..models.role import RoleModel
from ..models.work import Batch, Work
from ..schedule import Stage, Works
from . import records, rollouts
from .algorithm import Evaluation, RoleSpec
from .heads import policy_log_probs, token_values
from .rollouts import PROVIDED, SEQUENCE, draw, minibatches, sampled, shape_scores
from .samples import compare
from .sft import cross_entropy, supervised, text_work

# -- the stages ----------------------------------------------------------------------------------------------


def values(ctx: Context, critic: RoleModel, x) -> Works:
    """The critic's expectation before each response token."""
    batch = {"tokens": x.tokens, "lengths": x.lengths}
    values = yield Work(critic, batch, token_values, ctx.settings.micro_batch_size)
    return {"values": values * x.response_mask}


def advantage(ctx: Context, _, x) -> dict[str, Tensor]:
    """KL-shaped rewards, generalised advantages, returns; adapts the KL coefficient.

    The policy's loss whitens the advantages by the moments of the whole batch.
    """
    config, state, metrics = ctx.settings, ctx.state, ctx.metrics
    mask = x.response_mask
    kl_of_tokens = kl_estimate(x.log_probs, x.ref_log_probs) * mask
    kl = kl_of_tokens.sum(1)
    metrics.mean("score/mean", x.scores)
    metrics.record("score/std", x.scores.std(correction=0))
    metrics.mean("kl/mean", kl)
    metrics.record("kl/coef", state.kl_coef)
    scores = shape_scores(ctx, x.scores, x.finished)
    found = kl_advantages(
        *(field.to(ctx.mesh.device) for field in (x.log_probs, x.ref_log_probs, x.values, scores, mask)),
        kl_coef=state.kl_coef,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
    )
    result = Advantages(*(field.cpu() for field in found))
    rewards = -state.kl_coef * kl_of_tokens
    rewards[torch.arange(len(scores)), x.lengths - 1] += scores
    metrics.mean("reward/mean", result.rewards)
    metrics.mean("critic/value", x.values, mask)
    metrics.record("critic/explained_variance", _explained_variance(x.values[mask], result.returns[mask]))
    if config.kl_controller == "adaptive":
        # Ziegler et al. 2019, section 2.2
        error = max(-0.2, min(0.2, float(kl.mean()) / config.kl_target - 1))
        state.kl_coef *= 1 + error * len(kl) / config.kl_horizon
    moments = result.moments if config.whiten_advantages else torch.tensor([1.0, 0.0, 1.0])
    aims = {"advantages": result.advantages, "advantage_moments": moments, "returns": result.returns}
    return {"rewards": rewards, **aims}


def train_critic(ctx: Context, critic: RoleModel, x) -> Works:
    """Clipped value regression over minibatches."""

    def loss(output: Tensor, batch: Batch):
        mask = batch["response_mask"]
        result = clipped_value_loss(
            token_values(output, batch),
            batch["values"],
            batch["returns"],
            mask,
            clip_value=ctx.settings.clip_value,
        )
        return result.loss, mask.sum(), {"clip_fraction": result.clip_fraction, "error": result.error}

    for _, batch in minibatches(ctx, x, "tokens", "lengths", "response_mask", "values", "returns"):
        yield Work(critic, batch, loss, ctx.settings.micro_batch_size)
    return None


def train_policy(ctx: Context, policy: RoleModel, x) -> Works:
    """Clipped policy gradient over minibatches."""
    config = ctx.settings
    if ctx.state.iteration < config.critic_warmup_iterations:
        return None
    moments = x.advantage_moments.to(ctx.mesh.device)

    def loss(hidden: Tensor, batch: Batch, is_first: bool):
        mask = batch["response_mask"]
        log_probs, entropy = policy_log_probs(policy, hidden, batch, ctx.config.rollout.temperature)
        result = clipped_policy_loss(
            log_probs,
            batch["log_probs"],
            batch["advantages"],
            mask,
            clip_ratio=config.clip_ratio,
            moments=moments,
        )
        statistics = {
            "clip_fraction": result.clip_fraction,
            "approx_kl": result.approx_kl,
            "ratio": result.ratio,
        }
        if is_first:  # nothing was updated yet: every ratio must be 1
            statistics["ratio_first"] = result.ratio
        return result.loss - config.entropy_coef * entropy.sum(), mask.sum(), statistics

    for i, batch in minibatches(ctx, x, "tokens", "lengths", "response_mask", "log_probs", "advantages"):
        fn = functools.partial(loss, is_first=i == 0)
        work = Work(policy, batch, fn, config.micro_batch_size, prepare=sampled(ctx, policy))
        yield [work, *pretraining(ctx, policy, i, batch["response_mask"].sum())]
    return None


def pretraining(ctx: Context, policy: RoleModel, minibatch: int, num_tokens: Tensor) -> list[Work]:
    """PPO-ptx (Ouyang et al. 2022, eq. 2): the log-likelihood of other text, in the same step as a minibatch's loss.

    Args:
        minibatch: its number in this iteration, which says which rows are next.
        num_tokens: response tokens of the minibatch, by which the step divides all losses. The text's own is to be a
            mean over its own tokens, so its sum is multiplied by the one count and divided by the other.
    """
    config = ctx.settings
    if not config.ptx.sources:
        return []
    number = ctx.state.iteration * config.epochs * config.num_minibatches + minibatch
    x = supervised(ctx.datasets["ptx"].batch(number * config.ptx.rows, config.ptx.rows), ctx.mesh.tp)
    assert x.tokens is not None and x.lengths is not None and x.loss_mask is not None
    weight = float(config.ptx.coef * num_tokens / x.loss_mask[:, 1:].sum().clamp_min(1))

    def loss(hidden: Tensor, batch: Batch):
        total, count, _ = cross_entropy(policy)(hidden, batch)
        ctx.metrics.add("ptx/loss", total.detach(), count)
        return weight * total, torch.zeros_like(count), {}

    return [text_work(policy, x, loss, config.micro_batch_size)]


def _explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    return 1 - (returns - values).var(correction=0) / returns.var(correction=0).clamp_min(1e-8)


# -- the table -----------------------------------------------------------------------------------------------


def stage_table(config: RunConfig) -> tuple[Stage, ...]:
    """PPO's stages."""
    measured = ("log_probs", "ref_log_probs", "values", "scores", "finished", "lengths", "response_mask")
    whitened = ("advantages", "advantage_moments")
    return (
        *rollouts.stages(config),
        Stage("values", "infer", values, "critic", SEQUENCE, ("values",)),
        Stage("advantage", "local", advantage, None, measured, ("rewards", "returns", *whitened)),
        Stage("train_critic", "train", train_critic, "critic", (*SEQUENCE, "values", "returns")),
        Stage("train_policy", "train", train_policy, "policy", (*SEQUENCE, "log_probs", *whitened)),
        *records.stages(config.ppo),
    )


class PPO:
    name = "ppo"
    provided = PROVIDED

    def __init__(self, config: RunConfig):
        self.run, self.config = config, config.ppo
        self.stages = stage_table(config)
        self.iterations = config.ppo.iterations
        self.changes_at_end = False
        self.eval_every, self.save_every = 0, config.ppo.save_every

    def roles(self) -> dict[str, RoleSpec]:
        """Policy and reference start from SFT, critic and reward model from the reward phase."""
        config = self.config
        per_iteration = config.epochs * config.num_minibatches
        steps = config.iterations * per_iteration
        policy_steps = max(1, steps - config.critic_warmup_iterations * per_iteration)
        policy = (("sft", "policy"),)
        by_function = self.run.reward.kind == "function"
        critic = policy if by_function else (("reward", "reward"),)
        base: Literal["policy", "reward"] = "policy" if by_function else "reward"
        roles = {
            "policy": RoleSpec("lm", policy, config.optimizer, policy_steps),
            "reference": RoleSpec("lm", policy),
            "critic": RoleSpec("scalar", critic, config.critic_optimizer, steps, base=base),
        }
        if not by_function:
            roles["reward"] = RoleSpec("scalar", critic, base=base)
        return roles

    def batch(self, ctx: Context) -> Experience:
        """`prompts_per_iteration` prompts, each `samples_per_prompt` times."""
        if ctx.state.iteration == 0:
            ctx.state.kl_coef = self.config.kl_coef
        return draw(ctx)

    def evaluate(self, ctx: Context, final: bool) -> Evaluation:
        """The policy beside the reference."""
        return compare(ctx)
