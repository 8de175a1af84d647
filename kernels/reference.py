"""The public operations in plain torch: the CPU path, the oracle of the tests and the baseline of benchmarks.

Conventions: `B` rows, `T` tokens, `V` the local part of the vocabulary. Per-token tensors are `(B, T)` and
aligned with `tokens`; `mask` is 1 where a token counts. Reductions and softmaxes run in float32 or wider.

Sources: PPO (Schulman et al. 2017, arXiv:1707.06347), GAE (Schulman et al. 2015, arXiv:1506.02438, eq. 11-16),
KL-shaped rewards (Ziegler et al. 2019, arXiv:1909.08593, eq. 2), KL estimators k1, k2, k3 (Schulman,
"Approximating KL Divergence", 2020), pairwise reward loss (Ouyang et al. 2022, arXiv:2203.02155, eq. 1).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]

# A log-ratio beyond this says that two policies share no support; its exponential would only overflow.
LOG_RATIO_LIMIT = 20.0


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype is torch.float64 else x.float()


class _TokenLogProbs(torch.autograd.Function):
    """Log-prob of one token and entropy of its distribution, over a vocabulary split between ranks.

    Every rank reduces its own columns to three scalars a row (maximum, sum of exponentials, sum of
    exponential x logit) plus the target's logit; one all-reduce of the maximum and one of the packed sums make
    them global. The log-sum-exp is saved instead of the softmax, which backward recomputes.
    """

    @staticmethod
    def forward(ctx, logits, tokens, vocab_start, num_valid, temperature, group):
        x = _wide(logits) / temperature
        if num_valid < x.shape[-1]:
            x[..., num_valid:] = -torch.inf
        maximum = x.amax(-1) if x.shape[-1] else x.new_full(x.shape[:-1], -torch.inf)
        if group is not None:
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
        shifted = x - maximum.unsqueeze(-1)
        exp = shifted.exp()
        local = tokens - vocab_start
        here = (local >= 0) & (local < num_valid)
        index = local.clamp(0, max(x.shape[-1] - 1, 0)).unsqueeze(-1)
        target = torch.where(here, shifted.gather(-1, index).squeeze(-1), 0.0)
        # 0 * -inf is not a number, and a banned column contributes nothing to the entropy
        weighted = torch.where(exp > 0, exp * shifted, 0.0)
        packed = torch.stack([exp.sum(-1), weighted.sum(-1), target])
        if group is not None:
            dist.all_reduce(packed, group=group)
        total, weighted_sum, target = packed.unbind(0)
        log_total = total.log()
        entropy = log_total - weighted_sum / total
        # two numbers and not their sum, which would round at the size of the logits
        ctx.save_for_backward(logits, tokens, maximum, log_total, entropy)
        ctx.args = (vocab_start, num_valid, temperature)
        return target - log_total, entropy

    @staticmethod
    def backward(ctx, grad_log_prob, grad_entropy):
        logits, tokens, maximum, log_total, entropy = ctx.saved_tensors
        vocab_start, num_valid, temperature = ctx.args
        log_p = _wide(logits) / temperature - maximum.unsqueeze(-1) - log_total.unsqueeze(-1)
        if num_valid < log_p.shape[-1]:
            log_p[..., num_valid:] = -torch.inf
        p = log_p.exp()
        # d log p(token) / d x = 1[token] - p ;  d H / d x = -p (log p + H)
        finite_log_p = torch.where(p > 0, log_p, 0.0)
        grad = -p * (grad_log_prob.unsqueeze(-1) + grad_entropy.unsqueeze(-1) * (finite_log_p + entropy.unsqueeze(-1)))
        local = tokens - vocab_start
        here = (local >= 0) & (local < num_valid)
        index = local.clamp(0, max(log_p.shape[-1] - 1, 0)).unsqueeze(-1)
        grad.scatter_add_(-1, index, torch.where(here, grad_log_prob, 0.0).unsqueeze(-1))
        return (grad / temperature).to(logits.dtype), None, None, None, None, None


def token_log_probs(
    logits: Tensor,
    tokens: Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and the entropy (nats) of the distribution that it was drawn from.

    Args:
        logits: `(..., V)`, this rank's columns of the vocabulary.
        tokens: `(...)`, global token ids.
        vocab_start: global id of the first local column.
        vocab_size: true size of the whole vocabulary; later columns are padding and have no probability.
        temperature: divides the logits.
        group: the ranks among which the vocabulary is split; None where it is whole.

    Returns:
        `log_probs` and `entropy`, both `(...)` in float32 (float64 for float64 logits) and differentiable.

    Raises:
        ValueError: a token lies outside the vocabulary.
    """
    num_columns = logits.shape[-1]
    size = vocab_size if vocab_size is not None else vocab_start + num_columns
    num_valid = max(0, min(num_columns, size - vocab_start))
    low, high = (vocab_start, vocab_start + num_valid) if group is None else (0, size)
    outside = (tokens < low) | (tokens >= high)
    if bool(outside.any()):
        raise ValueError(f"token id {int(tokens[outside][0])} lies outside the vocabulary [{low}, {high})")
    return _TokenLogProbs.apply(logits, tokens, vocab_start, num_valid, temperature, group)


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: KLEstimator = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy; shapes as the inputs.

    With r = p_ref / p: k1 = -log r (unbiased), k2 = (log r)^2 / 2 (low variance, biased),
    k3 = r - 1 - log r (unbiased, never negative).
    """
    log_ratio = (ref_log_probs - log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        return torch.expm1(log_ratio) - log_ratio
    raise ValueError(f"KL estimator {kind!r} is unknown: k1, k2 or k3")


def last_token(mask: Tensor) -> Tensor:
    """Index of the last position where `mask` `(B, T)` is set, `(B,)`; 0 for an empty row."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (mask.bool() * positions).amax(1)


