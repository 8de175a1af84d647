"""What a sample counts: its advantage against the others of its group, and its weight where another policy drew it."""

from __future__ import annotations

import typing
from typing import Literal

import torch
from torch import Tensor

from .reference import LOG_RATIO_LIMIT

Baseline = Literal["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "remax", "none"]


def group_advantages(
    scores: Tensor,
    groups: Tensor,
    kind: Baseline = "grpo",
    *,
    counts: Tensor | None = None,
    baselines: Tensor | None = None,
    correction: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    """Advantages `(B,)` of responses with these scores `(B,)`, with mean and std those of a response's group:

    grpo: (s - mean) / (std + eps)  (Shao et al. 2024, arXiv:2402.03300, section 4.1.2);
    dr_grpo: s - mean  (Liu et al. 2025, arXiv:2503.20783);
    rloo: s - the mean of the others  (Ahmadian et al. 2024, arXiv:2402.14740);
    reinforce++: s, standardised over the batch; reinforce++_baseline: s - mean, standardised over the batch
    (Hu et al. 2025, arXiv:2501.03262);
    remax: s - the score of the prompt's greedy response  (Li et al. 2023, arXiv:2310.10505);
    none: s.

    A response whose group has no other, or no other score, has s - mean = 0 exactly, and nothing to tell. Computed in
    float64, whatever the order of the rows.

    Args:
        groups: `(B,)`, equal numbers for the responses to one prompt; groups may be of any sizes.
        counts: `(B,)`, how often a response counts in the moments of the batch; its tokens, where peers whiten over
            tokens. None: once.
        baselines: `(B,)`, the scores that remax takes off.
        correction: taken off the count that a variance divides by: 1 as torch.std and most peers, 0 as numpy.
        eps: added to the std.

    Returns:
        Of the scores' type, float32 at least.

    Raises:
        ValueError: the kind is unknown, the shapes differ, or remax has no baselines.
    """
    if kind not in typing.get_args(Baseline):
        raise ValueError(f"group advantages of kind {kind!r} are unknown: {', '.join(typing.get_args(Baseline))}")
    if scores.shape != groups.shape or scores.dim() != 1:
        raise ValueError(f"scores {tuple(scores.shape)} and groups {tuple(groups.shape)} must both be (B,)")
    if kind == "remax" and baselines is None:
        raise ValueError("group advantages of kind remax need baselines")
    s = scores.double()
    _, index, sizes = groups.unique(return_inverse=True, return_counts=True)

    def mean(x: Tensor) -> Tensor:
        """Of each response's group."""
        return (torch.zeros_like(sizes, dtype=s.dtype).index_add_(0, index, x) / sizes)[index]

    lowest = torch.full_like(sizes, torch.inf, dtype=s.dtype).scatter_reduce_(0, index, s, "amin")[index]
    size, above = sizes[index], s - lowest  # which is 0 where all are equal, and so is its mean
    centred = above - mean(above)
    if kind == "grpo":
        variance = mean(centred.square()) * size / (size - correction).clamp_min(1)
        found = centred / (variance.sqrt() + eps)
    elif kind == "rloo":
        found = centred * size / (size - 1).clamp_min(1)
    elif kind.startswith("reinforce++"):
        found = _standardised(s if kind == "reinforce++" else centred, counts, correction, eps)
    elif kind == "remax":
        assert baselines is not None
        found = s - baselines.double()
    else:
        found = centred if kind == "dr_grpo" else s
    return found.to(torch.promote_types(scores.dtype, torch.float32))


def importance_weights(
    log_probs: Tensor,
    sampler_log_probs: Tensor,
    mask: Tensor,
    kind: Literal["truncated", "masked"] = "truncated",
    *,
    of: Literal["tokens", "sequences"] = "tokens",
    limit: float = 2.0,
    low: float | None = None,
) -> Tensor:
    """How much a token counts that another policy has drawn, `(B, T)` float32, 0 outside the mask.

    w = p / p_sampler of the token, or, of sequences, the product of these over the row; its log is kept within +-20.
    truncated: min(w, limit), which bounds the variance (Ionides 2008, "Truncated Importance Sampling"), and `low` at
    least; masked: w, and 0 where it is not within [low, limit].

    Args:
        log_probs, sampler_log_probs: `(B, T)`, of the policy that learns, before its updates, and of the one that drew.
        low: None: 0 of truncated, 1 / limit of masked.
    """
    log_ratio = torch.where(mask.bool(), log_probs.float() - sampler_log_probs.float(), 0.0)
    if of == "sequences":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    weights = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if kind == "truncated":
        return weights.clamp(low or 0.0, limit) * mask
    return weights * (weights <= limit) * (weights >= (1 / limit if low is None else low)) * mask


def _standardised(x: Tensor, counts: Tensor | None, correction: int, eps: float) -> Tensor:
    weights = torch.ones_like(x) if counts is None else counts.to(x.dtype)
    total = weights.sum()
    centred = x - (weights * x).sum() / total.clamp_min(1)
    variance = (weights * centred.square()).sum() / (total - correction).clamp_min(1)
    return centred / (variance.sqrt() + eps)
