"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306), offline on answers that are good or bad.

| stage         | role      | kind  | reads                                                   | writes               |
|---------------|-----------|-------|---------------------------------------------------------|----------------------|
| ref_log_probs | reference | infer | tokens, lengths, loss_mask                              | ref_answer_log_probs |
| mismatched    | policy    | infer | tokens, lengths, loss_mask, desirable                   | answer_log_probs     |
| train_policy  | policy    | train | ..., desirable, ref_answer_log_probs, answer_log_probs  | -                    |

The first as in dpo.py. A batch has its rows twice: with their own answers, which are learned, and behind those each
with the answer of the row before, from which the KL is estimated. Both sides of a pair are answers of their own.

Where it deviates from the paper: the KL is that of all rows of a step, so that replicas and micro-batches change
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_kernels import kto_loss

from ..config import KTOConfig
from ..context import Context
from ..data.dataset import Example
from ..experience import Experience
from ..models.role import RoleModel
from ..models.work import Batch
from ..schedule import Stage, Works
from .dpo import DPO, REF, ROWS, Judged, sums_of
from .reference import Answer, answer_log_probs, answer_work
from .sft import text_work


def judge_answers(config: KTOConfig, log_probs: Tensor, batch: Batch, kl: Tensor) -> Judged:
    """Of answers `(B,)` by their log-probs. Right is what lies on its side of the KL."""
    log_ratios, desirable = log_probs - batch[REF], batch["desirable"]
    weights = {"desirable_weight": config.desirable_weight, "undesirable_weight": config.undesirable_weight}
    losses = kto_loss(log_ratios, desirable, kl, beta=config.beta, **weights)
    rewards = config.beta * log_ratios.detach() * batch["shares"]
    chosen, rejected = ((rewards * kind).sum() for kind in (desirable, ~desirable))
    return losses, sums_of(((log_ratios > kl) == desirable).sum(), chosen, rejected)


def of_kinds(x) -> dict[str, Tensor]:
    """Fields of the answers that are learned, with the factors that make a mean over all one over those of a kind."""
    good = x.desirable
    shares = torch.where(good, len(good) / good.sum().clamp_min(1), len(good) / (~good).sum().clamp_min(1))
    return {REF: x.ref_answer_log_probs[: len(good)], "desirable": good, "shares": shares}


def mismatched(ctx: Context, policy: RoleModel, x) -> Works:
    """The policy's view of answers to other prompts."""
    others = _rows(x, slice(len(x.desirable), None))
    return {"answer_log_probs": (yield answer_work(policy, others, ctx.settings.micro_batch_size))}


def train_answers(ctx: Context, policy: RoleModel, x) -> Works:
    """One step on the answers of the iteration."""
    number = len(x.desirable)
    kl = (x.answer_log_probs - x.ref_answer_log_probs[number:]).mean()

    def loss(hidden: Tensor, batch: Batch):
        found = judge_answers(ctx.settings, answer_log_probs(policy)(hidden, batch), batch, kl.clamp_min(0))
        return found[0].sum().float(), torch.tensor(len(found[0])), found[1]

    yield text_work(policy, _rows(x, slice(number)), loss, ctx.settings.micro_batch_size, fields=of_kinds(x))
    ctx.metrics.record("kl/mean", kl)
    ctx.metrics.record("train/tokens", x.lengths[:number].sum())
    return None


def _rows(x, rows: slice) -> Experience:
    return Experience(**{name: getattr(x, name)[rows] for name in ROWS})


class KTO(DPO):
    name = "kto"
    provided = frozenset({*ROWS, "desirable"})
    has_reference = True

    def training(self) -> list[Stage]:
        """The KL's stage as well."""
        reads = (*ROWS, "desirable")
        return [
            Stage("mismatched", "infer", mismatched, "policy", reads, ("answer_log_probs",)),
            Stage("train_policy", "train", train_answers, "policy", (*reads, REF, "answer_log_probs")),
        ]

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """Of each example its answer, then of each the answer of the one before it, as far as there is room."""
        own = [(e.before, (e.rejected if e.chosen is None else e.chosen) or []) for e in examples]
        room, others = self.run.data.max_seq_len, [own[-1], *own[:-1]]
        return own + [(e.before, said[: room - len(e.before)]) for e, (_, said) in zip(examples, others, strict=True)]

    def experience(self, ctx: Context, examples: Sequence[Example]) -> Experience:
        """With the kinds of the answers."""
        x = super().experience(ctx, examples)
        x.desirable = torch.tensor([e.chosen is not None for e in examples])
        return x

    def judge(self, x, log_probs: Tensor) -> Judged:
        """As `train_answers` does."""
        number = len(x.desirable)
        kl = (log_probs - x.ref_answer_log_probs)[number:].mean().clamp_min(0)
        return judge_answers(self.config, log_probs[:number], of_kinds(x), kl)
