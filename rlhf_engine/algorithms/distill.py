"""On-policy distillation: the policy learns from what a teacher says of the policy's own responses.

Agarwal et al. 2023, arXiv:2306.13649 (GKD, with lambda = 1 and the reverse KL); Gu et al. 2023, arXiv:2306.08543
(MiniLLM); Lu et al. 2025, "On-Policy Distillation", Thinking Machines.

| stage         | role    | kind    | reads                                          | writes                        |
|---------------|---------|---------|------------------------------------------------|-------------------------------|
| rollout       | policy  | rollout | prompts, sample_ids                            | tokens, lengths, finished,    |
|               |         |         |                                                | response_mask, sampler_...    |
| log_probs     | policy  | infer   | tokens, lengths, response_mask, sampler_...    | log_probs                     |
| ref_log_probs | teacher | infer   | tokens, lengths, response_mask                 | ref_log_probs, teacher_hidden |
| score         | reward  | infer   | prompts, reward_prompts, tokens, lengths       | scores                        |
| advantage     | -       | local   | log_probs, ref_log_probs, scores, ...          | advantages                    |
| train_policy  | policy  | train   | tokens, ..., advantages, teacher_hidden        | -                             |
| gold, ...     | -       | local   | as PPO's                                       |                               |

With `distill.kl=token` a token's advantage is the teacher's log-prob less the policy's, in the policy loss of PPO, and
there is no teacher_hidden. With `full` the loss has KL(policy || teacher) over the vocabulary before each response
token, and teacher_hidden is what the teacher's head reads there. Scores are there with `distill.reward_coef`, compared
as GRPO's, with its further rows for redraws and ReMax; their advantages are added.

Where it deviates from the papers:
1. A token answers for itself alone: MiniLLM's return is the sum over the tokens after it too (a discount of 0 here).
2. Responses are all the policy's: GKD mixes in rows of a data set, MiniLLM the teacher's samples.
3. As in GKD, the full form's gradient does not go through the sampling.
4. The teacher's distribution has the rollout's temperature, as the policy's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rlhf_kernels import kl_estimate

from ..config import RunConfig
from ..context import Context
from ..experience import packed
from ..models.role import RoleModel, head_weight
from ..models.work import Batch, LossFn, Work
from ..schedule import Fields, Stage, Works
from . import grpo, records, rollouts
from .algorithm import Evaluation, RoleSpec
from .heads import choose_taught, outputs_before, policy_log_probs, teacher_kl
from .policy import SamplingAlgorithm, averaging, policy_works, train_policy, update_stage
from .samples import compare


def ask_teacher(ctx: Context, teacher: RoleModel, x) -> Works:
    """The teacher's log-probs of what the policy said."""
    both = yield rollouts.log_probs_work(ctx, teacher, x)
    return {"ref_log_probs": both[:, 0]}


def ask_teacher_all(ctx: Context, teacher: RoleModel, x) -> Works:
    """The same, and the states that its head makes all log-probs of."""

    def fn(hidden: Tensor, batch: Batch) -> Tensor:
        log_probs, _ = policy_log_probs(teacher, hidden, batch, ctx.config.rollout.temperature)
        return torch.cat([log_probs.unsqueeze(1), outputs_before(teacher, hidden)], 1)

    found = yield replace(rollouts.log_probs_work(ctx, teacher, x), fn=fn)
    return {"ref_log_probs": found[:, 0], "teacher_hidden": packed(found[:, 1:].to(teacher.dtype), x.response_mask)}


def advantage(ctx: Context, _, x) -> Fields:
    """What the teacher says of each token, in the token form, and how the response's score compares."""
    config, kl = ctx.settings, kl_estimate(x.log_probs, x.ref_log_probs) * x.response_mask
    found = -config.kl_coef * kl if config.kl == "token" else torch.zeros_like(kl)
    if config.is_scored:
        found = found + config.reward_coef * grpo.advantage(ctx, None, x)["advantages"]
    else:
        ctx.metrics.mean("kl/mean", kl.sum(1)[x.response_mask.any(1)])
        ctx.metrics.record("kl/coef", config.kl_coef)
    return {"advantages": found}


