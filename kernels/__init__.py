"""The engine's numerical operations, for CPU and CUDA tensors. Depends on torch, and on triton where it is installed.

On CUDA the operations run in Triton, elsewhere in plain torch (`reference.py`); `RLHF_KERNELS=reference` or `triton`
forces one.
"""

from .advantage import kl_advantages
from .attention import cached_attention
from .divergence import linear_kl
from .groups import group_advantages, importance_weights
from .linear_log_prob import linear_log_probs, wide_addmm_, wide_mm
from .log_prob import check_tokens, token_log_probs
from .losses import clipped_policy_loss, clipped_value_loss
from .norm import rms_norm
from .preference import kto_loss, preference_loss
from .reference import Advantages, HeadNorms, PolicyLoss, ValueLoss, corrected, kl_estimate, pairwise_loss, whiten
from .rotary import attention_heads, rotate
from .swiglu import swiglu

__all__ = [
    "Advantages",
    "HeadNorms",
    "PolicyLoss",
    "ValueLoss",
    "attention_heads",
    "cached_attention",
    "check_tokens",
    "clipped_policy_loss",
    "clipped_value_loss",
    "corrected",
    "group_advantages",
    "importance_weights",
    "kl_advantages",
    "kl_estimate",
    "kto_loss",
    "linear_kl",
    "linear_log_probs",
    "pairwise_loss",
    "preference_loss",
    "rms_norm",
    "rotate",
    "swiglu",
    "token_log_probs",
    "whiten",
    "wide_addmm_",
    "wide_mm",
]
