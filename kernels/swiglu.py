"""The gate of a feed-forward layer and its activation."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .dispatch import use_triton


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        from . import swiglu_triton

        ctx.save_for_backward(x)
        return swiglu_triton.forward(x)

    @staticmethod
    def backward(ctx, *grads):
        from . import swiglu_triton

        return swiglu_triton.backward(*ctx.saved_tensors, *grads)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202, eq. 6, without its products).

    Rounded as two operations of torch are, forward and backward: the activation, then the product. Of its input alone
    it keeps anything for backward.

    Args:
        x: `(..., 2 F)`, gate and up side by side.

    Returns:
        `(..., F)`, in `x`'s type; differentiable.
    """
    if not use_triton(x):
        return reference.swiglu(x)
    from . import swiglu_triton

    if torch.is_grad_enabled() and x.requires_grad:
        return _SwiGLU.apply(x)
    return swiglu_triton.forward(x)
