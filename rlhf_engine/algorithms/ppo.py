"""Proximal policy optimisation for language models (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022).

| stage         | role      | kind    | reads                                          | writes                      |
|---------------|-----------|---------|------------------------------------------------|-----------------------------|
| rollout       | policy    | rollout | prompts, row_fields, sample_ids                | tokens, lengths, finished,  |
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

With reward functions, score is a local stage. With an environment (`env.fn`) a row is a trajectory of several turns,
whose response_mask has gaps, and advantage reads turn_rewards too. Gold is measured where the true preference is known,
and never learned from. The last stages are there with `ppo.write_rollouts=true` and `ppo.write_arrays=true`.

Where it deviates from the papers:
1. Old log-probs come from the trainer's forward, so the first ratio of an iteration is exactly 1; the sampler's are
   taken on request (`ppo.old_log_probs`), as long as the two agree.
2. The KL to the reference is in the reward, per token (k1), or with `ppo.kl` in the loss; never in both.
3. Losses are means over the response tokens of a minibatch, not over sequences; the policy's with `ppo.loss_mean`
   otherwise.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_kernels import Advantages, clipped_value_loss, corrected, kl_advantages, kl_estimate

from ..config import PPOConfig, RunConfig
from ..context import Context
from ..models.role import RoleModel
from ..models.work import Batch, Work
from ..schedule import Stage, Works
from . import records, rollouts
from .algorithm import RoleSpec
from .heads import token_values
from .policy import SamplingAlgorithm, policy_works, update_stage
from .rollouts import SEQUENCE, minibatches
from .sft import cross_entropy, supervised, text_work

# -- the stages ----------------------------------------------------------------------------------------------


def values(ctx: Context, critic: RoleModel, x) -> Works:
    """The critic's expectation before each response token."""
    batch = {"tokens": x.tokens, "lengths": x.lengths}
    values = yield Work(critic, batch, token_values, ctx.settings.micro_batch_size)
    return {"values": values * x.response_mask}


def advantage(ctx: Context, _, x) -> dict[str, Tensor]:
    """KL-shaped rewards, generalised advantages, returns; adapts the KL coefficient.

    The policy's loss whitens the advantages by the moments of the whole batch. A row without a sampled token, whose
    environment has failed, is in none of the figures.
    """
    config, state, metrics = ctx.settings, ctx.state, ctx.metrics
    mask, said = x.response_mask, x.response_mask.any(1)
    kl_of_tokens = kl_estimate(x.log_probs, x.ref_log_probs) * mask
    kl = kl_of_tokens.sum(1)[said]
    rollouts.record_scores(ctx, x.scores[said])
    metrics.mean("kl/mean", kl)
    metrics.record("kl/coef", state.kl_coef)
    scores = rollouts.shaped(ctx, x.scores, x.finished, mask)
    given = rollouts.at_tokens(scores, mask, getattr(x, "turn_rewards", None))
    kl_coef = state.kl_coef if config.kl == "reward" else 0.0
    fields = [field.to(ctx.mesh.device) for field in (x.log_probs, x.ref_log_probs, x.values, given, mask)]
    estimate = functools.partial(kl_advantages, *fields, kl_coef=kl_coef, gamma=config.gamma)
    found = estimate(gae_lambda=_lambdas(config, mask.sum(1)).to(ctx.mesh.device))
    if config.critic_lambda is not None:
        found = found._replace(returns=estimate(gae_lambda=config.critic_lambda).returns)
    result = Advantages(*(field.cpu() for field in found))
    metrics.mean("reward/mean", result.rewards[said])
    metrics.mean("critic/value", x.values, mask)
    if len(kl):
        metrics.record("critic/explained_variance", _explained_variance(x.values[mask], result.returns[mask]))
    if config.kl_controller == "adaptive" and len(kl):
        # Ziegler et al. 2019, section 2.2
        error = max(-0.2, min(0.2, float(kl.mean()) / config.kl_target - 1))
        state.kl_coef *= 1 + error * len(kl) / config.kl_horizon
    moments = torch.tensor([1.0, 0.0, 1.0])
    if config.whiten_advantages:
        moments = corrected(result.moments, config.std_correction)
    aims = {"advantages": result.advantages, "advantage_moments": moments, "returns": result.returns}
    return {"rewards": given - kl_coef * kl_of_tokens, **aims}


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
    """One step on each minibatch, and on other text beside it; none while the critic warms up."""
    if ctx.state.iteration < ctx.settings.critic_warmup_iterations:
        return None
    for i, work, count in policy_works(ctx, policy, x):
        yield [work, *pretraining(ctx, policy, i, count)]
    return None


