"""Keys and values of the sequences that are being generated, in lanes.

The cache is one tensor for all layers, allocated once and cut into regions of equal size. A lane fills a region with
sequences of like length that stand side by side: attention reads a lane as one dense block, as far as its longest
sequence goes, so nothing is padded to the longest of all. Its rows are as long as its own sequences may become, so a
region takes more of the short ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

_WINDOW = 16  # lanes are read up to a multiple of it, so shapes and views stay as they are for so many steps


def round_up(length: int) -> int:
    """The least multiple of `unit` that is no less than `n`."""
    return -(-length // _WINDOW) * _WINDOW


@dataclass
class Row:
    """A sequence in a lane: its sample, how many of its tokens are cached, its place in the batch."""

    sample: int
    length: int
    place: int


@dataclass
class Lane:
    """Rows of a region, without gaps.

    Args:
        offset: of its first position in the flat cache.
        store: `(layers, R, G, capacity, 2 D)`, a view of the cache; each position holds key and value.
    """

    region: int
    offset: int
    store: Tensor
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.size, self.groups, self.capacity = self.store.shape[1:4]
        self.longest = 0  # length of the longest row
        self._views: tuple[tuple[int, int], list[tuple[Tensor, Tensor]]] = ((0, 0), [])

    @property
    def window(self) -> int:
        """How far a decode step reads, the token that it adds included."""
        return min(self.capacity, round_up(self.longest + 1))

    def views(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, `(rows, G, window, D)` both."""
        shape = (len(self.rows), self.window)
        if self._views[0] != shape:
            parts = self.store[:, : shape[0], :, : shape[1]].chunk(2, -1)
            self._views = (shape, list(zip(*(part.unbind(0) for part in parts), strict=True)))
        return self._views[1]

    def start(self, i: int) -> int:
        """Where in the flat cache row i begins, its first group; the others are `capacity` apart."""
        return self.offset + i * self.groups * self.capacity

    def add(self, rows: Sequence[Row]) -> None:
        """Rows whose keys and values are in place, behind the others."""
        self.rows += rows
        self.longest = max(row.length for row in self.rows)

    def advance(self) -> None:
        """Every row has one more token."""
        self.longest += 1
        for row in self.rows:
            row.length += 1

    def remove(self, i: int) -> None:
        """Ends a row; the last takes its place."""
        row, last = self.rows[i], self.rows.pop()
        if i < len(self.rows):
            self._copy(self, len(self.rows), last, i)
            self.rows[i] = last
        if row.length == self.longest:
            self.longest = max((row.length for row in self.rows), default=0)

    def take(self, other: Lane, i: int) -> None:
        """Adds a row of another lane, which keeps its copy."""
        self._copy(other, i, other.rows[i], len(self.rows))
        self.add([other.rows[i]])

    def _copy(self, source: Lane, i: int, row: Row, target: int) -> None:
        self.store[:, target, :, : row.length] = source.store[:, i, :, : row.length]


class KVCache:
    """
    Args:
        num_regions: lanes that there can be at once.
        region_tokens: positions of each, over all of its rows.
    """

    def __init__(
        self, num_layers: int, groups: int, head_dim: int, num_regions: int, region_tokens: int, dtype, device
    ):
        self.groups, self.region_tokens = groups, region_tokens
        self.spare = num_regions * region_tokens * groups  # a position of no lane, for each group
        shape = (num_layers, self.spare + groups, 2 * head_dim)
        # Zeros, because what a mask hides is still multiplied by 0 and must be a number. numpy's come from the system,
        # which gives each page its memory when it is first written: rows take what they fill, not what is reserved.
        if device.type == "cpu":
            self.flat = torch.from_numpy(np.zeros(shape, np.float32)).to(dtype)
        else:
            self.flat = torch.zeros(shape, dtype=dtype, device=device)
        self.free = list(reversed(range(num_regions)))

    def open(self, capacity: int, max_rows: int) -> Lane:
        """A lane in a free region, of rows of `capacity` positions or, where that costs none of them, of more."""
        rows = min(max_rows, self.region_tokens // capacity)
        capacity = self.region_tokens // rows
        region = self.free.pop()
        offset = region * self.region_tokens * self.groups
        used = self.flat[:, offset : offset + rows * self.groups * capacity]
        return Lane(region, offset, used.unflatten(1, (rows, self.groups, capacity)))

    def close(self, lane: Lane) -> None:
        """Frees its memory."""
        self.free.append(lane.region)
