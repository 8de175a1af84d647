"""The public operations in plain torch: the CPU path, the oracle of the tests and the baseline of benchmarks.

Conventions: `B` rows, `T` tokens, `V` the local part of the vocabulary. Per-token tensors are `(B, T)` and
aligned with `tokens`; `mask` is 1 where a token counts. Reductions and softmaxes run in float32 or wider.

Sources: PPO (Schulman et al. 2017, arXiv:1707.06347), GAE (Schulman et al. 2015, arXiv:1506.02438, eq. 11-16),
KL-shaped rewards (Ziegler et al. 2019, arXiv:1909.08593, eq. 2), KL estimators k1, k2, k3 (Schulman,
"Approximating KL Divergence", 2020), pairwise reward loss (Ouyang et al. 2022, arXiv:2203.02155, eq. 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]
KLTerm = Literal["k1", "k2", "k3", "k3+"]
PolicyKind = Literal["ppo", "gspo", "cispo", "reinforce"]
Banned = tuple[Tensor, Tensor]

# A log-ratio beyond this says that two policies share no support; its exponential would only overflow.
LOG_RATIO_LIMIT = 20.0

# Two buffers of this size and a chunk of logits fit the second-level cache of current cores.
CHUNK_BYTES = 1 << 19

# Stands for log 0 where it is multiplied by a probability of 0; its exponential is 0 in float64 too.
_LOWEST = -1e5


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype is torch.float64 else x.float()


# -- distributions over a vocabulary: the parts that log_prob.py puts together -----------------------------------


def _spans(num_rows: int, width: int, dtype: torch.dtype) -> Iterator[slice]:
    """Rows in chunks that stay in the cache of a core from one elementwise operation to the next."""
    step = max(1, CHUNK_BYTES * torch.get_num_threads() // max(1, width * dtype.itemsize))
    return (slice(i, min(i + step, num_rows)) for i in range(0, num_rows, step))


class _Chunks:
    """Chunks of the selected rows in float32 or wider, and the two buffers that all of them share."""

    def __init__(self, logits: Tensor, num_rows: int, rows: Tensor | None, banned: Banned | None):
        self.logits, self.rows, self.banned = logits, rows, banned
        self.dtype = torch.float64 if logits.dtype is torch.float64 else torch.float32
        self.spans = list(_spans(num_rows, logits.shape[1], self.dtype))
        longest = self.spans[0].stop if self.spans else 0
        self._buffers = torch.empty(2, longest, logits.shape[1], dtype=self.dtype, device=logits.device)
        if banned is not None:
            here = (banned[1] >= 0) & (banned[1] < logits.shape[1])
            self.columns = banned[1][here]

    def buffers(self, span: slice) -> tuple[Tensor, Tensor]:
        return self._buffers[0, : span.stop - span.start], self._buffers[1, : span.stop - span.start]

    def load(self, span: slice) -> Tensor:
        """The rows of `span`: the logits themselves where they can be used as they are, else the first buffer."""
        x = self.logits[span] if self.rows is None else self.logits[self.rows[span]]
        if x.dtype is self.dtype and self.banned is None:
            return x
        x = self.buffers(span)[0].copy_(x)
        if self.banned is not None and len(self.columns):
            early = self.banned[0][span].nonzero()
            x[early, self.columns] = -torch.inf
        return x


def token_stats(
    logits: Tensor, tokens: Tensor, rows: Tensor | None, banned: Banned | None, temperature: float
) -> Tensor:
    """What a distribution needs of these columns, one part `(1, 4, N)`; log_prob.py says of what.

    Args:
        logits: `(R, V)`.
        tokens: `(N,)` as indices of these columns; others are held elsewhere and count 0.
        rows: `(N,)`, the rows to read, or None for all of them.
        banned: (bool `(N,)`, column indices `(K,)`).
    """
    chunks = _Chunks(logits, len(tokens), rows, banned)
    packed = torch.zeros(4, len(tokens), dtype=chunks.dtype, device=logits.device)
    maximum, total, weighted, target = packed
    if not logits.shape[1]:
        maximum.fill_(-torch.inf)
        return packed.unsqueeze(0)
    here = (tokens >= 0) & (tokens < logits.shape[1])
    places = torch.arange(len(tokens), device=logits.device) if rows is None else rows
    target.copy_(torch.where(here, logits[places, tokens.clamp(0, logits.shape[1] - 1)].to(chunks.dtype), 0.0))

    def reduce(span: slice, replace_nan: bool) -> None:
        x = chunks.load(span)
        y, exp = chunks.buffers(span)
        highest = torch.amax(x, 1, out=maximum[span])
        # of nothing but -inf the maximum is that too, and -inf - -inf no number
        torch.sub(x, highest.clamp_min(torch.finfo(x.dtype).min).unsqueeze(1), out=y)
        if temperature != 1:
            y.div_(temperature)
        torch.exp(y, out=exp)
        torch.sum(exp, 1, out=total[span])
        y.mul_(exp)
        torch.sum(y.nan_to_num_(nan=0.0) if replace_nan else y, 1, out=weighted[span])

    for span in chunks.spans:
        reduce(span, False)
    if bool(weighted.isnan().any()):  # 0 * -inf, of columns without probability: few calls have any
        for span in chunks.spans:
            reduce(span, True)
    return packed.unsqueeze(0)


def merge_stats(parts: Tensor, temperature: float) -> Tensor:
    """Parts `(P, 4, N)` of distinct columns as one `(4, N)`."""
    if len(parts) == 1:
        return parts[0]
    maxima, totals, weighted, targets = parts.unbind(1)
    maximum = maxima.amax(0)
    # clamped for parts without a finite logit: exp of it is 0, and 0 times it is 0
    shift = ((maxima - maximum.clamp_min(torch.finfo(parts.dtype).min)) / temperature).clamp_min(_LOWEST)
    scale = shift.exp()
    return torch.stack([maximum, (scale * totals).sum(0), (scale * (weighted + shift * totals)).sum(0), targets.sum(0)])


def combine_stats(parts: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob, entropy, and the log-sum-exp as `maximum` (of the logits) and `log_total`, from `(P, 4, N)`.

    Two numbers and not their sum, which would round at the size of the logits.
    """
    maximum, total, weighted, target = merge_stats(parts, temperature)
    log_total = total.log()
    return (target - maximum) / temperature - log_total, log_total - weighted / total, maximum, log_total


