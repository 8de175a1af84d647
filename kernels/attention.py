"""Attention of one query position over keys and values that lie in a cache, each sequence as far as it goes."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .dispatch import use_triton


def cached_attention(q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, window: int | None = None) -> Tensor:
    """softmax(q K^T / sqrt(D)) V for the newest position of each sequence (Vaswani et al. 2017, eq. 1).

    Sequences of any lengths cost what they hold: nothing is padded, and shapes do not depend on how far a sequence
    is, so a decode step of B rows is the same program at every step. In Triton a program reads a sequence's keys and
    values of one group once for all of its query heads.

    Args:
        q: `(B, G, n, D)`: G key-value heads with n query heads each.
        cache: `(2, P, G, S, D)` of a layer, keys and values in blocks of S positions, contiguous.
        table: `(B, C)` int64, which blocks hold each sequence; behind its last one stands the number of any block.
        lengths: `(B,)` int64, positions that each sequence has, the newest included; at least 1.
        window: of sliding attention: so many of the last positions are seen; None sees all.

    Returns:
        `(B, G, n, D)`, in `q`'s type; softmax and sums in float32.
    """
    if not use_triton(q):
        return reference.cached_attention(q, cache, table, lengths, window)
    from . import attention_triton

    return attention_triton.cached_attention(q, cache, table, lengths, window)
