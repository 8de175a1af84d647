"""Triton kernels under losses.py: a loss, its statistics and its gradient in one pass.

Forward writes the gradient of each token: 17 bytes, and backward scales it, 8 bytes. To compute it again in
backward would take 13 and 17. Each program sums its own block; the sums of blocks are added by one reduction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import LOG_RATIO_LIMIT, PolicyLoss, ValueLoss

LAUNCH = {"policy": {"BLOCK": 1024, "num_warps": 4}, "value": {"BLOCK": 1024, "num_warps": 4}}


@triton.jit
def _k3(x):
    """e^x - 1 - x, near 0 by its series: the difference would leave no digits."""
    series = 1 / 720 + x * (1 / 5040 + x * (1 / 40320 + x * (1 / 362880)))
    series = 1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * series)))
    return tl.where(tl.abs(x) < 0.5, x * x * series, tl.exp(x) - 1 - x)


@triton.jit
def policy_kernel(
    log_probs, old_log_probs, advantages, mask, moments, grad, sums, num_tokens, clip_ratio, eps,
    LIMIT: tl.constexpr, WHITEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`sums` `(programs, 4)`: loss, ratio, clipped tokens, k3."""
    pid = tl.program_id(0)
    i = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_tokens
    here = tl.load(mask + i, mask=inside, other=0) != 0
    change = tl.load(log_probs + i, mask=inside, other=0.0) - tl.load(old_log_probs + i, mask=inside, other=0.0)
    change = tl.where(here, change, 0.0)
    log_ratio = tl.where(change > LIMIT, LIMIT, tl.where(change < -LIMIT, -LIMIT, change))  # a NaN stays
    ratio = tl.exp(log_ratio)
    advantage = tl.load(advantages + i, mask=inside, other=0.0)
    if WHITEN:
        advantage = (advantage - tl.load(moments + 1)) / tl.sqrt(tl.load(moments + 2) + eps)
    advantage = tl.where(here, advantage, 0.0)
    plain = ratio * advantage
    clipped = tl.minimum(tl.maximum(ratio, 1 - clip_ratio), 1 + clip_ratio) * advantage
    is_clipped = clipped < plain
    tl.store(grad + i, tl.where(is_clipped | (tl.abs(change) > LIMIT), 0.0, -plain), mask=inside)
    tl.store(sums + pid * 4, -tl.sum(tl.where(is_clipped, clipped, plain), 0))
    tl.store(sums + pid * 4 + 1, tl.sum(tl.where(here, ratio, 0.0), 0))
    tl.store(sums + pid * 4 + 2, tl.sum(is_clipped.to(tl.float32), 0))
    tl.store(sums + pid * 4 + 3, tl.sum(_k3(log_ratio), 0))


@triton.jit
def value_kernel(
    values, old_values, returns, mask, grad, sums, num_tokens, clip_value,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`sums` `(programs, 3)`: loss, clipped tokens, squared error."""
    pid = tl.program_id(0)
    i = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_tokens
    here = tl.load(mask + i, mask=inside, other=0) != 0
    value = tl.where(here, tl.load(values + i, mask=inside, other=0.0), 0.0)
    old = tl.where(here, tl.load(old_values + i, mask=inside, other=0.0), 0.0)
    target = tl.where(here, tl.load(returns + i, mask=inside, other=0.0), 0.0)
    change = value - old
    is_near = tl.abs(change) <= clip_value
    clipped = tl.where(is_near, value, old + tl.where(change > 0, clip_value, -clip_value))
    error = (value - target) * (value - target)
    clipped_error = (clipped - target) * (clipped - target)
    is_clipped = clipped_error > error
    # half of it where both errors are the same and one has no gradient, as torch.maximum has it
    share = tl.where(is_near, 1.0, tl.where(is_clipped, 0.0, tl.where(clipped_error == error, 0.5, 1.0)))
    tl.store(grad + i, share * (value - target), mask=inside)
    tl.store(sums + pid * 3, 0.5 * tl.sum(tl.where(is_clipped, clipped_error, error), 0))
    tl.store(sums + pid * 3 + 1, tl.sum(is_clipped.to(tl.float32), 0))
    tl.store(sums + pid * 3 + 2, tl.sum(error, 0))


def policy_sums(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    moments: Tensor | None,
    clip_ratio: float,
    eps: float,
) -> tuple[PolicyLoss, Tensor]:
    """See reference.py."""
    x, old, advantages = (t.float().contiguous() for t in (log_probs, old_log_probs, advantages))
    grad, sums = torch.empty_like(x), _sums("policy", x, 4)
    policy_kernel[(len(sums),)](
        x, old, advantages, mask.contiguous().view(torch.uint8), x if moments is None else moments, grad, sums,
        x.numel(), clip_ratio, eps, LIMIT=LOG_RATIO_LIMIT, WHITEN=moments is not None, **LAUNCH["policy"],
    )  # fmt: skip
    return PolicyLoss(*sums.sum(0).unbind()), grad


def value_sums(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_value: float
) -> tuple[ValueLoss, Tensor]:
    """See reference.py."""
    x, old, returns = (t.float().contiguous() for t in (values, old_values, returns))
    grad, sums = torch.empty_like(x), _sums("value", x, 3)
    value_kernel[(len(sums),)](
        x, old, returns, mask.contiguous().view(torch.uint8), grad, sums, x.numel(), clip_value, **LAUNCH["value"]
    )
    return ValueLoss(*sums.sum(0).unbind()), grad


def _sums(kernel: str, x: Tensor, width: int) -> Tensor:
    """Room for the sums of each program; at least one program, which then adds nothing."""
    return torch.empty(max(1, triton.cdiv(x.numel(), LAUNCH[kernel]["BLOCK"])), width, device=x.device)
