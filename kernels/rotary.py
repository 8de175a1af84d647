"""Rotary positions, and what else becomes of queries and keys between their projection and attention."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .dispatch import use_triton
from .reference import HeadNorms


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        from . import rotary_triton

        ctx.save_for_backward(cos, sin)
        return rotary_triton.rotate(x, cos, sin, forward=True)

    @staticmethod
    def backward(ctx, *grads):
        from . import rotary_triton

        cos, sin = ctx.saved_tensors
        return rotary_triton.rotate(grads[0], cos, sin, forward=False), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads turned by their positions: with halves a and b of a head, a cos - b sin and b cos + a sin (Su et al. 2021,
    arXiv:2104.09864, eq. 34, in the order of halves that HF's models have).

    Each product is rounded and so is their sum, forward and backward.

    Args:
        x: `(S, B, N, D)`, with any strides but that of D, which is 1.
        cos, sin: `(S, 1, 1, D)` of each position, both halves alike, contiguous and in `x`'s type.

    Returns:
        `(S, B, N, D)`, contiguous; differentiable.
    """
    if not use_triton(x) or not cos.is_contiguous():
        return reference.rotate(x, cos, sin)
    from . import rotary_triton

    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotate.apply(x, cos, sin)
    return rotary_triton.rotate(x, cos, sin, forward=True)


def attention_heads(
    qkv: Tensor,
    bias: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
    norms: HeadNorms | None,
    cache: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Queries and keys of new positions normalised per head and turned, in one launch; with a cache the keys and values
    are written there. Rounded as a bias that is added, `rms_norm` and `rotate` are.

    Args:
        qkv: `(T, G, n + 2, D)`, contiguous: of each group its n queries, its key and its value. Not needed afterwards.
        bias: `(G (n + 2) D,)`, added before.
        rotary: cosines and signed sines of each token, `(T, 1, n + 2, D)`, which leave values as they are.
        cache: `(2, P, G, S, D)` of a layer.
        places: `(T G 2,)`, where key and value of each go, in positions of the cache.

    Returns:
        `(T, G, n, D)`, the queries; without a cache all of `(T, G, n + 2, D)`. No gradient.
    """
    if not use_triton(qkv):
        return reference.attention_heads(qkv, bias, rotary, norms, cache, places)
    from . import rotary_triton

    return rotary_triton.attention_heads(qkv, bias, rotary, norms, cache, places)