class Advantages(NamedTuple):
    """What `kl_advantages` returns, each `(B, T)` in float32 and 0 outside the mask."""

    rewards: Tensor
    advantages: Tensor
    returns: Tensor


def kl_advantages(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    values: Tensor,
    scores: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> Advantages:
    """KL-shaped rewards, generalised advantages and returns of a batch of responses.

    r_t = -kl_coef (log p_t - log p_ref,t) + score at the last response token;
    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1};  returns_t = A_t + V_t,
    with V = A = 0 after the last response token. A response is contiguous in its row.

    Args:
        log_probs, ref_log_probs, values: `(B, T)`.
        scores: `(B,)`, one scalar a response.
        response_mask: `(B, T)`, 1 on response tokens.
        kl_coef: nats to reward.
        gamma, gae_lambda: discount and the GAE mixture.
    """
    mask = response_mask.float()
    rewards = -kl_coef * _masked(kl_estimate(log_probs.float(), ref_log_probs.float()), mask)
    rows = torch.arange(len(scores), device=scores.device)
    has_response = response_mask.any(1)
    rewards[rows, last_token(response_mask)] += scores.float() * has_response
    values = _masked(values.float(), mask)
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * gae_lambda * next_advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return Advantages(rewards, advantages, advantages + values)


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where the mask is set, else 0: a product would let a NaN or an infinity from outside through."""
    return torch.where(mask.bool(), x, 0.0)


def whiten(x: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Mean removed and unit variance over the masked entries of `x` `(B, T)`; 0 elsewhere."""
    x = _masked(_wide(x), mask)
    count = mask.sum().clamp_min(1)
    centred = _masked(x - x.sum() / count, mask)
    return centred * torch.rsqrt(centred.square().sum() / count + eps)


class PolicyLoss(NamedTuple):
    """Sums over the masked tokens, scalars: divide by the count of tokens."""

    loss: Tensor
    ratio: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


def clipped_policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *, clip_ratio: float = 0.2
) -> PolicyLoss:
    """PPO's clipped surrogate, eq. 7 with the sign turned: sum of -min(r A, clip(r, 1-c, 1+c) A).

    All tensors `(B, T)`; gradient flows to `log_probs` alone. `approx_kl` is the k3 sum of old against new. The
    log-ratio is clamped to +-20, beyond which a token has no gradient.
    """
    log_ratio = _masked(log_probs - old_log_probs.detach(), mask).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio, advantages = log_ratio.exp(), _masked(advantages.detach(), mask)
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages
    with torch.no_grad():
        clip_fraction = (clipped < plain).to(plain.dtype).sum()
        ratio_sum = _masked(ratio, mask).sum()
        approx_kl = (torch.expm1(log_ratio) - log_ratio).sum()
    return PolicyLoss(-torch.minimum(plain, clipped).sum(), ratio_sum, clip_fraction, approx_kl)


class ValueLoss(NamedTuple):
    """Sums over the masked tokens, scalars: divide by the count of tokens."""

    loss: Tensor
    clip_fraction: Tensor
    error: Tensor


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_value: float = 0.2
) -> ValueLoss:
    """Sum of 0.5 max((V - R)^2, (clip(V, V_old +- c) - R)^2); all `(B, T)`, gradient to `values` alone."""
    old_values, returns = old_values.detach(), returns.detach()
    change = values - old_values
    # not old + change throughout: rounding would count values as clipped that are not
    clipped = torch.where(change.abs() <= clip_value, values, old_values + change.clamp(-clip_value, clip_value))
    plain_error = _masked((values - returns).square(), mask)
    clipped_error = _masked((clipped - returns).square(), mask)
    with torch.no_grad():
        clip_fraction = (clipped_error > plain_error).to(plain_error.dtype).sum()
        error = plain_error.sum()
    return ValueLoss(0.5 * torch.maximum(plain_error, clipped_error).sum(), clip_fraction, error)


def pairwise_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Bradley-Terry loss of each pair, `(P,)`: -log sigmoid(chosen - rejected)."""
    return -F.logsigmoid(chosen.float() - rejected.float())
