"""The engine's numerical operations. Depends on torch alone; every function accepts CPU and CUDA tensors."""

from .reference import (
    Advantages,
    PolicyLoss,
    ValueLoss,
    clipped_policy_loss,
    clipped_value_loss,
    kl_advantages,
    kl_estimate,
    last_token,
    pairwise_loss,
    token_log_probs,
    whiten,
)

__all__ = [
    "Advantages",
    "PolicyLoss",
    "ValueLoss",
    "clipped_policy_loss",
    "clipped_value_loss",
    "kl_advantages",
    "kl_estimate",
    "last_token",
    "pairwise_loss",
    "token_log_probs",
    "whiten",
]
