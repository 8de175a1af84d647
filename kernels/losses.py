"""PPO's clipped losses (Schulman et al. 2017, arXiv:1707.06347), each with its statistics in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import use_triton
from .reference import PolicyLoss, ValueLoss


def _implementation(x: Tensor) -> Any:
    """The module whose policy_sums and value_sums run for `x`."""
    if not use_triton(x):
        return reference
    from . import losses_triton

    return losses_triton


class _Summed(torch.autograd.Function):
    """Sums of which the first is a loss. Forward has each token's gradient at hand, and backward scales it."""

    @staticmethod
    def forward(ctx, x, sums, *arguments):
        (loss, *statistics), grad = sums(x, *arguments)
        ctx.save_for_backward(grad)
        ctx.dtype, ctx.nothing = x.dtype, (None,) * (1 + len(arguments))
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    def backward(ctx, grad_loss, *_):
        (grad,) = ctx.saved_tensors
        return (grad * grad_loss).to(ctx.dtype), *ctx.nothing


def clipped_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_ratio: float = 0.2,
    moments: Tensor | None = None,
    eps: float = 1e-8,
) -> PolicyLoss:
    """PPO's clipped surrogate, eq. 7 with the sign turned: sum of -min(r A, clip(r, 1-c, 1+c) A).

    All tensors `(B, T)`; gradient flows to `log_probs` alone. The log-ratio is clamped to +-20, beyond which a token
    has no gradient. What lies outside the mask may be anything.

    Args:
        moments: `(3,)` of `kl_advantages`: count, mean and variance by which the advantages are whitened first; None
            to take them as they are.
        eps: added to that variance.

    Returns:
        Sums over the masked tokens, scalars; divide by their count. `approx_kl` is the k3 sum of old against new.
    """
    arguments = (old_log_probs.detach(), advantages.detach(), mask.bool(), moments, clip_ratio, eps)
    return PolicyLoss(*_Summed.apply(log_probs, _implementation(log_probs).policy_sums, *arguments))


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_value: float = 0.2
) -> ValueLoss:
    """Sum of 0.5 max((V - R)^2, (clip(V, V_old +- c) - R)^2) over the masked tokens.

    All tensors `(B, T)`; gradient flows to `values` alone.

    Returns:
        Sums over the masked tokens, scalars; divide by their count. `error` is that of (V - R)^2.
    """
    arguments = (old_values.detach(), returns.detach(), mask.bool(), clip_value)
    return ValueLoss(*_Summed.apply(values, _implementation(values).value_sums, *arguments))
