"""Reward model from preference pairs (Ouyang et al. 2022, eq. 1), started from the SFT policy.

| stage        | role   | kind  | reads           | writes |
|--------------|--------|-------|-----------------|--------|
| train_reward | reward | train | tokens, lengths | -      |

Rows come in pairs, chosen before rejected, and both go through one forward. At the end the scores are centred:
the policy that samples later scores 0 on average.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from rlhf_kernels import pairwise_loss

from ..config import RunConfig
from ..context import Context
from ..data.dataset import Example
from ..experience import Experience, pad_rows
from ..models.layers import ScalarHead
from ..models.role import RoleModel
from ..models.stream import forward
from ..models.work import Batch, Work
from ..schedule import Stage, Works
from .algorithm import Evaluation, RoleSpec
from .heads import last_scores, score_batch
from .samples import sample_dialogues


def preference_loss(output: Tensor, batch: Batch):
    """Loss of a micro-batch of pairs: summed over pairs, counted by them."""
    chosen, rejected = last_scores(output, batch).view(-1, 2).unbind(1)
    with torch.no_grad():
        statistics = {"accuracy": (chosen > rejected).float().sum(), "margin": (chosen - rejected).sum()}
    return pairwise_loss(chosen, rejected).sum(), torch.tensor(len(chosen)), statistics


def train_reward(ctx: Context, reward: RoleModel, x) -> Works:
    """One step on the pairs of the iteration."""
    batch = score_batch(reward, x.tokens, x.lengths)
    yield Work(reward, batch, preference_loss, 2 * ctx.config.reward.micro_batch_size, together=2)
    return None


def pair_rows(examples: list[Example], multiple: int) -> Experience:
    """Chosen and rejected of each pair in turn, right-padded."""
    rows = [e.reward_before + (answer or []) for e in examples for answer in (e.chosen, e.rejected)]
    tokens, lengths = pad_rows(rows, multiple)
    return Experience(tokens=tokens, lengths=lengths)


class Reward:
    name = "reward"
    provided = frozenset({"tokens", "lengths"})
    stages = (Stage("train_reward", "train", train_reward, "reward", ("tokens", "lengths")),)

    def __init__(self, config: RunConfig):
        self.config = config.reward
        self.iterations = config.reward.iterations
        self.changes_at_end = True
        self.eval_every, self.save_every = config.reward.eval_every, config.reward.save_every

    def roles(self) -> dict[str, RoleSpec]:
        """A scalar head on the SFT policy, or on the model of `reward.path`."""
        sft = (("sft", "policy"),)
        start = () if self.config.path else sft
        return {
            "reward": RoleSpec("scalar", start, self.config.optimizer, self.iterations, base="reward"),
            "policy": RoleSpec("lm", sft),  # says what the scores are centred on
        }

    def batch(self, ctx: Context) -> Experience:
        """Pairs as neighbouring rows, the chosen one first."""
        ctx.state.ending = None
        return pair_rows(ctx.draw(self.name, self.config.batch_size), ctx.mesh.tp)

    def evaluate(self, ctx: Context, final: bool) -> Evaluation:
        """Accuracy on held-out pairs; at the end, centres the scores, unless that is saved already."""
        if final and ctx.state.ending is not None:
            return Evaluation(ctx.state.ending)
        reward = ctx.roles["reward"]
        x = pair_rows(ctx.datasets[self.name].held_out, ctx.mesh.tp)
        assert x.tokens is not None and x.lengths is not None
        batch = score_batch(reward, x.tokens, x.lengths)
        scores = forward(reward, batch, last_scores, 2 * self.config.micro_batch_size)
        chosen, rejected = scores.view(-1, 2).unbind(1)
        evaluation = Evaluation(
            {
                "eval/accuracy": float((chosen > rejected).float().mean()),
                "eval/loss": float(pairwise_loss(chosen, rejected).mean()),
            }
        )
        if final:
            evaluation.figures["eval/offset"] = self._centre(ctx)
            ctx.state.ending = evaluation.figures
        return evaluation

    def _centre(self, ctx: Context) -> float:
        """Moves the head's bias so that the SFT policy's responses to training prompts score 0 on average."""
        reward, policy = ctx.roles["reward"], ctx.roles["policy"]
        examples = ctx.datasets[self.name].batch(0, 2 * ctx.config.samples_like.prompts_per_iteration)
        found = sample_dialogues(ctx, policy, examples)
        tokens, lengths = pad_rows(
            [e.reward_prompt + r.tokens for e, r in zip(examples, found.responses, strict=True)], ctx.mesh.tp
        )
        batch = score_batch(reward, tokens, lengths)
        offset = float(forward(reward, batch, last_scores, 2 * self.config.micro_batch_size).mean())
        with reward.on_device(changes=True), torch.no_grad():
            if ctx.mesh.is_last_stage:
                cast(ScalarHead, reward.chunks[-1].output_layer).bias.sub_(offset)
        return offset
