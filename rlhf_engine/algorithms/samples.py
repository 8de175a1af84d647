"""Held-out prompts: what a policy says to them, and how it compares with the policy that it began as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_kernels import kl_estimate

from ..context import Context
from ..data.dataset import Example
from ..experience import Experience, pad_rows, spans
from ..models.role import RoleModel
from ..models.stream import infer
from ..rollout.generate import Response, rollout
from ..rollout.sampling import sample_keys
from .algorithm import Evaluation
from .rollouts import log_probs_work, score_by_function, scores_work

EVAL_ITERATION = 1 << 40  # no training iteration shares its noise
NUM_CARDS = 8


@dataclass
class Samples:
    """What one policy said to some prompts."""

    examples: list[Example]
    responses: list[Response]
    texts: list[str]
    golds: list[float] | None

    def cards(self) -> list[dict[str, object]]:
        """The first few dialogues as the report shows them."""
        return [
            {
                "prompt": example.prompt_text.strip(),
                "after": self.texts[i].strip(),
                "gold_after": self.golds[i] if self.golds is not None else None,
            }
            for i, example in enumerate(self.examples[:NUM_CARDS])
        ]


def sample_dialogues(ctx: Context, policy: RoleModel, examples: list[Example]) -> Samples:
    """One response to each prompt, with the same noise whichever policy speaks."""
    keys = sample_keys(ctx.config.seed, EVAL_ITERATION, torch.arange(len(examples)))
    prompts = [example.prompt for example in examples]
    tokenizer = ctx.tokenizer
    responses = rollout(policy, prompts, keys, ctx.config.rollout, tokenizer.end_ids, decode=tokenizer.decode)
    texts = [tokenizer.decode(response.tokens) for response in responses]
    golds = None
    if ctx.gold is not None:
        golds = [ctx.gold(e.prompt_text, text) for e, text in zip(examples, texts, strict=True)]
    return Samples(examples, responses, texts, golds)


def compare(ctx: Context) -> Evaluation:
    """Before against after on held-out prompts: gold and reward model's scores, win rate, KL per response."""
    examples = ctx.datasets[ctx.phase].held_out[: ctx.settings.eval_prompts]
    before = sample_dialogues(ctx, ctx.roles["reference"], examples)
    after = sample_dialogues(ctx, ctx.roles["policy"], examples)
    experience = _experience(ctx, examples, after.responses)
    kl = _kl(ctx, experience)
    figures = {"eval/kl": float(kl.mean())}
    cards = after.cards()
    for i, card in enumerate(cards):
        card["before"] = before.texts[i].strip()
    if "reward" in ctx.roles or ctx.reward_fn is not None:
        for when, responses in (("before", before.responses), ("after", after.responses)):
            x = _experience(ctx, examples, responses)
            if (reward := ctx.roles.get("reward")) is not None:
                (scores,) = infer([scores_work(ctx, reward, x)])
            else:
                scores = score_by_function(ctx, None, x)["scores"]
            figures[f"eval/score_{when}"] = float(scores.mean())
            for i in range(min(NUM_CARDS, len(cards))):
                cards[i][f"score_{when}"] = float(scores[i])
    if before.golds is not None and after.golds is not None:
        figures["eval/gold_before"] = sum(before.golds) / len(examples)
        figures["eval/gold_after"] = sum(after.golds) / len(examples)
        wins = sum(a > b for a, b in zip(after.golds, before.golds, strict=True))
        ties = sum(a == b for a, b in zip(after.golds, before.golds, strict=True))
        figures["eval/win_rate"], figures["eval/tie_rate"] = wins / len(examples), ties / len(examples)
        for i, card in enumerate(cards):
            card["gold_before"] = before.golds[i]
    return Evaluation(figures, cards)


def _experience(ctx: Context, examples: Sequence[Example], responses: Sequence[Response]) -> Experience:
    prompts = [example.prompt for example in examples]
    tokens, lengths = pad_rows([p + r.tokens for p, r in zip(prompts, responses, strict=True)], ctx.mesh.tp)
    mask = spans(torch.tensor([len(p) for p in prompts]), lengths, tokens.shape[1])
    reward_prompts = [example.reward_prompt for example in examples]
    return Experience(prompts, reward_prompts, tokens=tokens, lengths=lengths, response_mask=mask)


def _kl(ctx: Context, x: Experience) -> Tensor:
    """Sum over each response of k1 between policy and reference, `(B,)`."""
    works = [log_probs_work(ctx, ctx.roles[name], x) for name in ("policy", "reference")]
    policy, reference = (infer([work])[0][:, 0] for work in works)
    assert x.response_mask is not None
    return (kl_estimate(policy, reference) * x.response_mask).sum(1)
