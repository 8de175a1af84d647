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
    scores: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
    gamma: float = 1.0,
    gae_lambda: float | Tensor = 0.95,
) -> Advantages:
    """KL-shaped rewards, generalised advantages and returns of a batch of responses, detached.

    r_t = -kl_coef (log p_t - log p_ref,t) + score at the last response token;
    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1};  returns_t = A_t + V_t,
    with V = A = 0 after the last token of a response (Ziegler et al. 2019, eq. 2; Schulman et al. 2015, eq. 16).
    A response ends where the mask is 0 next or the row ends; a packed row has several. In Triton 21 bytes a token
    move: three floats and the mask in, two floats out.

    Args:
        log_probs, ref_log_probs, values: `(B, T)`. Outside the mask they may be anything, NaN included.
        scores: `(B,)`, one a row, or `(B, S)` for rows of up to S responses, in their order.
        response_mask: `(B, T)`, 1 on response tokens.
        kl_coef: reward per nat.
        gamma, gae_lambda: discount and the GAE mixture; the second may be one for each row, `(B,)`.

    Returns:
        `advantages` and `returns` `(B, T)`, 0 outside the mask; `rewards` `(B,)`, each row's sum; `moments` `(3,)`:
        count, mean and variance of the advantages within the mask. All float32.

    Raises:
        ValueError: a row has more responses than scores (on CUDA it is looked for where `scores` is `(B, S)`).
    """
    mask = response_mask.bool()
    table = scores.unsqueeze(1) if scores.ndim == 1 else scores
    if scores.ndim == 2 or not mask.is_cuda:
        most = int((mask[:, 1:] > mask[:, :-1]).sum(1).add_(mask[:, 0]).amax()) if mask.numel() else 0
        if most > table.shape[1]:
            raise ValueError(f"a row has {most} responses for {table.shape[1]} scores")
    settings: Any = {"kl_coef": kl_coef, "gamma": gamma, "gae_lambda": gae_lambda}
    with torch.no_grad():
        if not use_triton(values):
            return reference.kl_advantages(log_probs, ref_log_probs, values, table, mask, **settings)
        from . import advantage_triton

        return advantage_triton.kl_advantages(log_probs, ref_log_probs, values, table, mask, **settings)
