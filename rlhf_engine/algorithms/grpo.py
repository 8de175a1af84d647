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

With an environment (`env.fn`) a row is a trajectory of several turns. `grpo.credit=trajectory` has one advantage for
all of them; `turn` compares each turn, by what it and the turns behind it were rewarded with, with the same turn of the
prompt's other trajectories (returns of turns within a group: Ding et al. 2025, arXiv:2511.14846, GTPO).

Where it deviates from the papers:
1. Old log-probs are the trainer's, as PPO's (`ppo.py`, 1).
2. Scores enter as PPO's do: clipped and scaled on request, less for a response without an end.
3. With `grpo.kl=reward` the KL is taken off the score, summed over the response (k1), before scores are compared, in
   REINFORCE++ too, which takes off each token's what comes after it.
4. REINFORCE++ standardises over the tokens of the batch, as its implementations do, by the counts of tokens.
5. Turns are not discounted where nothing is said (`grpo.turn_discount`; GTPO: 0.9), their rewards are those of the
   environment, without GTPO's shaping, and any `grpo.advantage` but ReMax's compares them. What is left of the score
   beside them (penalties, the KL of 3) is a reward of the last turn.
6. A turn's number is its group, where GiGPO (Feng et al. 2025, arXiv:2505.10978) looks for equal states and adds an
   advantage of the episode, and MT-GRPO (Zeng et al. 2025, arXiv:2505.11821) compares turn rewards and outcomes each by
   themselves and adds those advantages up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels import group_advantages, kl_estimate

from ..config import GroupConfig, RunConfig
from ..context import Context
from ..schedule import Stage
from . import greedy, records, redraw, rollouts
from .algorithm import RoleSpec
from .policy import SamplingAlgorithm, update_stage
from .rollouts import at_tokens, equal_groups, record_scores, shaped


def advantage(ctx: Context, _, x) -> dict[str, Tensor]:
    """How each response's score compares with its group's, at each of its tokens; or how each of its turns does.

    A row without a sampled token, whose environment has failed, is in no group and in none of the figures.
    """
    config, metrics = ctx.settings, ctx.metrics
    mask, said = x.response_mask, x.response_mask.any(1)
    record_scores(ctx, x.scores[said])
    scores = shaped(ctx, x.scores, x.finished, mask)
    if hasattr(x, "ref_log_probs"):
        kl = (kl_estimate(x.log_probs, x.ref_log_probs) * mask).sum(1)
        metrics.mean("kl/mean", kl[said])
        metrics.record("kl/coef", config.kl_coef)
        scores = scores - config.kl_coef * kl if config.kl == "reward" else scores
    metrics.mean("reward/mean", scores[said])
    metrics.mean("score/equal_groups", equal_groups(scores, mask, config.samples_per_prompt).float())
    prompts = x.sample_ids // config.samples_per_prompt
    if config.credit == "turn":
        return {"advantages": of_turns(config, at_tokens(scores, mask, x.turn_rewards), mask, prompts)}
    baselines = None
    if config.advantage == "remax":
        baselines = shaped(ctx, x.baselines, x.greedy_finished, x.greedy_response_mask, is_new=False)
        metrics.mean("score/greedy", x.baselines)
        baselines = baselines.repeat_interleave(config.samples_per_prompt)
    found = group_advantages(
        scores,
        torch.where(said, prompts, -1 - x.sample_ids),  # alone where nothing was said
        config.advantage,
        counts=mask.sum(1),
        baselines=baselines,
        correction=config.std_correction,
        eps=config.std_eps,
    )
    return {"advantages": found.unsqueeze(1) * mask}


def of_turns(config: GroupConfig, rewards: Tensor, mask: Tensor, prompts: Tensor) -> Tensor:
    """Advantages `(B, T)` of turns, the spans of a mask `(B, T)`, by the sums of their rewards and of later turns'.

    Args:
        rewards: `(B, T)`, of sampled tokens.
        prompts: `(B,)`, equal numbers for trajectories that are compared.
    """
    turns = (mask & ~F.pad(mask[:, :-1], (1, 0))).cumsum(1)  # from 1 on; before the first, 0
    number = int(turns.max()) + 1
    counts = torch.zeros(len(mask), number, dtype=torch.int64).scatter_add_(1, turns, mask.long())
    returns = torch.zeros(counts.shape, dtype=torch.float64).scatter_add_(1, turns, rewards.double())
    for turn in range(number - 2, 0, -1):
        returns[:, turn] += config.turn_discount * returns[:, turn + 1]
    groups, there = prompts.unsqueeze(1) * number + torch.arange(number), counts > 0
    found = group_advantages(
        returns[there],
        groups[there],
        config.advantage,
        counts=counts[there],
        correction=config.std_correction,
        eps=config.std_eps,
    )
    advantages = torch.zeros_like(returns).masked_scatter(there, found).gather(1, turns) * mask
    return advantages.float()


def compared(settings: GroupConfig, sampled: Sequence[Stage]) -> tuple[list[Stage], tuple[str, ...]]:
    """The rows of `rollouts.stages` with those that a comparison of scores asks for besides, and the fields that
    `advantage` reads of them."""
    rollout, *infer, score = sampled
    measured: tuple[str, ...] = ("scores", "sample_ids", "finished", "response_mask")
    measured += ("turn_rewards",) if settings.credit == "turn" else ()
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
        return roles | rollouts.others(self.run, self.config)