def pretraining(ctx: Context, policy: RoleModel, minibatch: int, count: Tensor) -> list[Work]:
    """PPO-ptx (Ouyang et al. 2022, eq. 2): the log-likelihood of other text, in the same step as a minibatch's loss.

    Args:
        minibatch: its number in this iteration, which says which rows are next.
        count: of the minibatch, by which the step divides all losses. The text's own is to be a mean over its own
            tokens, so its sum is multiplied by the one count and divided by the other.
    """
    config = ctx.settings
    if not config.ptx.sources:
        return []
    number = ctx.state.iteration * config.epochs * config.num_minibatches + minibatch
    x = supervised(ctx.datasets["ptx"].batch(number * config.ptx.rows, config.ptx.rows), ctx.mesh.tp)
    assert x.tokens is not None and x.lengths is not None and x.loss_mask is not None
    weight = float(config.ptx.coef * count / x.loss_mask[:, 1:].sum().clamp_min(1))

    def loss(hidden: Tensor, batch: Batch):
        total, num_tokens, _ = cross_entropy(policy)(hidden, batch)
        ctx.metrics.add("ptx/loss", total.detach(), num_tokens)
        return weight * total, torch.zeros_like(num_tokens), {}

    return [text_work(policy, x, loss, config.micro_batch_size)]


def _lambdas(config: PPOConfig, lengths: Tensor) -> Tensor:
    """For responses of so many sampled tokens, lambda `(B,)`: one for all, or longer ones nearer to 1 (Yue et al. 2025,
    arXiv:2504.05118, eq. 6)."""
    if config.gae_alpha is None:
        return torch.full(lengths.shape, config.gae_lambda)
    return (1 - 1 / (config.gae_alpha * lengths)).clamp_min(0)


def _explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    return 1 - (returns - values).var(correction=0) / returns.var(correction=0).clamp_min(1e-8)


# -- the table -----------------------------------------------------------------------------------------------


def stage_table(config: RunConfig) -> tuple[Stage, ...]:
    """PPO's stages."""
    measured = ("log_probs", "ref_log_probs", "values", "scores", "finished", "response_mask")
    earned = ("turn_rewards",) if config.env.fn is not None else ()
    whitened = ("advantages", "advantage_moments")
    table = [
        *rollouts.stages(config),
        Stage("values", "infer", values, "critic", SEQUENCE, ("values",)),
        Stage("advantage", "local", advantage, None, (*measured, *earned), ("rewards", "returns", *whitened)),
        *rollouts.importance_stages(config, config.ppo),
        Stage("train_critic", "train", train_critic, "critic", (*SEQUENCE, "values", "returns")),
        update_stage(config, "ppo", train_policy, ["advantage_moments"]),
    ]
    return (*table, *records.stages(config.ppo, table))


class PPO(SamplingAlgorithm):
    name = "ppo"

    def __init__(self, config: RunConfig):
        super().__init__(config)
        self.stages = stage_table(config)

    def roles(self) -> dict[str, RoleSpec]:
        """Policy and reference start from SFT, critic and reward model from the reward phase."""
        config = self.run.ppo
        per_iteration = config.epochs * config.num_minibatches
        policy_steps = max(1, self.steps - config.critic_warmup_iterations * per_iteration)
        critic = rollouts.scorer(self.run) or RoleSpec("scalar", rollouts.BEFORE)
        return {
            "policy": RoleSpec("lm", rollouts.BEFORE, config.optimizer, policy_steps),
            "reference": RoleSpec("lm", rollouts.BEFORE),
            "critic": replace(critic, optimizer=config.critic_optimizer, total_steps=self.steps),
            **rollouts.others(self.run, self.config),
        }
