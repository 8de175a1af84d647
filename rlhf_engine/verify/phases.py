"""Checks of a phase's first iteration: its losses against formulas, and what PPO promises of its first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..models.stream import Work, infer
from . import plain
from .findings import TOLERANCES, Finding, relative
from .measure import Iteration
from .updates import Check, complete, micro_batches, reported_loss, slope, tolerance, whole_loss

# -- losses ----------------------------------------------------------------------------------------------------


def raw_outputs(work: Work) -> Tensor:
    """A scalar head's outputs where the model makes them, `(B, T)` float64."""
    return infer([replace(work, fn=lambda output, batch: output.squeeze(-1).double())])[0]


def plain_log_probs(it: Iteration, work: Work, mask: str) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of a policy's work, of the tokens that one of its fields selects."""
    sampling, ban = it.ctx.config.rollout, (it.ctx.tokenizer.end_ids, it.ctx.config.rollout.min_new_tokens)
    options = (sampling.temperature, ban) if it.phase == "ppo" else (1.0, ((), 0))

    def fn(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        hidden, head = plain.whole_hidden(work.role, output), plain.whole_head(work.role)
        return torch.stack(plain.log_probs(hidden, head, batch["tokens"], batch[mask], *options), 1)

    both = infer([replace(work, fn=fn)])[0]
    return both[:, 0], both[:, 1]


def against_plain(found: float, wanted: float, it: Iteration) -> Finding:
    ratio = f" ({found / wanted:.4g} times as large)" if wanted else ""
    return Finding(relative(found, wanted), tolerance(it).loss, f"{found:.6g} for {wanted:.6g}{ratio}")


def answers(it: Iteration, work: Work) -> Tensor:
    """What the assistant says in the rows of an SFT step, `(B, T)`, by the examples alone."""
    mask = torch.zeros(work.batch["tokens"].shape, dtype=torch.bool)
    for row, example in enumerate(it.examples):
        start = len(example.before)
        mask[row, start : start + len(example.chosen or ())] = True
        mask[row, :start] = torch.tensor(example.before_spoken, dtype=torch.bool)
    mask[:, 0] = False  # nothing speaks of the first token
    return mask


def sft_loss(it: Iteration) -> Finding:
    """The reported loss against the mean of plain log-probs over the answers' tokens."""
    (work, *_) = it.works["policy"]
    mask = answers(it, work)
    log_probs, _ = plain_log_probs(it, replace(work, batch={**work.batch, "answers": mask}), "answers")
    return against_plain(it.figures["policy/loss"], float(-log_probs[mask].mean()), it)


def reward_loss(it: Iteration) -> Finding:
    """The reported loss against the plain one of outputs at the last tokens."""
    (work, *_) = it.works["reward"]
    scores = raw_outputs(work)[torch.arange(len(work.batch["lengths"])), work.batch["lengths"] - 1]
    return against_plain(it.figures["reward/loss"], plain.pair_loss(scores), it)


def moved(work: Work, old: str) -> Work:
    """A work of which one field is as if an update lay between, so that ratios and clipping matter."""
    noise = 0.3 * torch.randn(work.batch[old].shape, generator=torch.Generator().manual_seed(1))
    return replace(work, batch={**work.batch, old: work.batch[old] + noise})


def policy_loss(it: Iteration) -> Finding:
    """The policy's loss after a made-up update against eq. 7 of the paper."""
    x, config = it.experience, it.ctx.config.ppo
    work = moved(it.works["policy"][0], "log_probs")
    rows, mask, old = (work.batch[name] for name in ("samples", "response_mask", "log_probs"))
    assert x.advantages is not None and x.response_mask is not None
    advantages, selected = x.advantages[rows].double(), x.advantages[x.response_mask].double()
    if config.whiten_advantages:
        advantages = (advantages - selected.mean()) / (selected.var(correction=0) + 1e-8).sqrt()
    wanted = plain.policy_loss(*plain_log_probs(it, work, "response_mask"), old, advantages, mask, config)
    return against_plain(whole_loss([work]), wanted, it)


def value_loss(it: Iteration) -> Finding:
    """The critic's loss after a made-up update against its formula."""
    work = moved(it.works["critic"][0], "values")
    batch, raw = work.batch, raw_outputs(work)
    values = torch.zeros_like(raw)
    values[:, 1:] = raw[:, :-1]
    wanted = plain.value_loss(values, batch["values"], batch["returns"], batch["response_mask"], it.ctx.config.ppo)
    return against_plain(whole_loss([work]), wanted, it)


def masked_prompts(it: Iteration) -> Finding:
    """Nats by which the loss changes when the tokens of prompts are called others, from the same outputs; and that it
    does change by the first and by the last token of an answer."""
    (work, *_) = it.works["policy"]
    tokens, vocab_size = work.batch["tokens"], work.role.model.vocab_size or 1
    position = torch.arange(tokens.shape[1])
    if it.phase == "sft":
        said = answers(it, work)
        starts, stops = said.int().argmax(1), work.batch["lengths"]
        prompts = ~said & (position < stops.unsqueeze(1))
    else:
        assert it.experience.prompts is not None
        starts = torch.tensor([len(it.experience.prompts[i]) for i in work.batch["samples"].tolist()])
        stops = work.batch["lengths"]
        prompts = position < starts.unsqueeze(1)
    changes = {
        "prompts": prompts,
        "first": position == starts.unsqueeze(1),
        "last": position == stops.unsqueeze(1) - 1,
    }

    def fn(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        rows = []
        for i in range(len(output)):
            part = {name: field[i : i + 1] for name, field in batch.items()}
            other = (part["tokens"] + 1) % vocab_size
            ways = [part["tokens"], *(torch.where(part[name], other, part["tokens"]) for name in changes)]
            rows.append(torch.stack([work.fn(output[i : i + 1], {**part, "tokens": way})[0] for way in ways]))
        return torch.stack(rows)

    losses = infer([replace(work, fn=fn, batch={**work.batch, **changes})])[0]
    by_prompts, by_first, by_last = (losses[:, 1:] - losses[:, :1]).abs().unbind(1)
    deaf = int(((by_first == 0) | (by_last == 0)).sum())
    detail = f"answers count in {len(losses) - deaf} of {len(losses)} rows"
    return Finding(float(by_prompts.max()) + deaf, 0, detail)


# -- what PPO promises -----------------------------------------------------------------------------------------


def first_kl(it: Iteration) -> Finding:
    """Of the policy that has not been updated, to the reference."""
    return Finding(abs(it.figures["kl/mean"]), 1e-6, "nats of a response")


def first_ratio(it: Iteration) -> Finding:
    """Of new to old probabilities before any update."""
    limit = 1e-6 if tolerance(it) is TOLERANCES[torch.float32] else 1e-2
    return Finding(abs(it.figures["policy/ratio_first"] - 1), limit, f"{it.figures['policy/ratio_first']:.8f}")


def sampler_gap(it: Iteration) -> Finding:
    """Between the log-probs of the rollout and the trainer's of the same tokens."""
    return Finding(it.figures["rollout/log_prob_gap"], tolerance(it).log_prob, "nats of a token")


def values(it: Iteration) -> Finding:
    """The critic's value of a token against its output one position before."""
    x, raw = it.experience, raw_outputs(replace(it.works["critic"][0], batch=_sequence(it)))
    assert x.values is not None and x.response_mask is not None
    mask = x.response_mask[:, 1:]
    gap = (x.values[:, 1:].double() - raw[:, :-1])[mask].abs().max()
    return Finding(float(gap), tolerance(it).log_prob)


def _sequence(it: Iteration) -> dict[str, Tensor]:
    x = it.experience
    assert x.tokens is not None and x.lengths is not None
    return {"tokens": x.tokens, "lengths": x.lengths}


def advantages(it: Iteration) -> Finding:
    """Advantages against the recurrence, token by token."""
    x, config = it.experience, it.ctx.config.ppo
    assert x.scores is not None and x.finished is not None and x.response_mask is not None
    scores = plain.shaped_scores(x.scores, x.finished, config)
    fields = x.log_probs, x.ref_log_probs, x.values
    wanted = plain.advantages(*fields, scores, x.response_mask, config)  # type: ignore[arg-type]
    gap = (x.advantages - wanted).abs().max() / wanted.abs().max().clamp_min(1)  # type: ignore[operator]
    return Finding(float(gap), TOLERANCES[torch.float32].loss)  # the fields are float32 on any device


_EVERY: dict[str, Check] = {
    "loss as reported": reported_loss,
    "gradients against the loss's change": slope,
    "every parameter has a gradient": complete,
    "loss and gradients over micro-batches": micro_batches,
}
CHECKS: dict[str, dict[str, Check]] = {
    "sft": {"loss against plain": sft_loss, "prompts carry no loss": masked_prompts, **_EVERY},
    "reward": {"loss against plain": reward_loss, **_EVERY},
    "ppo": {
        "KL at step 0": first_kl,
        "first ratio": first_ratio,
        "sampler against trainer": sampler_gap,
        "values at their tokens": values,
        "advantages against plain": advantages,
        "policy loss against plain": policy_loss,
        "value loss against plain": value_loss,
        "prompts carry no loss": masked_prompts,
        **_EVERY,
    },
}
