"""Held-out prompts: what a policy says to them, and how it compares with the policy that it began as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_kernels import kl_estimate

from ..config import RolloutConfig
from ..context import Context
from ..data.dataset import Example
from ..experience import Experience
from ..models.role import RoleModel
from ..models.stream import infer
from ..rollout.generate import rollout
from ..rollout.responses import Responses
from ..rollout.sampling import sample_keys
from . import turns
from .algorithm import Evaluation
from .rollouts import function_scores, log_probs_work, scores_work

EVAL_ITERATION = 1 << 40  # no training iteration shares its noise
NUM_CARDS = 8


@dataclass
class Samples:
    """What one policy said to some prompts."""

    examples: list[Example]
    x: Experience
    responses: Responses
    texts: list[str]
    golds: list[float] | None
    # where an environment answers, of the first few: what it asked, and what was said
    prompts: list[str] | None = None
    turns: list[list[dict[str, object]]] | None = None

    def cards(self) -> list[dict[str, object]]:
        """The first few dialogues as the report shows them."""
        return [
            {
                "prompt": (self.prompts[i] if self.prompts is not None else example.prompt_text).strip(),
                "after": self.texts[i].strip(),
                "gold_after": self.golds[i] if self.golds is not None else None,
                **({"turns_after": self.turns[i]} if self.turns is not None else {}),
            }
            for i, example in enumerate(self.examples[:NUM_CARDS])
        ]


def sample_dialogues(ctx: Context, policy: RoleModel, examples: list[Example]) -> Samples:
    """One response to each prompt, with the same noise whichever policy speaks."""
    x, responses = respond(ctx, policy, examples, EVAL_ITERATION, ctx.config.rollout)
    texts = [ctx.tokenizer.decode(response.tokens) for response in responses]
    golds = None
    if ctx.gold is not None:
        golds = [ctx.gold(e.prompt_text, text) for e, text in zip(examples, texts, strict=True)]
    found = Samples(examples, x, responses, texts, golds)
    if x.turn_rewards is not None:
        assert x.prompts is not None
        decode, first = ctx.tokenizer.decode, x.prompts[:NUM_CARDS]
        found.prompts, found.turns = [decode(prompt) for prompt in first], []
        for prompt, rewards, said in zip(first, x.turn_rewards.tolist(), responses, strict=False):
            found.turns.append(turns.spoken(decode, said.tokens, said.said, rewards[len(prompt) :][: len(said.tokens)]))
    return found


def respond(
    ctx: Context,
    policy: RoleModel,
    examples: Sequence[Example],
    iteration: int,
    config: RolloutConfig,
    samples: int = 1,
) -> tuple[Experience, Responses]:
    """A response to each prompt, or a trajectory, with the noise of an iteration; the former to be scored.

    Args:
        samples: of each prompt, side by side.
    """
    keys, tokenizer = sample_keys(ctx.config.seed, iteration, torch.arange(len(examples))), ctx.tokenizer
    rows = turns.row_fields(ctx, examples, iteration, samples)
    if ctx.config.env.fn is not None:
        found = turns.talk(ctx, policy, rows, keys, config)
        turns.figures(ctx, found)  # which says what has failed
        return Experience(**found.fields(ctx), row_fields=rows), found.responses
    prompts = [example.prompt for example in examples]
    responses = rollout(policy, prompts, keys, config, tokenizer.end_ids, decode=tokenizer.decode)
    tokens, lengths, mask = responses.behind(prompts, ctx.mesh.tp)
    rewarded = [example.reward_prompt for example in examples]
    return Experience(prompts, rewarded, rows, tokens=tokens, lengths=lengths, response_mask=mask), responses


def compare(ctx: Context, to: str = "reference") -> Evaluation:
    """After, and with a reference before, on held-out prompts: gold and reward model's scores, win rate, KL per
    response.

    Args:
        to: the role that the KL is taken to, if there is one.
    """
    examples = ctx.datasets[ctx.phase].held_out[: ctx.settings.eval_prompts]
    names = {"before": "reference", "after": "policy"}
    said = {when: sample_dialogues(ctx, ctx.roles[role], examples) for when, role in names.items() if role in ctx.roles}
    cards, figures = said["after"].cards(), {}
    if to in ctx.roles:
        figures["eval/kl"] = float(_kl(ctx, to, said["after"].x).mean())
    if "before" in said:
        for i, card in enumerate(cards):
            card["before"] = said["before"].texts[i].strip()
            if (before := said["before"].turns) is not None:
                card["turns_before"] = before[i]
    for when, found in said.items():
        scores, means = scores_of(ctx, found.x)
        figures |= {f"eval/score_{when}/{label}": mean for label, mean in means.items()}
        if scores is not None:
            figures[f"eval/score_{when}"] = float(scores.mean())
        if found.golds is not None:
            figures[f"eval/gold_{when}"] = sum(found.golds) / len(examples)
        for i, card in enumerate(cards):
            card |= {f"score_{when}": float(scores[i])} if scores is not None else {}
            card |= {f"gold_{when}": found.golds[i]} if found.golds is not None else {}
    golds = [found.golds for found in said.values() if found.golds is not None]
    if len(golds) == 2:
        pairs = list(zip(*golds, strict=True))
        figures["eval/win_rate"] = sum(after > before for before, after in pairs) / len(examples)
        figures["eval/tie_rate"] = sum(after == before for before, after in pairs) / len(examples)
    return Evaluation(figures, cards)


def scores_of(ctx: Context, x: Experience) -> tuple[Tensor | None, dict[str, float]]:
    """Of the reward model, reward functions and environments, where there are some, and the mean of each function."""
    if (reward := ctx.roles.get("reward")) is not None:
        return infer([scores_work(ctx, reward, x)])[0], {}
    scores, means = function_scores(ctx, x) if ctx.rewards is not None else (None, {})
    if x.turn_rewards is not None:
        scores = x.turn_rewards.double().sum(1).float() + (0 if scores is None else scores)
    return scores, means


def _kl(ctx: Context, to: str, x: Experience) -> Tensor:
    """Sum over each response of k1 between the policy and a role, `(B,)`."""
    works = [log_probs_work(ctx, ctx.roles[name], x) for name in ("policy", to)]
    policy, reference = (infer([work])[0][:, 0] for work in works)
    assert x.response_mask is not None
    return (kl_estimate(policy, reference) * x.response_mask).sum(1)
