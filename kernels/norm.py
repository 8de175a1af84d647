"""Root-mean-square norm, and what is added to a residual stream before it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .dispatch import use_triton


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        from . import norm_triton

        out, factors = norm_triton.forward(x, weight, eps, saves=True)
        ctx.save_for_backward(x, weight, factors)
        return out

    @staticmethod
    def backward(ctx, *grads):
        from . import norm_triton

        return *norm_triton.backward(*ctx.saved_tensors, *grads), None


def rms_norm(x: Tensor, weight: Tensor, eps: float, add: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4).

    Computed in float32 and rounded once. The sampler and the trainer call it with and without `add`, and it is the same
    arithmetic in the same order.

    Args:
        x: `(..., H)`.
        weight: `(H,)`, of the same type.
        add: `(..., H)`, added to `x` in place and rounded, before; then there is no gradient.

    Returns:
        `(..., H)`, in `x`'s type; differentiable.
    """
    if not use_triton(x) or x.dtype is not weight.dtype:
        return reference.rms_norm(x, weight, eps, add)
    from . import norm_triton

    if add is None and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)
    return norm_triton.forward(x, weight, eps, add)[0]
