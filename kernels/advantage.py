"""KL-shaped rewards, generalised advantages, returns and the moments that whitening needs, in one pass over the row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import use_triton
from .reference import Advantages


def kl_advantages(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    values: Tensor,
    rewards: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
    gamma: float = 1.0,
    gae_lambda: float | Tensor = 0.95,
) -> Advantages:
    """KL-shaped rewards, generalised advantages and returns of a batch of trajectories, detached.

    r_t = -kl_coef (log p_t - log p_ref,t) + what `rewards` has for token t;
    delta_t = r_t + gamma V_next - V_t;  A_t = delta_t + gamma lambda A_next;  returns_t = A_t + V_t,
    with V = A = 0 after the last token of a row (Ziegler et al. 2019, eq. 2; Schulman et al. 2015, eq. 16). `next` is
    the next token of the row that the mask selects: what stands between two turns takes no step, and nothing decays
    there. A row without any token gives 0. In Triton 21 bytes a token move, 25 with rewards of tokens: three or four
    floats and the mask in, two floats out; the values and the mask of t + 1 are in the cache.

    Args:
        log_probs, ref_log_probs, values: `(B, T)`. Outside the mask they may be anything, NaN included.
        rewards: what is rewarded beside the KL: `(B,)`, of each row at its last token, or `(B, T)`, of each token,
            outside the mask anything.
        response_mask: `(B, T)`, 1 on sampled tokens, with any gaps.
        kl_coef: reward per nat.
        gamma, gae_lambda: discount and the GAE mixture; the second may be one for each row, `(B,)`.

    Returns:
        `advantages` and `returns` `(B, T)`, 0 outside the mask; `rewards` `(B,)`, each row's sum, the KL's share
        included, unlike the argument; `moments` `(3,)`: count, mean and variance of the advantages within the mask.
        All float32.

    Raises:
        ValueError: `rewards` has another shape.
    """
    mask = response_mask.bool()
    if rewards.shape not in (mask.shape, mask.shape[:1]):
        raise ValueError(f"rewards {tuple(rewards.shape)} must be (B,) or (B, T) of a mask {tuple(mask.shape)}")
    settings: Any = {"kl_coef": kl_coef, "gamma": gamma, "gae_lambda": gae_lambda}
    with torch.no_grad():
        if not use_triton(values):
            return reference.kl_advantages(log_probs, ref_log_probs, values, rewards, mask, **settings)
        from . import advantage_triton

        return advantage_triton.kl_advantages(log_probs, ref_log_probs, values, rewards, mask, **settings)
