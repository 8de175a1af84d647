"""Supervised fine-tuning on the chosen side of preference rows: cross-entropy of the assistant's tokens.

| stage        | role   | kind  | reads                        | writes |
|--------------|--------|-------|------------------------------|--------|
| train_policy | policy | train | tokens, lengths, loss_mask   | -      |
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..config import RunConfig
from ..context import Context
from ..data.dataset import Example
from ..experience import Experience, pad_rows
from ..models.role import RoleModel
from ..models.stream import infer
from ..models.work import Batch, InferFn, LossFn, Work
from ..schedule import Stage, Works
from .algorithm import Evaluation, RoleSpec
from .heads import choose, policy_log_probs
from .samples import sample_dialogues


def cross_entropy(role: RoleModel) -> LossFn:
    """Loss of a micro-batch: summed over the tokens of `loss_mask`, counted by them."""

    def loss(hidden: Tensor, batch: Batch):
        log_probs, _ = policy_log_probs(role, hidden, batch)
        return -log_probs.sum(), batch["loss_mask"][:, 1:].sum(), {}

    return loss


def text_work(
    policy: RoleModel, x, fn: InferFn | LossFn, micro_batch_size: int, together: int = 1, fields: Batch | None = None
) -> Work:
    """`fn` of the policy's output for rows of text, where it reads the log-probs of the tokens in `loss_mask`, and
    further fields of the rows."""
    batch = {"tokens": x.tokens, "lengths": x.lengths, "loss_mask": x.loss_mask, **(fields or {})}
    prepare = functools.partial(choose, policy, mask="loss_mask")
    return Work(policy, batch, fn, micro_batch_size, together, prepare=prepare)


def train_policy(ctx: Context, policy: RoleModel, x) -> Works:
    """One step on the dialogues of the iteration."""
    yield text_work(policy, x, cross_entropy(policy), ctx.config.sft.micro_batch_size)
    ctx.metrics.record("train/tokens", x.lengths.sum())
    return None


def supervised(examples: list[Example], multiple: int) -> Experience:
    """Whole dialogues, right-padded, with a mask of what the assistant said."""
    answers = [e.chosen or [] for e in examples]
    tokens, lengths = pad_rows([e.before + a for e, a in zip(examples, answers, strict=True)], multiple)
    spoken = [[*map(int, e.before_spoken), *[1] * len(a)] for e, a in zip(examples, answers, strict=True)]
    mask, _ = pad_rows(spoken, multiple)
    return Experience(tokens=tokens, lengths=lengths, loss_mask=mask.bool())


class SFT:
    name = "sft"
    provided = frozenset({"tokens", "lengths", "loss_mask"})
    stages = (Stage("train_policy", "train", train_policy, "policy", ("tokens", "lengths", "loss_mask")),)

    def __init__(self, config: RunConfig):
        self.config = config.sft
        self.iterations = config.sft.iterations
        self.changes_at_end = False
        self.eval_every, self.save_every = config.sft.eval_every, config.sft.save_every

    def roles(self) -> dict[str, RoleSpec]:
        """The policy alone, from its base."""
        return {"policy": RoleSpec("lm", optimizer=self.config.optimizer, total_steps=self.iterations)}

    def batch(self, ctx: Context) -> Experience:
        """The next dialogues, with the tokens that are learned."""
        return supervised(ctx.draw(self.name, self.config.batch_size), ctx.mesh.tp)

    def evaluate(self, ctx: Context, final: bool) -> Evaluation:
        """Held-out loss per token; at the end, what the policy says to held-out prompts."""
        policy, held_out = ctx.roles["policy"], ctx.datasets[self.name].held_out
        x = supervised(held_out, ctx.mesh.tp)
        assert x.loss_mask is not None

        def log_probs(hidden: Tensor, batch: Batch) -> Tensor:
            return policy_log_probs(policy, hidden, batch)[0]

        (result,) = infer([text_work(policy, x, log_probs, self.config.micro_batch_size)])
        loss = float(-result.sum() / x.loss_mask[:, 1:].sum())
        evaluation = Evaluation({"eval/loss": loss, "eval/perplexity": float(torch.tensor(loss).exp())})
        prompts = [example for example in held_out if example.prompt][: ctx.config.samples_like.eval_prompts]
        if final and prompts:
            found = sample_dialogues(ctx, policy, prompts)
            if found.golds is not None:
                evaluation.figures["eval/gold"] = float(torch.tensor(found.golds).mean())
            evaluation.samples = found.cards()
        return evaluation
