"""Checks of a phase's first iteration: its losses against formulas, and what a phase that samples promises of its first
step. A check belongs to a body, and a phase has those of its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..algorithms import distill, dpo, grpo, kto, policy, ppo, reward, rollouts, sft
from ..algorithms.heads import choose, policy_log_probs
from ..config import PAIRED, SAMPLING
from ..experience import reach, spans
from ..models.stream import infer
from ..models.work import Work
from ..schedule import Body, Stage
from . import plain
from .findings import Finding, bound, rms
from .measure import Iteration
from .rounding import moved
from .updates import Check, complete, loss_finding, micro_batches, reported_loss, slope, whole_loss

# -- losses ----------------------------------------------------------------------------------------------------


def raw_outputs(work: Work) -> Tensor:
    """A scalar head's outputs where the model makes them, `(B, T)` float64."""
    return infer([replace(work, fn=lambda output, batch: output.squeeze(-1).double())])[0]


def sampling(it: Iteration) -> tuple[float, tuple[Sequence[int], int]]:
    """Temperature and ban of the distribution that a phase learns."""
    if it.phase not in SAMPLING:
        return 1.0, ((), 0)
    rollout = it.ctx.config.rollout
    return rollout.temperature, (it.ctx.tokenizer.end_ids, rollout.min_new_tokens)