def train_full(ctx: Context, policy: RoleModel, x) -> Works:
    """One step on each minibatch, with the KL over the vocabulary in its loss."""
    teacher, head = ctx.roles["teacher"], torch.empty(0)
    if ctx.mesh.is_last_stage:
        with teacher.on_device():
            head = head_weight(teacher.chunks[-1]).detach()
            head = head.clone() if teacher.is_offloaded else head
    for _, work, _ in policy_works(ctx, policy, x):
        yield taught(ctx, work, x.teacher_hidden[work.batch["samples"]], head)
    return None


def taught(ctx: Context, work: Work, teacher_hidden: Tensor, head: Tensor) -> Work:
    """A step's work with the KL to the teacher in its loss."""
    config, rollout = ctx.settings, ctx.config.rollout
    is_learned = config.is_scored or config.entropy_coef > 0  # what the policy loss has besides
    plain: LossFn = work.fn  # type: ignore[assignment]

    def loss(hidden: Tensor, batch: Batch):
        with torch.set_grad_enabled(is_learned and torch.is_grad_enabled()):
            other, count, sums = plain(hidden, batch)
        mask = batch["response_mask"]
        kl = teacher_kl(work.role, hidden, batch, head, rollout.temperature)
        weights, _ = averaging(mask, config.loss_mean, ctx.config.most_new_tokens)
        sums = {**sums, "kl": (kl.detach().sum(), mask.sum())}
        return other + config.kl_coef * (kl.sum(1) * weights).sum(), count, sums

    batch = {**work.batch, "teacher_hidden": teacher_hidden}
    return replace(work, fn=loss, batch=batch, prepare=lambda part: choose_taught(work.prepare(part), "response_mask"))


def stage_table(config: RunConfig) -> tuple[Stage, ...]:
    """The rows that the settings ask for."""
    settings, states = config.distill, ["teacher_hidden"] if config.distill.kl == "full" else []
    rollout, log_probs, score = rollouts.stages(config, reference=False)
    ask, train = (ask_teacher_all, train_full) if states else (ask_teacher, train_policy)
    said = ("ref_log_probs", *states)
    sampled = [rollout, log_probs, Stage("ref_log_probs", "infer", ask, "teacher", rollouts.SEQUENCE, said)]
    measured: tuple[str, ...] = ("log_probs", "ref_log_probs", "response_mask")
    if settings.is_scored:
        sampled, measured = grpo.compared(settings, [*sampled, score])
    table = [
        *sampled,
        Stage("advantage", "local", advantage, None, measured, ("advantages",)),
        *rollouts.importance_stages(config, settings),
        update_stage(config, "distill", train, states, "teacher" if states else None),
    ]
    return (*table, *records.stages(settings, table))


class Distill(SamplingAlgorithm):
    name = "distill"

    def __init__(self, config: RunConfig):
        super().__init__(config)
        self.stages = stage_table(config)

    def roles(self) -> dict[str, RoleSpec]:
        """The policy from SFT, the teacher from its folder, and the reward model where it is used."""
        policy = RoleSpec("lm", rollouts.BEFORE, self.config.optimizer, self.steps)
        teacher = RoleSpec("lm", base="teacher")
        return {"policy": policy, "teacher": teacher, **rollouts.others(self.run, self.config)}

    def compare(self, ctx: Context) -> Evaluation:
        """The policy beside what it began as; the KL is that to the teacher."""
        roles = ctx.roles
        ctx.roles = {**roles, "reference": ctx.build("reference", RoleSpec("lm", rollouts.BEFORE))}
        found, ctx.roles = compare(ctx, "teacher"), roles
        return found
