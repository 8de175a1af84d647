"""What the engine computes, written down a second time: float64, loops, no kernels, nothing shared with the first.

Shapes: B rows, T positions, V the vocabulary. Position t of a result speaks of token t, as everywhere.
Sources: Schulman et al. 2015, arXiv:1506.02438, eq. 16 (advantages); Schulman et al. 2017, arXiv:1707.06347, eq. 7
(policy loss); Ziegler et al. 2019, arXiv:1909.08593, eq. 2 (rewards); Ouyang et al. 2022, arXiv:2203.02155, eq. 1
(pairs); for preference losses the papers that rlhf_kernels.preference_loss and kto_loss name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import DPOConfig, GroupConfig, KTOConfig, PPOConfig, SamplingConfig
from ..mesh import ParallelMesh
from ..models.role import RoleModel, head_weight

_COLUMNS = 8192  # of the vocabulary that are float64 at once


def gathered(part: Tensor, dim: int, mesh: ParallelMesh) -> Tensor:
    """The tensor parallel ranks' parts side by side."""
    parts = [torch.empty_like(part) for _ in range(mesh.tp)]
    dist.all_gather(parts, part.contiguous(), group=mesh.tp_group)
    return torch.cat(parts, dim)


def whole_hidden(role: RoleModel, hidden: Tensor) -> Tensor:
    """`(B, T, H)` from what the last pipeline stage gives, of which each rank may hold a part of T."""
    return gathered(hidden, 1, role.mesh) if role.mesh.config.sequence_parallel else hidden


def whole_head(role: RoleModel) -> Tensor:
    """`(V, H)`, the LM head without the vocabulary's padding, on the last pipeline stage."""
    return gathered(head_weight(role.chunks[-1]).detach(), 0, role.mesh)[: role.model.vocab_size]


def distributions(
    hidden: Tensor, head: Tensor, mask: Tensor, temperature: float, ban: tuple[Sequence[int], int],
    shift: int = 1, dtype: torch.dtype = torch.float64,
) -> Iterator[tuple[int, list[int], Tensor]]:  # fmt: skip
    """For each row which of the positions that the mask selects have an output, and their log-probs `(N, V)`.

    Args:
        hidden, head: `(B, T, H)` and `(V, H)`, of any type.
        ban: tokens that have no probability among the first so many that the mask selects in a row.
        shift: the output that speaks of a token stands so many positions before it.
        dtype: of the logits; narrower ones than float32 are widened then.
    """
    for row in range(len(hidden)):
        positions = [t for t in mask[row].nonzero().flatten().tolist() if t and t >= shift]
        x = hidden[row, [t - shift for t in positions]].to(dtype)
        logits = torch.cat([x @ part.to(dtype).T for part in head.split(_COLUMNS)], 1)
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        logits[: ban[1], list(ban[0])] = -torch.inf
        yield row, positions, (logits / temperature).log_softmax(1)


def log_probs(hidden: Tensor, head: Tensor, tokens: Tensor, mask: Tensor, *options: Any, **more: Any) -> Tensor:
    """Log-probs and entropies `(B, 2, T)` of the tokens that the mask selects, 0 elsewhere, by `distributions`."""
    log_prob = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
    entropy = torch.zeros_like(log_prob)
    for row, positions, found in distributions(hidden, head, mask, *options, **more):
        log_prob[row, positions] = found.gather(1, tokens[row, positions].unsqueeze(1)).squeeze(1).double()
        finite = found.masked_fill(found.isinf(), 0.0)  # p log p is 0 where p is, and so is its gradient
        entropy[row, positions] = -(found.exp() * finite).sum(1).double()
    return torch.stack([log_prob, entropy], 1)


def intervals(hidden: Tensor, head: Tensor, tokens: Tensor, mask: Tensor, *options: Any) -> Tensor:
    """Between which numbers the inverse CDF gives the tokens that the mask selects, `(B, 2, T)`: tokens stand side by
    side in [0, 1) in the order of their ids, each as wide as it is probable."""
    start, stop = torch.zeros(2, *tokens.shape, dtype=torch.float64, device=tokens.device)
    for row, positions, found in distributions(hidden, head, mask, *options):
        index = tokens[row, positions].unsqueeze(1)
        stop[row, positions] = found.exp().cumsum(1).gather(1, index).squeeze(1)
        start[row, positions] = stop[row, positions] - found.gather(1, index).squeeze(1).exp()
    return torch.stack([start, stop], 1)