def token_gradient(
    logits: Tensor,
    num_valid: int,
    tokens: Tensor,
    rows: Tensor | None,
    banned: Banned | None,
    temperature: float,
    saved: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None],
    out: Tensor,
) -> None:
    """Writes the gradient of logits `(R, V)` to `out`, of the same shape and type or the logits themselves.

    d log p(token) / d x = (1[token] - p) / T;  d H / d x = -p (log p + H) / T.

    Args:
        num_valid: columns beyond it are padding, whose gradient is 0.
        saved: maximum, log_total and entropy of each row, of the whole vocabulary.
        grads: incoming gradients of log-prob and entropy, `(N,)`, None for none.
    """
    maximum, log_total, entropy = saved
    grad_log_prob, grad_entropy = grads
    # with y = (x - maximum) / T, so that log p = y - log_total, it is e^y (slope y + factor), + at_token at the token
    at_token = torch.zeros_like(maximum) if grad_log_prob is None else grad_log_prob / temperature
    inverse_total = (-log_total).exp_()
    slope, factor = None, -at_token
    if grad_entropy is not None:
        slope = -grad_entropy / temperature
        factor = factor + slope * (entropy - log_total)
        slope = (slope * inverse_total).unsqueeze(1)
    factor = (factor * inverse_total).unsqueeze(1)
    chunks = _Chunks(logits[:, :num_valid], len(tokens), rows, banned)
    here = (tokens >= 0) & (tokens < num_valid)
    index = tokens.clamp(0, max(num_valid - 1, 0)).unsqueeze(1)
    at_token = torch.where(here, at_token, 0.0).unsqueeze(1)
    for span in chunks.spans if num_valid else ():
        y, exp = chunks.buffers(span)
        torch.sub(chunks.load(span), maximum[span].unsqueeze(1), out=y)
        if temperature != 1:
            y.div_(temperature)
        torch.exp(y, out=exp)
        # straight into the result where that needs no conversion
        grad = out[span, :num_valid] if rows is None and out.dtype is exp.dtype else exp
        if slope is None:
            torch.mul(exp, factor[span], out=grad)
        else:
            y.clamp_min_(_LOWEST).mul_(slope[span]).add_(factor[span])
            torch.mul(exp, y, out=grad)
        grad.scatter_add_(1, index[span], at_token[span])
        if rows is not None:
            out[rows[span], :num_valid] = grad.to(out.dtype)
        elif grad is exp:
            out[span, :num_valid] = grad
    out[:, num_valid:] = 0
    if rows is not None:
        others = torch.ones(len(out), dtype=torch.bool, device=out.device)
        others[rows] = False
        out[others] = 0


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


class Advantages(NamedTuple):
    """What `kl_advantages` returns; float32, the per-token fields 0 outside the mask."""

    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T)
    rewards: Tensor  # (B,), each row's sum, the KL's share included
    moments: Tensor  # (3,): count, mean and variance of the advantages


