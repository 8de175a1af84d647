"""Losses of preference optimisation (arXiv numbers at each), in plain torch: there is one number for each answer.

That number, `chosen` and `rejected` below, is the answer's log-prob less the reference's, or for the losses without a
reference, simpo and orpo, its log-prob alone; a sum over its tokens, or a mean of them, as its caller has it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def preference_loss(
    kind: str, chosen: Tensor, rejected: Tensor, *, beta: float, margin: float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """Loss of each pair, `(P,)` from `(P,)` each, h = chosen - rejected:

    - dpo (2305.18290, eq. 7): -log sigmoid(beta h)
    - cdpo (Mitchell 2023, "A note on DPO with noisy preferences"): a share of the labels is taken to be wrong,
      -(1 - label_smoothing) log sigmoid(beta h) - label_smoothing log sigmoid(-beta h)
    - ipo (2310.12036, eq. 17): (h - 1 / (2 beta))^2
    - simpo (2405.14734, eq. 6): -log sigmoid(beta h - margin)
    - orpo (2403.07691, eqs. 6 and 7): -chosen - beta log sigmoid(log odds(chosen) - log odds(rejected))

    Raises:
        ValueError: there is no such loss.
    """
    h = chosen - rejected
    if kind == "dpo":
        return -F.logsigmoid(beta * h)
    if kind == "cdpo":
        return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    if kind == "ipo":
        return (h - 1 / (2 * beta)).square()
    if kind == "simpo":
        return -F.logsigmoid(beta * h - margin)
    if kind == "orpo":
        return -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    raise ValueError(f"{kind!r} is no preference loss")


def _log_odds(log_prob: Tensor) -> Tensor:
    """log(p / (1 - p)) (2403.07691, eq. 4); of a probability of 1, of the largest below it."""
    log_prob = log_prob.clamp_max(-torch.finfo(log_prob.dtype).eps)
    return log_prob - torch.log(-torch.expm1(log_prob))


def kto_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO's loss of each answer (2402.01306, eq. 7), w - v: w (1 - sigmoid(beta (r - kl))) of a desirable one,
    and of the others w (1 - sigmoid(beta (kl - r))). No gradient flows to `kl`.

    Args:
        log_ratios: r `(B,)`, log-prob less the reference's.
        desirable: `(B,)` bool.
        kl: the reference point z_0, not below 0.
        desirable_weight, undesirable_weight: w, the paper's lambda.
    """
    gain = beta * (log_ratios - kl)
    return torch.where(desirable, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain))
