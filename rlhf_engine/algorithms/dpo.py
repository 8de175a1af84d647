"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its kin, offline on pairs.

| stage         | role      | kind  | reads                                            | writes               |
|---------------|-----------|-------|--------------------------------------------------|----------------------|
| ref_log_probs | reference | infer | tokens, lengths, loss_mask                       | ref_answer_log_probs |
| train_policy  | policy    | train | tokens, lengths, loss_mask, ref_answer_log_probs | -                    |

The first is there with `dpo.reference=each_step`; else a batch has what it would write (reference.py). Losses without
a reference (simpo, orpo) have neither. Pairs are neighbouring rows, chosen before rejected, in one forward; the losses
are in rlhf_kernels.preference_loss, and docs/preference.md says where they are not as their papers or other engines.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_kernels import preference_loss

from ..config import DPOConfig, RunConfig
from ..context import Context
from ..data.dataset import Example
from ..experience import Experience
from ..models.role import RoleModel
from ..models.stream import infer
from ..models.work import Batch
from ..schedule import Stage, Works
from .algorithm import Evaluation, RoleSpec
from .reference import Answer, KnownReference, answer_log_probs, answer_work, answered
from .samples import compare
from .sft import text_work

ROWS, REF = ("tokens", "lengths", "loss_mask"), "ref_answer_log_probs"
BASE = RoleSpec("lm", (("sft", "policy"),))  # what the policy starts from, and the reference stays
Judged = tuple[Tensor, dict[str, Tensor]]  # the loss of each pair or answer, and sums over them


def ref_log_probs(ctx: Context, reference: RoleModel, x) -> Works:
    """The frozen reference's view of the answers."""
    return {REF: (yield answer_work(reference, x, ctx.settings.micro_batch_size))}


def sums_of(right: Tensor, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Statistics: the implicit rewards of chosen and of rejected answers may fall together."""
    return {"accuracy": right, "margin": chosen - rejected, "chosen": chosen, "rejected": rejected}


def judge_pairs(config: DPOConfig, log_probs: Tensor, batch: Batch) -> Judged:
    """Of chosen answers, each before the rejected one, by their log-probs `(2 P,)`."""
    scores = log_probs - batch[REF] if config.has_reference else log_probs
    scores = scores / batch["loss_mask"].sum(1) if config.takes_means else scores
    chosen, rejected = scores.view(-1, 2).unbind(1)
    options = {"beta": config.strength, "margin": config.margin, "label_smoothing": config.label_smoothing}
    rewards = config.strength * scores.detach()
    sums = sums_of((chosen > rejected).sum(), rewards[::2].sum(), rewards[1::2].sum())
    return preference_loss(config.loss, chosen, rejected, **options), sums


def train_pairs(ctx: Context, policy: RoleModel, x) -> Works:
    """One step on the pairs of the iteration."""

    def loss(hidden: Tensor, batch: Batch):
        losses, sums = judge_pairs(ctx.settings, answer_log_probs(policy)(hidden, batch), batch)
        return losses.sum().float(), torch.tensor(len(losses)), sums

    refs = {REF: x.ref_answer_log_probs} if ctx.settings.has_reference else {}
    yield text_work(policy, x, loss, 2 * ctx.settings.micro_batch_size, together=2, fields=refs)
    ctx.metrics.record("train/tokens", x.lengths.sum())
    return None


# -- the phases ----------------------------------------------------------------------------------------------


class DPO:
    name = "dpo"
    changes_at_end = False
    provided = frozenset(ROWS)

    def __init__(self, config: RunConfig):
        self.run, self.config = config, getattr(config, self.name)
        self.iterations = self.config.iterations
        self.eval_every, self.save_every = self.config.eval_every, self.config.save_every
        self.known: KnownReference | None = None
        self.asks = self.config.reference if self.has_reference else "never"
        self.provided |= {REF} if self.asks == "cached" else set()
        asked = Stage("ref_log_probs", "infer", ref_log_probs, "reference", ROWS, (REF,))
        self.stages = [*([asked] if self.asks == "each_step" else []), *self.training()]

    @property
    def has_reference(self) -> bool:
        """Whether the loss asks for one."""
        return self.config.has_reference

    def training(self) -> list[Stage]:
        """Rows of the table behind the reference's."""
        reads = (*ROWS, REF) if self.config.has_reference else ROWS
        return [Stage("train_policy", "train", train_pairs, "policy", reads)]

    def roles(self) -> dict[str, RoleSpec]:
        """The policy, and the reference where it stays."""
        policy = replace(BASE, optimizer=self.config.optimizer, total_steps=self.iterations)
        return {"policy": policy, **({"reference": BASE} if self.asks == "each_step" else {})}

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """The rows of examples: chosen and rejected of each pair in turn."""
        return [(e.before, answer or []) for e in examples for answer in (e.chosen, e.rejected)]

    def batch(self, ctx: Context) -> Experience:
        """The next rows, with what the reference says of them, where that is known."""
        self._look_up(ctx)
        return self.experience(ctx, ctx.draw(self.name, self.config.batch_size))

    def experience(self, ctx: Context, examples: Sequence[Example]) -> Experience:
        """Their rows as stages read them."""
        answers = self.answers(examples)
        x = answered(answers, ctx.mesh.tp)
        x.ref_answer_log_probs = self.known.of(answers) if self.known else None
        return x

    def _look_up(self, ctx: Context) -> None:
        """Has what the reference says of all rows that are left to draw, and of those held out."""
        if self.asks == "cached" and self.known is None:
            data, size, first = ctx.datasets[self.name], self.config.batch_size, ctx.state.position
            starts = range(first, first + (self.iterations - ctx.state.iteration) * size, size)
            batches = itertools.chain((data.batch(start, size) for start in starts), [data.held_out])
            known = KnownReference(ctx, BASE)
            known.learn(self.answers(examples) for examples in batches)
            self.known = known

    def judge(self, x, log_probs: Tensor) -> Judged:
        """Of held-out rows, by what the policy says of them."""
        return judge_pairs(self.config, log_probs, vars(x))

    def evaluate(self, ctx: Context, final: bool) -> Evaluation:
        """Loss and implicit rewards of held-out rows; at the end the policy beside what it began as."""
        self._look_up(ctx)
        x, roles, size = self.experience(ctx, ctx.datasets[self.name].held_out), ctx.roles, self.config.micro_batch_size
        if self.asks == "each_step":
            (x.ref_answer_log_probs,) = infer([answer_work(roles["reference"], x, size)])
        losses, sums = self.judge(x, infer([answer_work(roles["policy"], x, size)])[0])
        means = {f"eval/{name}": float(total) / len(losses) for name, total in sums.items()}
        evaluation = Evaluation({"eval/loss": float(losses.mean()), **means})
        if final:
            ctx.roles = {"reference": roles.get("reference") or ctx.build("reference", BASE), **roles}
            found = compare(ctx)
            ctx.roles, evaluation.samples = roles, found.samples
            evaluation.figures |= found.figures
        return evaluation
