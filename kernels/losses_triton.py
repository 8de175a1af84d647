"""Triton kernels under losses.py: a loss, its statistics and its gradient in one pass.

Forward writes the gradient of each token: 17 bytes, and backward scales it, 8 bytes. To compute it again in
backward would take 13 and 17. Each program sums its own block; the sums of blocks are added by one reduction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import LOG_RATIO_LIMIT, PolicyChoices, PolicyLoss, ValueLoss

LAUNCH = {name: {"BLOCK": 1024, "num_warps": 4} for name in ("policy", "value", "means")}


@triton.jit
def _k3(x):
    """e^x - 1 - x, near 0 by its series: the difference would leave no digits."""
    series = 1 / 720 + x * (1 / 5040 + x * (1 / 40320 + x * (1 / 362880)))
    series = 1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * series)))
    return tl.where(tl.abs(x) < 0.5, x * x * series, tl.exp(x) - 1 - x)


@triton.jit
def _minus_expm1(x):
    """1 - e^x, near 0 without losing digits."""
    return -(_k3(x) + x)


@triton.jit
def means_kernel(log_probs, old_log_probs, mask, means, num_columns, BLOCK: tl.constexpr):
    """Of each row, the mean over its tokens of the log-ratio; a program a row."""
    row = tl.program_id(0).to(tl.int64)
    total, count = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        i, inside = row * num_columns + column, column < num_columns
        here = tl.load(mask + i, mask=inside, other=0) != 0
        change = tl.load(log_probs + i, mask=inside, other=0.0) - tl.load(old_log_probs + i, mask=inside, other=0.0)
        total += tl.where(here, change, 0.0)
        count += here.to(tl.float32)
    tl.store(means + row, tl.sum(total, 0) / tl.maximum(tl.sum(count, 0), 1.0))


@triton.jit
def _clamp(x, LIMIT: tl.constexpr):
    """Between -LIMIT and LIMIT; a NaN stays."""
    return tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))


@triton.jit
def policy_kernel(
    log_probs, old_log_probs, advantages, mask, moments, weights, ref_log_probs, means, grad, sums,
    num_tokens, num_columns, low, high, dual, kl_coef, eps,
    KIND: tl.constexpr, KL: tl.constexpr, LIMIT: tl.constexpr, WHITEN: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`sums` `(programs, 4)`: loss, ratio, clipped tokens, k3."""
    pid = tl.program_id(0)
    i = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_tokens
    row = i // num_columns
    here = tl.load(mask + i, mask=inside, other=0) != 0
    log_prob = tl.where(here, tl.load(log_probs + i, mask=inside, other=0.0), 0.0)
    change = tl.where(here, log_prob - tl.load(old_log_probs + i, mask=inside, other=0.0), 0.0)
    tl.store(sums + pid * 4 + 3, tl.sum(_k3(_clamp(change, LIMIT)), 0))
    if KIND == "gspo":
        change = tl.where(here, tl.load(means + row, mask=inside, other=0.0), 0.0)
    ratio = tl.exp(_clamp(change, LIMIT))
    advantage = tl.load(advantages + i, mask=inside, other=0.0)
    if WHITEN:
        advantage = (advantage - tl.load(moments + 1)) / tl.sqrt(tl.load(moments + 2) + eps)
    advantage = tl.where(here, advantage, 0.0)
    bounded = tl.where(ratio < 1 - low, 1 - low, tl.where(ratio > 1 + high, 1 + high, ratio))
    is_clipped = bounded != ratio
    if KIND == "reinforce":
        slope = advantage
        value = advantage * log_prob
        is_clipped = is_clipped & False
    elif KIND == "cispo":
        slope = bounded * advantage
        value = slope * log_prob
    else:
        plain = ratio * advantage
        clipped = bounded * advantage
        value = tl.where(clipped < plain, clipped, plain)
        floor = tl.where(advantage < 0, dual * advantage, float("-inf"))
        is_clipped = (clipped < plain) | (value < floor)
        value = tl.where(value < floor, floor, value)
        slope = tl.where(is_clipped | (tl.abs(change) > LIMIT), 0.0, plain)
    loss = -value
    gradient = -slope
    if KL != "none":
        reference = tl.load(ref_log_probs + i, mask=inside, other=0.0)
        distance = tl.where(here, _clamp(log_prob - reference, LIMIT), 0.0)
        if KL == "k1":
            kl = distance
        elif KL == "k2":
            kl = distance * distance / 2
        else:
            kl = _k3(-distance)
        loss += kl_coef * kl
        gradient += kl_coef * (_minus_expm1(-distance) if KL == "k3" else distance)
    if WEIGHTED:
        weight = tl.load(weights + row, mask=inside, other=0.0)
        loss *= weight
        gradient *= weight
    tl.store(grad + i, gradient, mask=inside)
    tl.store(sums + pid * 4, tl.sum(loss, 0))
    tl.store(sums + pid * 4 + 1, tl.sum(tl.where(here, ratio, 0.0), 0))
    tl.store(sums + pid * 4 + 2, tl.sum(is_clipped.to(tl.float32), 0))


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
    weights: Tensor | None,
    ref_log_probs: Tensor | None,
    choices: PolicyChoices,
) -> tuple[PolicyLoss, Tensor]:
    """See reference.py."""
    x, old, advantages = (t.float().contiguous() for t in (log_probs, old_log_probs, advantages))
    grad, sums, means = torch.empty_like(x), _sums("policy", x, 4), x.new_empty(len(x))
    columns, mask = max(1, x.numel() // max(1, len(x))), mask.contiguous().view(torch.uint8)
    if choices.kind == "gspo" and len(x):
        means_kernel[(len(x),)](x, old, mask, means, columns, **LAUNCH["means"])
    # what is not there is not read
    others = [x if t is None else t.float().contiguous() for t in (moments, weights, ref_log_probs)]
    policy_kernel[(len(sums),)](
        x, old, advantages, mask, *others, means, grad, sums, x.numel(), columns,
        choices.low, choices.high, choices.dual, choices.kl_coef, choices.eps,
        KIND=choices.kind, KL="none" if ref_log_probs is None else choices.kl, LIMIT=LOG_RATIO_LIMIT,
        WHITEN=moments is not None, WEIGHTED=weights is not None, **LAUNCH["policy"],
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
