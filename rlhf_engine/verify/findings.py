"""What a check finds, and what is still taken for rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch


class Skipped(Exception):
    """A check that has nothing to look at, and why. Raised on every rank."""


@dataclass(frozen=True)
class Finding:
    """A figure that passes where it is at most `limit` on every rank."""

    figure: float
    limit: float
    detail: str = ""


@dataclass(frozen=True)
class Tolerance:
    """What two ways to the same number may differ by.

    Args:
        log_prob: nats, of one token from the same hidden states.
        forward: nats, of one token from another implementation of the whole model.
        loss: share.
        gradient: share of a tensor's norm.
        slope: share, between a gradient and the loss's change along it.
        step: nats that the loss is changed by for that: far above its rounding, and still nearly linear.
        apart: share of the responses that may go another way where batches differ.
    """

    log_prob: float
    forward: float
    loss: float
    gradient: float
    slope: float
    step: float
    apart: float


# float32 sums of thousands of terms agree to about 1e-6 of their size, and errors grow by a factor of ten on the way
# through a model and back. bfloat16 rounds every activation to 3 digits (2^-9): logits of 10 are off by 0.02, gradients
# by some percent, and a sampled token falls on the other side of its limit now and then. The faults that are looked
# for (a factor, a shift, a bias, a mask) are far beyond either.
TOLERANCES = {
    torch.float32: Tolerance(log_prob=1e-4, forward=1e-3, loss=1e-4, gradient=1e-3, slope=0.02, step=1e-3, apart=0.0),
    torch.bfloat16: Tolerance(log_prob=0.1, forward=0.3, loss=0.03, gradient=0.1, slope=0.2, step=0.05, apart=0.5),
}


def relative(found: float, wanted: float) -> float:
    """Their distance as a share of what is wanted, which counts for at least 0.01."""
    return abs(found - wanted) / max(abs(wanted), 0.01)
