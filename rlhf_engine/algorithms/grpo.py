"""Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300, section 4.1), and its family by choices.

| stage         | role      | kind    | reads                                          | writes                      |
|---------------|-----------|---------|------------------------------------------------|-----------------------------|
| rollout       | policy    | rollout | prompts, sample_ids                            | tokens, lengths, finished,  |
|               |           |         |                                                | response_mask, sampler_...  |
| log_probs     | policy    | infer   | tokens, lengths, response_mask, sampler_...    | log_probs                   |
| ref_log_probs | reference | infer   | tokens, lengths, response_mask                 | ref_log_probs               |
| score         | reward    | infer   | prompts, reward_prompts, tokens, lengths       | scores                      |
| advantage     | -         | local   | scores, sample_ids, log_probs, ...             | advantages                  |
| train_policy  | policy    | train   | tokens, ..., log_probs, advantages, ...        | -                           |
| importance    | -         | local   | log_probs, sampler_log_probs, response_mask    | importance                  |
| gold, ...     | -         | local   | as PPO's                                       |                             |

The responses to one prompt are a group, and a score counts by how it compares with the group's. There is no critic;
with a reward function no reward model; and with `grpo.kl_coef=0` no reference and no row of it. The row of importance
is there with `grpo.importance`, and with `grpo.redraws` those of `redraw.py` behind the scores, which come first then;
with `grpo.advantage=remax` those of `greedy.py`. RLOO, ReMax, Dr. GRPO, REINFORCE++, DAPO, GSPO and CISPO are this
table with other choices of `grpo.advantage`, `loss`, `loss_mean`, `kl` and clipping (docs/algorithms.md).

Where it deviates from the papers:
1. Old log-probs are the trainer's, as PPO's (`ppo.py`, 1).
2. Scores enter as PPO's do: clipped and scaled on request, less for a response without an end.
3. With `grpo.kl=reward` the KL is taken off the score, summed over the response (k1), before scores are compared, in
   REINFORCE++ too, which takes off each token's what comes after it.
4. REINFORCE++ standardises over the tokens of the batch, as its implementations do, by the counts of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlhf_kernels import group_advantages, kl_estimate

from ..config import GroupConfig, RunConfig
from ..context import Context
from ..schedule import Stage
from . import greedy, records, redraw, rollouts
from .algorithm import RoleSpec
from .policy import SamplingAlgorithm, update_stage
from .rollouts import overlong, shape_scores


def advantage(ctx: Context, _, x) -> dict[str, Tensor]:
    """How each response's score compares with its group's, at each of its tokens."""
    config, metrics = ctx.settings, ctx.metrics
    metrics.mean("score/mean", x.scores)
    metrics.record("score/std", x.scores.std(correction=0))
    lengths = x.response_mask.sum(1)
    scores = shape_scores(ctx, x.scores, x.finished) - overlong(ctx, lengths)
    if hasattr(x, "ref_log_probs"):
        kl = (kl_estimate(x.log_probs, x.ref_log_probs) * x.response_mask).sum(1)
        metrics.mean("kl/mean", kl)
        metrics.record("kl/coef", config.kl_coef)
        scores = scores - config.kl_coef * kl if config.kl == "reward" else scores
    metrics.mean("reward/mean", scores)
    of_group = scores.view(-1, config.samples_per_prompt)
    metrics.mean("score/equal_groups", (of_group.amax(1) == of_group.amin(1)).float())
    baselines = None
    if config.advantage == "remax":
        longest = x.greedy_response_mask.sum(1)
        baselines = shape_scores(ctx, x.baselines, x.greedy_finished, is_new=False) - overlong(ctx, longest)
        metrics.mean("score/greedy", x.baselines)
        baselines = baselines.repeat_interleave(config.samples_per_prompt)
    found = group_advantages(
        scores,
        x.sample_ids // config.samples_per_prompt,
        config.advantage,
        counts=lengths,
        baselines=baselines,
        correction=config.std_correction,
        eps=config.std_eps,
    )
    return {"advantages": found.unsqueeze(1) * x.response_mask}


def compared(settings: GroupConfig, sampled: Sequence[Stage]) -> tuple[list[Stage], tuple[str, ...]]:
    """The rows of `rollouts.stages` with those that a comparison of scores asks for besides, and the fields that
    `advantage` reads of them."""
    rollout, *infer, score = sampled
    measured: tuple[str, ...] = ("scores", "sample_ids", "finished", "response_mask")
    if any("ref_log_probs" in stage.writes for stage in infer):
        measured += ("log_probs", "ref_log_probs")
    table = list(sampled)
    if settings.redraws:
        table = [rollout, score, *redraw.stages(settings.redraws, rollout, score), *infer]
    if settings.advantage == "remax":
        table += greedy.stages(score)
        measured += ("baselines", "greedy_response_mask", "greedy_finished")
    return table, measured


def stage_table(config: RunConfig) -> tuple[Stage, ...]:
    """GRPO's stages."""
    sampled, measured = compared(config.grpo, rollouts.stages(config, config.grpo.kl_coef > 0))
    table = [
        *sampled,
        Stage("advantage", "local", advantage, None, measured, ("advantages",)),
        *rollouts.importance_stages(config, config.grpo),
        update_stage(config, "grpo"),
    ]
    return (*table, *records.stages(config.grpo, table))


class GRPO(SamplingAlgorithm):
    name = "grpo"

    def __init__(self, config: RunConfig):
        super().__init__(config)
        self.stages = stage_table(config)

    def roles(self) -> dict[str, RoleSpec]:
        """The policy from SFT; beside it the reference and the reward model, where they are used."""
        roles = {"policy": RoleSpec("lm", rollouts.BEFORE, self.config.optimizer, self.steps)}
        if self.config.kl_coef > 0:
            roles["reference"] = RoleSpec("lm", rollouts.BEFORE)
        if (scorer := rollouts.scorer(self.run)) is not None:
            roles["reward"] = scorer
        return roles
