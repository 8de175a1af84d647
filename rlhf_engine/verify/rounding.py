"""What rounding does to a whole model, measured: the same computation with every weight moved by its last bit.

A product of matrices rounds about as if its factors were off by that much, and from there on the model itself says how
an error grows: by depth, scale and saturation, forward and backward, in float32 and in bfloat16.
Source: Parker 1997, "Monte Carlo arithmetic", of which this is a sample over many weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..models.role import RoleModel

SAMPLES = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35)  # odd numbers that mix bits
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@contextlib.contextmanager
def moved(role: RoleModel, sample: int = SAMPLES[0]) -> Iterator[None]:
    """Within it the weights of a role that is on its device are off by a last bit each: of `SAMPLES` in one way."""
    weights = list(role.chunks.parameters())
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        bits = weight.detach().view(_BITS[weight.dtype])
        # up or down by a hash of the bits themselves, so that replicas and copies move alike on every mesh
        upwards = (bits.long() * sample >> 30) & 2
        bits += torch.where(weight.detach() == 0, 0, upwards - 1).to(bits.dtype)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
