"""What a check finds, and what is still taken for rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# How many times what rounding was measured to do it may do elsewhere. Figures of many tokens or of whole tensors are as
# large as the measured ones: over seeds, models and meshes at most 1.6 times so.
MARGIN = 4.0

EPS = torch.finfo(torch.float32).eps


class Skipped(Exception):
    """A check that has nothing to look at, and why. Raised on every rank."""


@dataclass(frozen=True)
class Finding:
    """A figure that passes where it is at most `limit` on every rank."""

    figure: float
    limit: float
    detail: str = ""

    @property
    def excess(self) -> float:
        """The figure in units of its limit: infinite beyond one of 0, and where either is no number."""
        excess = self.figure / self.limit if self.limit else math.inf if self.figure else 0.0
        return math.inf if math.isnan(excess) else excess


def worst(findings: Iterable[Finding]) -> Finding:
    """The one nearest to its limit, or furthest beyond it."""
    return max(findings, key=lambda finding: finding.excess)


def rms(values: Tensor) -> float:
    """Root of the mean square: one number that is far off shows in it, and it does not hang on which one is largest."""
    return float(values.double().square().mean().sqrt()) if values.numel() else 0.0


def bound(measured: float, size: float) -> float:
    """What rounding may come to.

    Args:
        measured: what it does to a figure of the same kind.
        size: of the numbers that the figure is a difference of, which float32 sums cannot bring closer.
    """
    return MARGIN * (measured + EPS * size)