def kl_advantages(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    values: Tensor,
    rewards: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    gamma: float,
    gae_lambda: float | Tensor,
) -> Advantages:
    """See advantage.py; here `mask` is bool.

    The recurrence runs over tokens, as many rows at a time as there are: one fused multiply-add a token, by 1 in a gap.
    """
    places = mask.cumsum(1)  # of a token among those of its row, from 1 on; in a gap that of the token before
    log_ratio = (ref_log_probs.float() - log_probs.float()).clamp_(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    delta = _masked(log_ratio.mul_(kl_coef), mask)
    if rewards.dim() == 1:
        delta += _masked(rewards.float().unsqueeze(1), mask & (places == places[:, -1:]))
    else:
        delta += _masked(rewards.float(), mask)
    totals = delta.sum(1)
    values = _masked(values.float(), mask)
    delta -= values
    # a gap's values are 0, so that adding them to a token's place changes nothing
    by_place = values.new_zeros(len(mask), mask.shape[1] + 2).scatter_add_(1, places, values)
    delta += gamma * _masked(by_place.gather(1, places + 1), mask)
    columns = delta.T.contiguous()
    decays = torch.as_tensor(gamma * gae_lambda, dtype=delta.dtype, device=delta.device)
    factors = torch.where(mask.T, decays, 1.0)
    for t in range(len(columns) - 2, -1, -1):
        columns[t].addcmul_(factors[t], columns[t + 1])
    advantages = _masked(columns.T.contiguous(), mask)
    return Advantages(advantages, advantages + values, totals, _moments(advantages, mask))


def _moments(x: Tensor, mask: Tensor) -> Tensor:
    """Count, mean and variance of `x` within the mask, `(3,)`; the variance from the mean and not from squares."""
    count = mask.sum().to(x.dtype)
    mean = _masked(x, mask).sum() / count.clamp_min(1)
    return torch.stack([count, mean, _masked(x - mean, mask).square_().sum() / count.clamp_min(1)])


def corrected(moments: Tensor, correction: int) -> Tensor:
    """Count, mean and variance `(3,)`, the variance divided by the count less `correction` and not by the count."""
    count, mean, variance = moments
    return torch.stack([count, mean, variance * (count / (count - correction).clamp_min(1))])


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where the mask is set, else 0: a product would let a NaN or an infinity from outside through."""
    return torch.where(mask.bool(), x, 0.0)


def whiten(x: Tensor, mask: Tensor, *, eps: float = 1e-8, moments: Tensor | None = None, correction: int = 0) -> Tensor:
    """Mean removed and unit variance over the masked entries of `x` `(B, T)`; 0 elsewhere.

    Args:
        eps: added to the variance.
        moments: those of `kl_advantages`; None to take them from `x`.
        correction: taken off the count that the variance divides by: 0 as numpy, 1 as torch.var and most peers.
    """
    x = _wide(x)
    _, mean, variance = corrected(_moments(x, mask) if moments is None else moments, correction)
    return _masked((x - mean) * torch.rsqrt(variance + eps), mask)


class PolicyLoss(NamedTuple):
    """Sums over the masked tokens, scalars: divide by the count of tokens; `loss` alone is weighted."""

    loss: Tensor
    ratio: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


class PolicyChoices(NamedTuple):
    """Which policy loss it is; see `clipped_policy_loss` of losses.py."""

    kind: PolicyKind
    low: float
    high: float
    dual: float  # infinite for none
    kl: KLTerm | None
    kl_coef: float
    eps: float


def policy_sums(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    moments: Tensor | None,
    weights: Tensor | None,
    ref_log_probs: Tensor | None,
    choices: PolicyChoices,
) -> tuple[PolicyLoss, Tensor]:
    """`clipped_policy_loss` of losses.py, and the gradient of its sum for each token."""
    log_probs = _masked(_wide(log_probs), mask)
    change = _masked(log_probs - old_log_probs, mask)
    log_ratio = change.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    approx_kl = torch.expm1(log_ratio).sub_(log_ratio).sum()
    if choices.kind == "gspo":
        change = change.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
        log_ratio = _masked(change.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), mask)
    if moments is not None:
        advantages = whiten(advantages, mask, eps=choices.eps, moments=moments)
    ratio, advantages = log_ratio.exp(), _masked(advantages, mask)
    bounded = ratio.clamp(1 - choices.low, 1 + choices.high)
    if choices.kind in ("ppo", "gspo"):
        plain, clipped = ratio * advantages, bounded.mul_(advantages)
        floor = torch.where(advantages < 0, choices.dual * advantages, -torch.inf)
        value = torch.minimum(plain, clipped)
        is_clipped = (clipped < plain) | (value < floor)
        value = torch.maximum(value, floor)
        slope = plain.masked_fill_(is_clipped | (change.abs() > LOG_RATIO_LIMIT), 0)
    else:
        is_clipped = (bounded != ratio) if choices.kind == "cispo" else torch.zeros_like(mask)
        slope = bounded.mul_(advantages) if choices.kind == "cispo" else advantages
        value = slope * log_probs
    loss, grad = -value, -slope
    if ref_log_probs is not None:
        ref_log_probs = _masked(ref_log_probs, mask)
        kl = kl_estimate(log_probs, ref_log_probs, choices.kl.rstrip("+"))  # type: ignore[union-attr,arg-type]
        distance = kl_estimate(log_probs, ref_log_probs)
        loss = loss + choices.kl_coef * kl
        grad = grad + choices.kl_coef * (-torch.expm1(-distance) if choices.kl == "k3" else distance)
    if weights is not None:
        loss, grad = loss * weights.unsqueeze(1), grad * weights.unsqueeze(1)
    return PolicyLoss(loss.sum(), _masked(ratio, mask).sum(), is_clipped.sum().to(loss.dtype), approx_kl), grad


class ValueLoss(NamedTuple):
    """Sums over the masked tokens, scalars: divide by the count of tokens."""

    loss: Tensor
    clip_fraction: Tensor
    error: Tensor


def value_sums(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_value: float
) -> tuple[ValueLoss, Tensor]:
    """`clipped_value_loss` of losses.py, and the gradient of its sum for each token."""
    values, old_values, returns = (_masked(x, mask) for x in (_wide(values), old_values, returns))
    change = values - old_values
    is_near = change.abs() <= clip_value
    # not old + change throughout: rounding would count values as clipped that are not
    clipped = torch.where(is_near, values, change.clamp_(-clip_value, clip_value).add_(old_values))
    grad = values - returns
    error, clipped_error = grad.square(), clipped.sub_(returns).square_()
    is_clipped = clipped_error > error
    loss = 0.5 * torch.maximum(error, clipped_error).sum()
    # half of it where both errors are the same and one has no gradient, as torch.maximum has it
    grad.masked_fill_(is_clipped, 0).mul_(torch.where(is_near | (clipped_error != error), 1.0, 0.5))
    return ValueLoss(loss, is_clipped.sum().to(loss.dtype), error.sum()), grad


def pairwise_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Bradley-Terry loss of each pair, `(P,)`: -log sigmoid(chosen - rejected)."""
    return -F.logsigmoid(chosen.float() - rejected.float())


# -- attention over a cache --------------------------------------------------------------------------------------


def cached_attention(q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, window: int | None) -> Tensor:
    """See attention.py; every sequence is read as far as the table goes."""
    t = torch.arange(table.shape[1] * cache.shape[3], device=q.device)
    seen = t < lengths.unsqueeze(1)
    if window is not None:
        seen &= t >= lengths.unsqueeze(1) - window
    seen = seen[:, None, :, None]
    keys, values = (_wide(part[table].transpose(1, 2).flatten(2, 3)).masked_fill_(~seen, 0) for part in cache)
    scores = _wide(q) @ keys.mT * q.shape[3] ** -0.5
    return (scores.masked_fill_(~seen.mT, -torch.inf).softmax(-1) @ values).to(q.dtype)


# -- layers ------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float, add: Tensor | None = None) -> Tensor:
    """See norm.py."""
    if add is not None:
        x += add
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(x: Tensor) -> Tensor:
    """See swiglu.py."""
    gate, up = x.chunk(2, -1)
    active = F.silu(gate)
    return active * up if active.requires_grad else active.mul_(up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See rotary.py."""
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).contiguous()


class HeadNorms(NamedTuple):
    """Weights of the norms of queries and of keys, `(D,)` both."""

    query: Tensor
    key: Tensor
    eps: float


def attention_heads(
    qkv: Tensor,
    bias: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
    norms: HeadNorms | None,
    cache: Tensor | None,
    places: Tensor | None,
) -> Tensor:
    """See rotary.py; a type of 32 bits or more is rounded once where it is multiplied and added."""
    dim = qkv.shape[3]
    if bias is not None:
        qkv += bias.view(qkv.shape[1:])
    if norms is not None:
        qkv[:, :, :-2] = rms_norm(qkv[:, :, :-2], norms.query, norms.eps)
        qkv[:, :, -2] = rms_norm(qkv[:, :, -2], norms.key, norms.eps)
    if rotary is not None:
        cos, sin = rotary
        turned = qkv.roll(dim // 2, -1)
        qkv = torch.addcmul(qkv * cos, turned, sin) if qkv.element_size() >= 4 else qkv * cos + turned * sin
    if cache is None or places is None:
        return qkv
    cache.view(-1, dim).index_copy_(0, places, qkv[:, :, -2:].reshape(-1, dim))
    return qkv[:, :, :-2]