def shaped_scores(
    scores: Tensor, finished: Tensor, lengths: Tensor, config: SamplingConfig, longest: int,
    among: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Scores of the first iteration as they enter the reward, `(B,)`, of responses of so many tokens.

    Args:
        among: those that they are standardised by; None: themselves.
    """
    scores, among = scores.double(), (scores if among is None else among).double()
    if config.score_min is not None or config.score_max is not None:
        scores, among = (x.clamp(config.score_min, config.score_max) for x in (scores, among))
    mean, std = among.mean(), among.std(correction=0)
    if config.score_center:
        scores = scores - mean
    if config.score_scale:
        scores = scores / (std + 1e-8)
    for row, length in enumerate(lengths.tolist()):
        if config.overlong_buffer and length > longest - config.overlong_buffer:
            share = 1 - (longest - length) / config.overlong_buffer
            scores[row] -= config.overlong_penalty * share
    return scores - config.missing_eos_penalty * (~finished).double()


def token_rewards(scores: Tensor, mask: Tensor, turn_rewards: Tensor | None) -> Tensor:
    """`(B, T)`: each turn's reward at its last token, and at a row's last token the rest of its score."""
    found = torch.zeros(mask.shape, dtype=torch.float64)
    for row, score in enumerate(scores.tolist()):
        for t in (positions := mask[row].nonzero().flatten().tolist()):
            found[row, t] = 0.0 if turn_rewards is None else float(turn_rewards[row, t])
        if positions:
            found[row, positions[-1]] += score - float(found[row].sum())
    return found


def advantages(
    log_probs: Tensor, ref_log_probs: Tensor, values: Tensor, rewards: Tensor, mask: Tensor, config: PPOConfig
) -> Tensor:
    """Generalised advantages `(B, T)` of these rewards `(B, T)` and the KL of each token, from one token that the mask
    selects to the next."""
    found = torch.zeros(mask.shape, dtype=torch.float64)
    for row in range(len(mask)):
        after, value_after = 0.0, 0.0
        positions = mask[row].nonzero().flatten().tolist()
        mixture = config.gae_lambda
        if config.gae_alpha is not None and positions:
            mixture = max(0.0, 1 - 1 / (config.gae_alpha * len(positions)))
        for t in reversed(positions):
            reward = -(config.kl_coef if config.kl == "reward" else 0) * (
                float(log_probs[row, t]) - float(ref_log_probs[row, t])
            )
            reward += float(rewards[row, t])
            value = float(values[row, t])
            after = reward + config.gamma * value_after - value + config.gamma * mixture * after
            found[row, t], value_after = after, value
    return found


def group_advantages(
    scores: Tensor, counts: Tensor, greedy: Tensor | None, config: GroupConfig,
    groups: Sequence[list[int]] | None = None,
) -> Tensor:  # fmt: skip
    """Advantages `(B,)`.

    Args:
        greedy: scores of the likeliest response to each prompt, where they are taken off.
        counts: tokens of each response, over which a whole batch is standardised. One without any is in no group.
        groups: numbers of those that are compared; None: groups stand one after the other.
    """
    found = scores.double().clone()
    if groups is None:
        rows = torch.arange(len(scores)).split(config.samples_per_prompt)
        groups = [[i for i in group.tolist() if counts[i]] for group in rows]
    for group in groups:
        own, kind = scores[group].double(), config.advantage
        if not len(own):
            continue
        mean, std = own.mean(), own.std(correction=config.std_correction) if len(own) > 1 else own.new_ones([])
        for i, row in enumerate(group):
            others = torch.cat([own[:i], own[i + 1 :]])
            if greedy is not None:
                found[row] = own[i] - greedy[row // config.samples_per_prompt]
            elif kind == "rloo":
                found[row] = own[i] - others.mean() if len(others) else 0.0
            elif kind not in ("none", "reinforce++"):
                found[row] = (own[i] - mean) / (std + config.std_eps if kind == "grpo" else 1)
    if config.advantage.startswith("reinforce++"):
        tokens = found.repeat_interleave(counts)
        found = (found - tokens.mean()) / (tokens.std(correction=config.std_correction) + config.std_eps)
    return found


def turn_advantages(rewards: Tensor, mask: Tensor, config: GroupConfig) -> Tensor:
    """Advantages `(B, T)` of turns, the spans of a mask, by their returns, each in a group with the same turn of the
    prompt's other samples."""
    turns: list[list[int]] = []  # the positions of each
    groups: dict[tuple[int, int], list[int]] = {}
    returns, rows = list[float](), list[int]()
    for row in range(len(mask)):
        own: list[list[int]] = []
        for t in mask[row].nonzero().flatten().tolist():
            if own and own[-1][-1] == t - 1:
                own[-1].append(t)
            else:
                own.append([t])
        sums = [float(rewards[row, positions].double().sum()) for positions in own]
        for k, positions in enumerate(own):
            groups.setdefault((row // config.samples_per_prompt, k), []).append(len(turns))
            turns.append(positions)
            rows.append(row)
            returns.append(sum(config.turn_discount ** (i - k) * sums[i] for i in range(k, len(own))))
    counts = torch.tensor([len(positions) for positions in turns])
    each = group_advantages(torch.tensor(returns, dtype=torch.float64), counts, None, config, list(groups.values()))
    found = torch.zeros(mask.shape, dtype=torch.float64)
    for row, positions, advantage in zip(rows, turns, each.tolist(), strict=True):
        found[row, positions] = advantage
    return found


def divergences(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, mask: Tensor, temperature: float,
    ban: tuple[Sequence[int], int],
) -> Tensor:  # fmt: skip
    """KL(policy || teacher) before each token that the mask selects, `(B, T)`, 0 elsewhere.

    Args:
        hidden, head, temperature, ban: as for `distributions`, the policy's.
        teacher_hidden: `(B, R, H)`, the teacher's outputs before a row's first such token, its second, and so on.
    """
    found = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    for row, positions, ours in distributions(hidden, head, mask, temperature, ban):
        logits = teacher_hidden[row, : len(positions)].double() @ teacher_head.double().T
        logits[: ban[1], list(ban[0])] = -torch.inf
        gaps = (ours - (logits / temperature).log_softmax(1)).masked_fill(ours.isinf(), 0.0)
        found[row, positions] = (ours.exp() * gaps).sum(1)
    return found


def policy_losses(
    log_probs: Tensor, entropy: Tensor, old: Tensor, reference: Tensor | None, advantages: Tensor, mask: Tensor,
    config: SamplingConfig, longest: int,
) -> Tensor:  # fmt: skip
    """What each response token has in the policy's loss, `(N,)` from `(B, T)`; its mean is the loss.

    Args:
        reference: log-probs of the KL in the loss; None for none.
        advantages: whitened, if they are to be.
        longest: tokens that a sum over a response is divided by.
    """
    lengths = mask.sum(1, keepdim=True)
    log_ratio = (log_probs - old.double()) * mask
    if config.loss == "gspo":
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(log_ratio)
    ratio = log_ratio.exp()
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    clipped = ratio.clamp(1 - config.clip_ratio, 1 + high)
    if config.loss in ("ppo", "gspo"):
        terms = -torch.minimum(ratio * advantages, clipped * advantages)
        if config.dual_clip is not None:
            terms = torch.where(advantages < 0, terms.minimum(-config.dual_clip * advantages), terms)
    else:
        terms = -advantages * log_probs * (clipped if config.loss == "cispo" else 1)
    if reference is not None:
        distance = log_probs - reference.double()
        estimates = {"k1": distance, "k2": distance**2 / 2, "k3": (-distance).exp() - 1 + distance}
        terms = terms + config.kl_coef * estimates[config.kl.rstrip("+")]
    return averaged(terms - config.entropy_coef * entropy, mask, config, longest)


def averaged(terms: Tensor, mask: Tensor, config: SamplingConfig, longest: int) -> Tensor:
    """Of terms `(B, T)` those of tokens, `(N,)`, of which the mean is what `loss_mean` says."""
    lengths = mask.sum(1, keepdim=True)
    if config.loss_mean != "tokens":
        share = lengths.sum() / lengths.count_nonzero()
        terms = terms * share / (lengths if config.loss_mean == "sequences" else longest)
    return terms[mask]


def value_losses(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, config: PPOConfig) -> Tensor:
    """The clipped squared error of each response token, halved, `(N,)` from `(B, T)`."""
    near = old.double() + (values - old.double()).clamp(-config.clip_value, config.clip_value)
    return 0.5 * torch.maximum((values - returns.double()) ** 2, (near - returns.double()) ** 2)[mask]


def pair_losses(scores: Tensor) -> Tensor:
    """log(1 + exp(rejected - chosen)) of each pair `(N,)`, from scores `(2 N,)`, chosen before rejected."""
    pairs = scores.double().view(-1, 2)
    return torch.log1p((pairs[:, 1] - pairs[:, 0]).exp())


def preference_losses(sums: Tensor, refs: Tensor | None, counts: Tensor, config: DPOConfig) -> Tensor:
    """Of each pair `(P,)`, from log-probs of answers `(2 P,)`, the reference's, and their tokens; chosen before
    rejected."""
    found = []
    scale = counts.double() if config.takes_means else torch.ones_like(sums)
    scores = ((sums - (refs if refs is not None else 0.0)) / scale).tolist()
    beta, share = config.strength, config.label_smoothing
    for good, bad in zip(scores[::2], scores[1::2], strict=True):
        if config.loss == "ipo":
            found.append((good - bad - 0.5 / beta) ** 2)
        elif config.loss == "orpo":
            odds = math.exp(good) / (1 - math.exp(good)), math.exp(bad) / (1 - math.exp(bad))
            found.append(-good + beta * math.log1p(odds[1] / odds[0]))
        else:
            ahead = beta * (good - bad) - (config.margin if config.loss == "simpo" else 0.0)
            found.append((1 - share) * math.log1p(math.exp(-ahead)) + share * math.log1p(math.exp(ahead)))
    return torch.tensor(found, dtype=torch.float64)


def kto_losses(log_ratios: Tensor, desirable: Tensor, others: Tensor, config: KTOConfig) -> Tensor:
    """Of each answer `(B,)`, by its log-ratio and those of answers behind prompts that are not theirs."""
    found, kl = [], max(0.0, float(others.double().mean()))
    for ratio, is_good in zip(log_ratios.tolist(), desirable.tolist(), strict=True):
        sign, weight = (1, config.desirable_weight) if is_good else (-1, config.undesirable_weight)
        found.append(weight * (1 - 1 / (1 + math.exp(-sign * config.beta * (ratio - kl)))))
    return torch.tensor(found, dtype=torch.float64)
