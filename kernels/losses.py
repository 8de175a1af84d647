"""Losses of policies and critics (PPO: Schulman et al. 2017, arXiv:1707.06347), with their statistics in one pass."""

from __future__ import annotations

import math
import typing
from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import use_triton
from .reference import KLTerm, PolicyChoices, PolicyKind, PolicyLoss, ValueLoss


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
    kind: PolicyKind = "ppo",
    clip_ratio: float = 0.2,
    clip_ratio_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    kl: KLTerm = "k3",
    kl_coef: float = 0.0,
    moments: Tensor | None = None,
    eps: float = 1e-8,
) -> PolicyLoss:
    """Sum over tokens of a policy loss, which is by its kind, with r = exp(log_prob - old_log_prob) and
    clip(r) = min(max(r, 1 - clip_ratio), 1 + clip_ratio_high):

    ppo: -min(r A, clip(r) A)  (Schulman et al. 2017, eq. 7; two bounds: Yu et al. 2025, arXiv:2503.14476, eq. 10);
    gspo: the same with the ratio of sequences, exp of the mean of log r over the row's tokens (Zheng et al. 2025,
    arXiv:2507.18071, eq. 7 and, for advantages that differ between tokens, 14);
    cispo: -clip(r) A log_prob, clip(r) without a gradient (MiniMax 2025, arXiv:2506.13585, eq. 4);
    reinforce: -A log_prob.

    All tensors `(B, T)`, a row one response, of one turn or of several; gradient flows to `log_probs` alone. The
    log-ratio is clamped to +-20, beyond which ppo and gspo have no gradient. Outside the mask anything may stand.

    Args:
        clip_ratio_high: the upper bound; None: as the lower.
        dual_clip: a loss of a token with A < 0 is at most -dual_clip A, in ppo and gspo (Ye et al. 2020,
            arXiv:1912.09729, eq. 5); above 1, None for none.
        weights: `(B,)`, by which each row's tokens, their KL included, enter the loss; None: 1.
        ref_log_probs: adds kl_coef times an estimate of KL(policy || reference); None for none.
        kl: the estimate (see `kl_estimate`). Its gradient is log_prob - ref_log_prob, which is the KL's own where the
            policy has sampled, k2's derivative, and what k1, whose derivative is 1, has in its place. k3 has its
            derivative 1 - p_ref / p, as GRPO's authors (arXiv:2402.03300, eq. 4); k3+ has k3's value with the KL's
            gradient. The log-ratio is clamped to +-20, beyond which the gradient stays what it is there.
        moments: `(3,)` of `kl_advantages`: count, mean and variance by which the advantages are whitened first; None
            to take them as they are.
        eps: added to that variance.

    Returns:
        Sums over the masked tokens, scalars; divide by their count. `clip_fraction` counts the tokens that a bound has
        changed. `approx_kl` is the k3 sum of old against new. Weights enter `loss` alone.

    Raises:
        ValueError: a kind is unknown, or `dual_clip` is not above 1.
    """
    for what, value, known in (("policy loss", kind, PolicyKind), ("KL term", kl, KLTerm)):
        if value not in typing.get_args(known):
            raise ValueError(f"{what} {value!r} is unknown: {', '.join(typing.get_args(known))}")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} must be above 1")
    high = clip_ratio if clip_ratio_high is None else clip_ratio_high
    choices = PolicyChoices(kind, clip_ratio, high, math.inf if dual_clip is None else dual_clip, kl, kl_coef, eps)
    fixed = [x if x is None else x.detach() for x in (weights, ref_log_probs)]
    arguments = (old_log_probs.detach(), advantages.detach(), mask.bool(), moments, *fixed, choices)
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
