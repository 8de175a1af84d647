"""Triton kernels under advantage.py: one program a row, from its end, and one that joins the rows' moments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import LOG_RATIO_LIMIT, Advantages

LAUNCH = {"rows": {"BLOCK": 1024, "num_warps": 4}, "moments": {"BLOCK": 1024, "num_warps": 4}}


@triton.jit
def _after(later_factor, later, factor, value):
    """x_t = value + factor x_{t+1}, applied after what is known of the later tokens."""
    return factor * later_factor, value + factor * later


@triton.jit
def rows_kernel(
    log_probs, ref_log_probs, values, given, mask, advantages, returns, rewards, moments, num_rows, num_tokens,
    kl_coef, gamma, decays, LIMIT: tl.constexpr, OF_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`given` is what is rewarded beside the KL, `(B, T)` if OF_TOKENS, else `(B,)`. `decays` `(B,)` is gamma lambda.
    `moments` `(3, B)`: count, mean and sum of squared deviations of each row.

    Two recurrences go through a row, both of them unchanged through its gaps: the value of the next token, which each
    token sets anew, and the advantage.
    """
    row = tl.program_id(0)
    decay = tl.load(decays + row)
    offset = row.to(tl.int64) * num_tokens
    num_blocks = tl.cdiv(num_tokens, BLOCK)
    t0 = tl.arange(0, BLOCK)
    advantage, following = 0.0, 0.0  # advantage and value of the next token behind the block
    reward_sum = 0.0
    score = 0.0 if OF_TOKENS else tl.load(given + row)
    count, mean, deviation = 0.0, 0.0, 0.0
    for i in range(num_blocks):
        start = (num_blocks - 1 - i) * BLOCK
        t = start + t0
        inside = t < num_tokens
        here = tl.load(mask + offset + t, mask=inside, other=0) != 0
        then = tl.load(mask + offset + t + 1, mask=t + 1 < num_tokens, other=0) != 0
        value = tl.where(here, tl.load(values + offset + t, mask=inside, other=0.0), 0.0)
        then_value = tl.where(then, tl.load(values + offset + t + 1, mask=t + 1 < num_tokens, other=0.0), 0.0)
        gap, next_value = tl.associative_scan((tl.where(then, 0.0, 1.0), then_value), 0, _after, reverse=True)
        next_value += gap * following
        following = tl.sum(tl.where(t0 == 0, next_value, 0.0), 0)
        log_ratio = tl.load(ref_log_probs + offset + t, mask=inside, other=0.0) - tl.load(
            log_probs + offset + t, mask=inside, other=0.0
        )
        # comparisons and not minimum and maximum, which would hide a NaN
        log_ratio = tl.where(log_ratio > LIMIT, LIMIT, tl.where(log_ratio < -LIMIT, -LIMIT, log_ratio))
        if OF_TOKENS:
            beside = tl.load(given + offset + t, mask=here, other=0.0)
        else:  # once, at the last token of the first of these blocks that has one
            last = tl.max(tl.where(here, t, -1), 0)
            beside = tl.where(t == last, score, 0.0)
            score = tl.where(last < 0, score, 0.0)
        reward = tl.where(here, kl_coef * log_ratio + beside, 0.0)
        reward_sum += tl.sum(reward, 0)
        delta = tl.where(here, reward - value + gamma * next_value, 0.0)
        factor, x = tl.associative_scan((tl.where(here, decay, 1.0), delta), 0, _after, reverse=True)
        x += factor * advantage
        advantage = tl.sum(tl.where(t0 == 0, x, 0.0), 0)
        x = tl.where(here, x, 0.0)
        tl.store(advantages + offset + t, x, mask=inside)
        tl.store(returns + offset + t, x + value, mask=inside)
        # Chan, Golub and LeVeque 1979: deviations are taken from the block's own mean, then from the joint one
        block_count = tl.sum(here.to(tl.float32), 0)
        block_mean = tl.sum(x, 0) / tl.maximum(block_count, 1.0)
        from_mean = tl.where(here, x - block_mean, 0.0)
        joint = tl.maximum(count + block_count, 1.0)
        step = block_mean - mean
        deviation += tl.sum(from_mean * from_mean, 0) + step * step * (count * block_count / joint)
        mean += step * (block_count / joint)
        count += block_count
    tl.store(rewards + row, reward_sum)
    tl.store(moments + row, count)
    tl.store(moments + num_rows + row, mean)
    tl.store(moments + 2 * num_rows + row, deviation)


@triton.jit
def moments_kernel(rows, out, num_rows, BLOCK: tl.constexpr):
    """`(3, B)` of the rows as count, mean and variance of all."""
    count = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        row_count = tl.load(rows + i, mask=i < num_rows, other=0.0)
        count += row_count
        total += row_count * tl.load(rows + num_rows + i, mask=i < num_rows, other=0.0)
    num = tl.maximum(tl.sum(count, 0), 1.0)
    mean = tl.sum(total, 0) / num
    deviation = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        step = tl.load(rows + num_rows + i, mask=i < num_rows, other=0.0) - mean
        deviation += tl.load(rows + 2 * num_rows + i, mask=i < num_rows, other=0.0)
        deviation += tl.load(rows + i, mask=i < num_rows, other=0.0) * step * step
    tl.store(out, tl.sum(count, 0))
    tl.store(out + 1, mean)
    tl.store(out + 2, tl.sum(deviation, 0) / num)


def kl_advantages(
    log_probs: Tensor, ref_log_probs: Tensor, values: Tensor, rewards: Tensor, mask: Tensor, *, kl_coef: float,
    gamma: float, gae_lambda: float | Tensor,
) -> Advantages:  # fmt: skip
    """See reference.py."""
    num_rows, num_tokens = mask.shape
    inputs = [x.float().contiguous() for x in (log_probs, ref_log_probs, values, rewards)]
    advantages, returns = torch.empty(2, num_rows, num_tokens, device=values.device).unbind()
    totals = torch.empty(num_rows, device=values.device)
    decays = torch.empty_like(totals).copy_(torch.as_tensor(gamma * gae_lambda))
    rows, moments = torch.empty(3, num_rows, device=values.device), torch.zeros(3, device=values.device)
    if num_rows:
        rows_kernel[(num_rows,)](
            *inputs, mask.contiguous().view(torch.uint8), advantages, returns, totals, rows, num_rows, num_tokens,
            kl_coef, gamma, decays, LIMIT=LOG_RATIO_LIMIT, OF_TOKENS=rewards.dim() == 2, **LAUNCH["rows"],
        )  # fmt: skip
        moments_kernel[(1,)](rows, moments, num_rows, **LAUNCH["moments"])
    return Advantages(advantages, returns, totals, moments)
