"""PPO's clipped losses (Schulman et al. 2017, arXiv:1707.06347), each with its statistics in one pass."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .dispatch import use_triton
from .reference import PolicyLoss, ValueLoss


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
    mask = mask.bool()
    if not use_triton(log_probs):
        return reference.clipped_policy_loss(
            log_probs, old_log_probs, advantages, mask, clip_ratio=clip_ratio, moments=moments, eps=eps
        )
    from .losses_triton import policy_sums

    return PolicyLoss(*policy_sums(log_probs, old_log_probs, advantages, mask, moments, clip_ratio, eps))


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_value: float = 0.2
) -> ValueLoss:
    """Sum of 0.5 max((V - R)^2, (clip(V, V_old +- c) - R)^2) over the masked tokens.

    All tensors `(B, T)`; gradient flows to `values` alone.

    Returns:
        Sums over the masked tokens, scalars; divide by their count. `error` is that of (V - R)^2.
    """
    mask = mask.bool()
    if not use_triton(values):
        return reference.clipped_value_loss(values, old_values, returns, mask, clip_value=clip_value)
    from .losses_triton import value_sums

    return ValueLoss(*value_sums(values, old_values, returns, mask, clip_value))