def plain_log_probs(it: Iteration, work: Work, mask: str) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of a policy's work, of the tokens that one of its fields selects."""

    def fn(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        hidden, head = plain.whole_hidden(work.role, output), plain.whole_head(work.role)
        return plain.log_probs(hidden, head, batch["tokens"], batch[mask], *sampling(it))

    both = infer([replace(work, fn=fn)])[0]
    return both[:, 0], both[:, 1]


def against_plain(role: str, found: float, terms: Tensor, it: Iteration, condition: float = 1.0) -> Finding:
    """A loss against the mean of plain terms."""
    wanted, size = float(terms.mean()), float(terms.abs().mean())
    ratio = f" ({found / wanted:.4g} times as large)" if wanted else ""
    detail = f"{found:.6g} for {wanted:.6g}{ratio}"
    return loss_finding(found, wanted, size, it.rounding[role].loss, detail, condition)


def answers(it: Iteration, work: Work) -> Tensor:
    """What a step learns of the assistant in its rows, `(B, T)`, by the examples alone."""
    mask = torch.zeros(work.batch["tokens"].shape, dtype=torch.bool)
    sides = [(e, answer) for e in it.examples for answer in (e.chosen, e.rejected)]
    if it.phase not in PAIRED:
        sides = [(e, e.rejected if e.chosen is None else e.chosen) for e in it.examples]
    for row, (example, answer) in enumerate(sides):
        start = len(example.before)
        mask[row, start : start + len(answer or ())] = True
        if it.phase == "sft":  # earlier turns as well
            mask[row, :start] = torch.tensor(example.before_spoken, dtype=torch.bool)
    mask[:, 0] = False  # nothing speaks of the first token
    return mask


def sft_loss(it: Iteration) -> Finding:
    """The reported loss against the mean of plain log-probs over the answers' tokens."""
    (work, *_) = it.works["policy"]
    mask = answers(it, work)
    log_probs, _ = plain_log_probs(it, replace(work, batch={**work.batch, "answers": mask}), "answers")
    return against_plain("policy", it.figures["policy/loss"], -log_probs[mask], it)


def reward_loss(it: Iteration) -> Finding:
    """The reported loss against the plain one of outputs at the last tokens."""
    (work, *_) = it.works["reward"]
    scores = raw_outputs(work)[torch.arange(len(work.batch["lengths"])), work.batch["lengths"] - 1]
    return against_plain("reward", it.figures["reward/loss"], plain.pair_losses(scores), it)


def pairs_loss(it: Iteration) -> Finding:
    """The loss of pairs, as if the policy had moved since its reference, against the plain one of plain log-probs."""
    work, sums, counts = plain_answers(it)
    config, refs = it.ctx.config.dpo, work.batch.get("ref_answer_log_probs")
    terms = plain.preference_losses(sums, refs, counts, config)
    return against_plain("policy", whole_loss([work]), terms, it)


def answers_loss(it: Iteration) -> Finding:
    """The same of answers one by one."""
    (work, sums, _), x, config = plain_answers(it), it.experience, it.ctx.config.kto
    assert x.answer_log_probs is not None and x.ref_answer_log_probs is not None and x.desirable is not None
    others = x.answer_log_probs - x.ref_answer_log_probs[len(x.desirable) :]
    terms = plain.kto_losses(sums - work.batch["ref_answer_log_probs"], x.desirable, others, config)
    return against_plain("policy", whole_loss([work]), terms, it)


def plain_answers(it: Iteration) -> tuple[Work, Tensor, Tensor]:
    """The policy's work, its reference some way off if it has one; log-probs of its answers, and their tokens."""
    (work, *_) = it.works["policy"]
    mask = answers(it, work)
    log_probs, _ = plain_log_probs(it, replace(work, batch={**work.batch, "answers": mask}), "answers")
    name = "ref_answer_log_probs"
    return later(work, name) if name in work.batch else work, log_probs.sum(1), mask.sum(1)


def later(work: Work, old: str) -> Work:
    """A work of which one field, if it has it, is as if an update lay between, so that ratios and clipping matter."""
    if old not in work.batch:
        return work
    noise = 0.3 * torch.randn(work.batch[old].shape, generator=torch.Generator().manual_seed(len(old)))
    return replace(work, batch={**work.batch, old: work.batch[old] + noise})


def policy_loss(it: Iteration) -> Finding:
    """The policy's loss after a made-up update against its formula."""
    work = later(later(it.works["policy"][0], "log_probs"), "ref_log_probs")
    terms, condition = policy_terms(it, work)
    return against_plain("policy", whole_loss([work]), terms, it, condition)


def taught_loss(it: Iteration) -> Finding:
    """The same, with the KL to a teacher over the whole vocabulary in it."""
    work, config, teacher = later(it.works["policy"][0], "log_probs"), it.ctx.settings, it.ctx.roles["teacher"]

    def fn(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        ours = plain.whole_hidden(work.role, output), plain.whole_head(work.role)
        theirs = batch["teacher_hidden"], plain.whole_head(teacher)
        return plain.divergences(*ours, *theirs, batch["response_mask"], *sampling(it))

    with teacher.on_device():
        kl = config.kl_coef * infer([replace(work, fn=fn)])[0]
    terms, condition = policy_terms(it, work)
    terms = terms + plain.averaged(kl, work.batch["response_mask"], config, it.ctx.config.most_new_tokens)
    return against_plain("policy", whole_loss([work]), terms, it, condition)


def policy_terms(it: Iteration, work: Work) -> tuple[Tensor, float]:
    """What each response token has in the policy's loss, and how much larger its advantages were before whitening."""
    x, config = it.experience, it.ctx.settings
    rows, mask, old = (work.batch[name] for name in ("samples", "response_mask", "log_probs"))
    assert x.advantages is not None and x.response_mask is not None
    advantages, selected, condition = x.advantages[rows].double(), x.advantages[x.response_mask].double(), 1.0
    if x.advantage_moments is not None and config.whiten_advantages:
        mean, std = selected.mean(), (selected.var(correction=config.std_correction) + 1e-8).sqrt()
        advantages, condition = (advantages - mean) / std, 1 + float(mean.abs() / std)
    if x.importance is not None:
        advantages = advantages * x.importance[rows]
    both, reference = plain_log_probs(it, work, "response_mask"), work.batch.get("ref_log_probs")
    longest = it.ctx.config.most_new_tokens
    return plain.policy_losses(*both, old, reference, advantages, mask, config, longest), condition


def value_loss(it: Iteration) -> Finding:
    """The critic's loss after a made-up update against its formula."""
    work = later(it.works["critic"][0], "values")
    batch, raw = work.batch, raw_outputs(work)
    values = torch.zeros_like(raw)
    values[:, 1:] = raw[:, :-1]
    terms = plain.value_losses(values, batch["values"], batch["returns"], batch["response_mask"], it.ctx.settings)
    return against_plain("critic", whole_loss([work]), terms, it)


def masked_prompts(it: Iteration) -> Finding:
    """The loss has a gradient at the outputs before an answer's tokens, at every one, and at no other: exactly 0 there.

    A gradient is known for each token, where a loss is a sum in which a single token may get lost, and it does not ask
    for other tokens to compare with, which an untrained part of a vocabulary makes all alike. A token that is certain
    to the last bit has none and needs none.
    """
    (work, *_) = it.works["policy"]
    if (prompts := it.experience.prompts) is None:
        said = answers(it, work)
    else:
        starts = torch.tensor([len(prompts[i]) for i in work.batch["samples"].tolist()])
        said = spans(starts, work.batch["lengths"], work.batch["tokens"].shape[1])
        if it.ctx.config.env.fn is not None:  # which alone knows what of it the policy has said
            said &= work.batch["response_mask"]
    fields = {"said": said}
    if prompts is not None:  # that are nowhere 0
        noise = torch.Generator().manual_seed(1)
        fields["advantages"] = torch.randn(said.shape, generator=noise)
        if (states := work.batch.get("teacher_hidden")) is not None:  # of one who agrees nowhere
            fields["teacher_hidden"] = torch.randn(states.shape, generator=noise).to(states.dtype)

    def fn(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.enable_grad():
            output = output.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(work.fn(output, batch)[0], output)
        temperature, ban = sampling(it)
        log_probs, _ = policy_log_probs(work.role, output.detach(), choose(work.role, batch, "said", ban), temperature)
        return torch.stack([plain.whole_hidden(work.role, gradient).abs().amax(2), log_probs], 1)

    found = infer([replace(work, fn=fn, batch={**work.batch, **fields})])[0]
    speaks = torch.zeros_like(said)
    speaks[:, 1:] = found[:, 0, :-1] > 0  # an output speaks of the token after it
    uncertain, others = said & (found[:, 1] != 0), speaks & ~said
    num_tokens, num_heard, num_others = (int(x.sum()) for x in (uncertain, uncertain & speaks, others))
    num_others += int((found[:, 0, -1] > 0).sum())
    detail = f"{num_heard} of {num_tokens} tokens of answers count, and {num_others} others"
    return Finding(num_tokens - num_heard + num_others, 0, detail)


# -- what a phase that samples promises ---------------------------------------------------------------------------


def first_kl(it: Iteration) -> Finding:
    """Of the policy that has not been updated, to the reference."""
    x = it.experience
    gap = rms((x.log_probs - x.ref_log_probs)[x.response_mask])  # type: ignore[operator]
    return Finding(gap, it.log_prob_bound, f"nats of a token; {it.figures['kl/mean']:.2g} of a response")


def first_ratio(it: Iteration) -> Finding:
    """Of new to old probabilities before any update."""
    ratio = it.figures["policy/ratio_first"]
    return Finding(abs(ratio - 1), it.log_prob_bound, f"{ratio:.8f}")


def sampler_gap(it: Iteration) -> Finding:
    """Between the log-probs of the rollout and the trainer's of the same tokens."""
    x = it.experience
    gap = rms((x.log_probs - x.sampler_log_probs)[x.response_mask])  # type: ignore[operator]
    return Finding(gap, it.log_prob_bound, "nats of a token")


def teacher_log_probs(it: Iteration) -> Finding:
    """A teacher's log-probs of the responses against plain ones."""
    x, work = it.experience, replace(it.of_responses("policy"), role=it.ctx.roles["teacher"])
    assert x.ref_log_probs is not None and x.response_mask is not None
    found = plain_log_probs(it, work, "response_mask")[0]
    with work.role.on_device(), moved(work.role):
        again = plain_log_probs(it, work, "response_mask")[0]
    found, again = found[x.response_mask], again[x.response_mask]
    return Finding(rms(x.ref_log_probs[x.response_mask] - found), bound(rms(again - found), rms(found)))


def teacher_states(it: Iteration) -> Finding:
    """What is kept of a teacher's outputs, by the log-probs that its head gives of them, against plain ones."""
    x, work = it.experience, replace(it.of_responses("policy"), role=it.ctx.roles["teacher"])
    assert x.ref_log_probs is not None and x.response_mask is not None

    def fn(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        hidden, mask = torch.zeros_like(plain.whole_hidden(work.role, output)), batch["response_mask"]
        for row, states in enumerate(batch["teacher_hidden"]):
            positions = mask[row].nonzero().flatten() - 1
            hidden[row, positions] = states[: len(positions)]
        return plain.log_probs(hidden, plain.whole_head(work.role), batch["tokens"], mask, *sampling(it))[:, 0]

    found = infer([replace(work, fn=fn)])[0][x.response_mask]
    return Finding(rms(x.ref_log_probs[x.response_mask] - found), it.log_prob_bound, "nats of a token")


def values(it: Iteration) -> Finding:
    """The critic's value of a token against its output one position before."""
    x = it.experience
    assert x.values is not None and x.response_mask is not None
    mask = x.response_mask[:, 1:]
    raw = raw_outputs(it.of_responses("critic"))
    with it.moved("critic") as work:
        again = raw_outputs(work)
    found, raw, again = x.values[:, 1:][mask].double(), raw[:, :-1][mask], again[:, :-1][mask]
    return Finding(rms(found - raw), bound(rms(again - raw), rms(raw)))


def advantages(it: Iteration) -> Finding:
    """Advantages against the recurrence, token by token, as a share of the largest number that enters it."""
    x, config = it.experience, it.ctx.settings
    assert x.scores is not None and x.finished is not None and x.response_mask is not None
    scores = shaped_scores(it)
    rewards = plain.token_rewards(scores, x.response_mask, x.turn_rewards)
    fields = x.log_probs, x.ref_log_probs, x.values
    wanted = plain.advantages(*fields, rewards, x.response_mask, config)  # type: ignore[arg-type]
    size = max(float(field.abs().max()) for field in (wanted, scores, x.values, x.scores))  # type: ignore[union-attr]
    gap = rms((x.advantages - wanted)[x.response_mask])  # type: ignore[operator]
    return Finding(gap / (size or 1.0), bound(0.0, 1.0))


def group_advantages(it: Iteration) -> Finding:
    """Advantages of groups against their formula, response by response, as a share of the largest."""
    return advantage_finding(it, *compared(it))


def taught_advantages(it: Iteration) -> Finding:
    """Advantages of tokens that a teacher judges, and of groups if there are scores, against their formulas."""
    x, config = it.experience, it.ctx.settings
    assert x.log_probs is not None and x.ref_log_probs is not None and x.response_mask is not None
    wanted, size, condition = torch.zeros(x.response_mask.shape, dtype=torch.float64), 0.0, 0.0
    if config.kl == "token":
        wanted = config.kl_coef * (x.ref_log_probs.double() - x.log_probs.double()).clamp(-20, 20)
    if config.is_scored:
        groups, size, condition = compared(it)
        wanted = wanted + config.reward_coef * groups
    return advantage_finding(it, wanted * x.response_mask, size, 1.0 + condition)


def advantage_finding(it: Iteration, wanted: Tensor, size: float, condition: float) -> Finding:
    """How far advantages are from wanted ones `(B, T)`, or of whole responses `(B, 1)`, as a share of the largest.

    Args:
        size: of the numbers that they are made of.
        condition: how many times larger they are than those that they are differences of.
    """
    x = it.experience
    assert x.advantages is not None and x.response_mask is not None
    size = max(size, float(wanted.abs().max())) or 1.0
    return Finding(rms((x.advantages - wanted)[x.response_mask]) / size, bound(0.0, condition))


def shaped_scores(it: Iteration) -> Tensor:
    """Scores as they enter the reward, of rows that something was sampled in; of the others, 0."""
    x = it.experience
    assert x.scores is not None and x.finished is not None and x.response_mask is not None
    said, found = x.response_mask.any(1), torch.zeros(len(x.scores), dtype=torch.float64)
    lengths, longest = reach(x.response_mask)[said], it.ctx.config.most_new_tokens
    found[said] = plain.shaped_scores(x.scores[said], x.finished[said], lengths, it.ctx.settings, longest)
    return found


def compared(it: Iteration) -> tuple[Tensor, float, float]:
    """Advantages of groups by their formula, `(B, 1)`, or of turns, `(B, T)`, the largest score, and how much larger
    they are than the scores' differences."""
    x, config = it.experience, it.ctx.settings
    assert x.scores is not None and x.finished is not None and x.response_mask is not None
    scores = shaped_scores(it)
    if config.kl == "reward" and x.ref_log_probs is not None:
        kl = (x.log_probs.double() - x.ref_log_probs.double()) * x.response_mask  # type: ignore[union-attr]
        scores = scores - config.kl_coef * kl.sum(1)
    greedy = None
    if x.baselines is not None and x.greedy_finished is not None and x.greedy_response_mask is not None:
        said = x.greedy_finished, x.greedy_response_mask.sum(1)
        greedy = plain.shaped_scores(x.baselines, *said, config, it.ctx.config.most_new_tokens, x.scores)
    if config.credit == "turn":
        rewards = plain.token_rewards(scores, x.response_mask, x.turn_rewards)
        wanted = plain.turn_advantages(rewards, x.response_mask, config)
    else:
        wanted = plain.group_advantages(scores, x.response_mask.sum(1), greedy, config).unsqueeze(1)
    # scores are float32, and their differences are divided by what may be much smaller than they
    condition = float(wanted.abs().max() / scores.std().clamp_min(1e-6))
    return wanted, float(scores.abs().max()), condition


_EVERY: dict[str, Check] = {
    "loss as reported": reported_loss,
    "gradients against the loss's change": slope,
    "every parameter has a gradient": complete,
    "loss and gradients over micro-batches": micro_batches,
}
_SAMPLED: dict[str, Check] = {
    "first ratio": first_ratio,
    "policy loss against plain": policy_loss,
    "prompts carry no loss": masked_prompts,
}
OF_BODIES: dict[Body, dict[str, Check]] = {
    sft.train_policy: {"loss against plain": sft_loss, "prompts carry no loss": masked_prompts},
    reward.train_reward: {"loss against plain": reward_loss},
    rollouts.log_probs: {"sampler against trainer": sampler_gap},
    rollouts.ref_log_probs: {"KL at step 0": first_kl},
    ppo.values: {"values at their tokens": values},
    ppo.advantage: {"advantages against plain": advantages},
    grpo.advantage: {"advantages against plain": group_advantages},
    distill.ask_teacher: {"teacher's log-probs against plain": teacher_log_probs},
    distill.ask_teacher_all: {
        "teacher's log-probs against plain": teacher_log_probs,
        "teacher's states against its log-probs": teacher_states,
    },
    distill.advantage: {"advantages against plain": taught_advantages},
    distill.train_full: {**_SAMPLED, "policy loss against plain": taught_loss},
    ppo.train_critic: {"value loss against plain": value_loss},
    ppo.train_policy: _SAMPLED,
    policy.train_policy: _SAMPLED,
    dpo.train_pairs: {"loss against plain": pairs_loss, "prompts carry no loss": masked_prompts},
    kto.train_answers: {"loss against plain": answers_loss, "prompts carry no loss": masked_prompts},
}


def checks(stages: Sequence[Stage]) -> dict[str, Check]:
    """Of the phase that has this table, by name."""
    found: dict[str, Check] = {}
    for stage in stages:
        found |= OF_BODIES.get(stage.body, {})
    return found | _EVERY
