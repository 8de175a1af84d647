"""How many blocks of the cache rows will come to hold, by which more of them are admitted."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .cache import BLOCK


def expected_blocks(blocks: NDArray, more: NDArray, left: NDArray, ends: float, horizon: int) -> NDArray[np.float64]:
    """Blocks that rows hold now and after each `BLOCK` tokens more, `(B, horizon + 1)`, in expectation.

    Rows that run on grow together, and others end meanwhile: what matters is the fullest moment, not the sum of what
    each comes to need (Gong et al. 2025, arXiv:2507.10150).

    Args:
        blocks: `(B,)`, what each row holds.
        more: `(B,)`, what comes to it at most.
        left: `(B,)`, tokens that it may still get.
        ends: the share of tokens so far that ended a response.
    """
    later = np.arange(horizon + 1)
    runs = (later - 1) * BLOCK < left[:, None]
    holds = blocks[:, None] + np.minimum(later, more[:, None])
    return runs * holds * (1 - ends) ** (later * BLOCK)
