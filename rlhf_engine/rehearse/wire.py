"""A rehearsed rank's line to the others, through the exchange.

A call costs its post at the exchange. Integers and host tensors have values, which really travel; floats of a device
do not. A rank that is not rehearsed sends what its twin sends: the rehearsed rank of its pipeline stage, or, where
there is none, the receiver itself.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from .device import FakeGPU
from .exchange import Post
from .ledger import Refused, place


class Wire:
    """This rank's line to the others.

    Args:
        present: the ranks that are rehearsed.
        stage_of: the pipeline stage of any rank.
    """

    def __init__(
        self, gpu: FakeGPU, rank: int, present: Sequence[int], stage_of: Callable[[int], int], connection: Connection
    ):
        self.gpu, self.rank, self.present, self.connection = gpu, rank, set(present), connection
        self.stage_of = stage_of
        self.assumed: list = []  # what a rank says whose stage is not rehearsed
        twins = {stage_of(other): other for other in reversed(sorted(present))}
        twins[stage_of(rank)] = rank
        self.twin = lambda other: other if other in self.present else twins.get(stage_of(other), rank)
        self.is_known = lambda other: stage_of(other) in twins
        self._groups: Counter[tuple] = Counter()
        self._numbers: Counter[tuple] = Counter()

    def channel(self, ranks: Sequence[int], kind: str, label: str) -> tuple[tuple[int, ...], tuple[str, int, int]]:
        """What the group is at the exchange: groups that are alike for rehearsed ranks are one."""
        members = tuple(sorted({self.twin(other) for other in ranks} | {self.rank}))
        name = label if kind == "nccl" else f"{label} ({kind})"
        key = (members, name, len(ranks))
        self._groups[key] += 1
        return members, (name, len(ranks), self._groups[key])

    def post(self, channel: tuple, what: str, values: Any, waits: bool) -> dict[int, Any]:
        """Posts a call; what each rank posted, where it waits."""
        if channel[0] == (self.rank,):
            return {self.rank: values}
        self._numbers[channel] += 1
        try:
            self.connection.send(
                Post(channel, self._numbers[channel], what, place(), pickle.dumps(packed(values)), waits)
            )
            found = self.connection.recv() if waits else {}
        except (EOFError, OSError):
            found = None
        if found is None:
            raise Unanswered(f"rank {self.rank}: {what} at {place()} has no answer")
        return {rank: unpacked(pickle.loads(value)) for rank, value in found.items()}


class Unanswered(Refused):
    """Said by a rank that waits for one which has ended."""


def packed(value: Any) -> Any:
    """Tensors as types, sizes and bytes, which cost less than torch's own way."""
    if isinstance(value, Tensor):
        return _Packed(value.dtype, tuple(value.shape), bytes(value.contiguous().view(-1).view(torch.uint8).numpy()))
    return type(value)(map(packed, value)) if isinstance(value, list | tuple) else value


def unpacked(value: Any) -> Any:
    """The inverse of `packed`."""
    if isinstance(value, _Packed):
        flat = (
            torch.frombuffer(bytearray(value.data), dtype=value.dtype)
            if value.data
            else torch.empty(0, dtype=value.dtype)
        )
        return flat.view(value.shape)
    return type(value)(map(unpacked, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class _Packed:
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes
