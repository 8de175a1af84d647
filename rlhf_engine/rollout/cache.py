"""Keys and values of the sequences that are being generated, in blocks that a sequence gets as it grows.

The cache is one tensor for all layers, cut into blocks of `BLOCK` positions. A table names the blocks of each sequence
(Kwon et al. 2023, arXiv:2309.06180): it gets one more when it comes to need it and gives them back when it ends, and
samples of one prompt name the same blocks for what the prompt fills. Block 0 is nobody's: unused places of the table
name it, and rows that fill up a CUDA graph read and write it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 32  # half of it is empty at the end of a sequence; smaller ones cost a CPU more products

Ints = NDArray[np.int64]


def num_blocks(length):
    """Blocks that so many positions fill; of a number or an array."""
    return -(-length // BLOCK)


def on_device(device: torch.device, *arrays: Ints) -> list[Tensor]:
    """Copies of host arrays; the host does not wait for them."""
    return [pinned(array, device).to(device, non_blocking=True) for array in arrays]


def pinned(array: Ints, device: torch.device) -> Tensor:
    """A copy on the host, from where a GPU fetches it while the host goes on."""
    return torch.tensor(array, pin_memory=device.type == "cuda")


class KVCache:
    """
    Attributes:
        store: `(layers, 2, 1 + num_blocks, G, BLOCK, D)`, keys and values.
        readers: `(1 + num_blocks,)`, how many sequences name each block.
    """

    def __init__(self, num_layers: int, groups: int, head_dim: int, num_blocks: int, dtype, device):
        shape = (num_layers, 2, 1 + num_blocks, groups, BLOCK, head_dim)
        # Zeros, because what a mask hides is still multiplied by 0 and must be a number. numpy's come from the system,
        # which gives each page its memory when it is first written: rows take what they fill, not what is reserved.
        if device.type == "cpu":
            self.store = torch.from_numpy(np.zeros(shape, np.float32)).to(dtype)
        else:
            self.store = torch.zeros(shape, dtype=dtype, device=device)
        self.groups = torch.arange(groups, device=device)
        self.readers = np.zeros(1 + num_blocks, np.int64)
        self.readers[0] = 1

    @property
    def num_blocks(self) -> int:
        """Those that sequences can have."""
        return len(self.readers) - 1

    @property
    def num_free(self) -> int:
        """Blocks that no sequence has."""
        return int((self.readers == 0).sum())

    def take(self, count: int) -> Ints:
        """Free blocks for one reader, the first ones, so that those in use stay close together."""
        found = np.flatnonzero(self.readers == 0)[:count]
        self.readers[found] = 1
        return found

    def places(self, blocks: Tensor, offsets: Tensor) -> Tensor:
        """Where `write` puts positions `(P,)` of these blocks: key and value of each of their groups, `(P G 2,)`."""
        _, _, count, groups, size, _ = self.store.shape
        first = (blocks.unsqueeze(1) * groups + self.groups) * size + offsets.unsqueeze(1)
        return torch.stack([first, first + count * groups * size], 2).flatten()

    def write(self, layer: int, places: Tensor, both: Tensor) -> None:
        """Keys and values `(P, G, 2, D)` of new positions."""
        dim = both.shape[3]
        self.store[layer].view(-1, dim).index_copy_(0, places, both.reshape(-1, dim))

    def close_up(self, first: Ints, *tables: Ints) -> None:
        """Moves blocks to the front, in place of others that are free or not among them, and changes the tables."""
        last, front = first[first > len(first)], np.arange(1, len(first) + 1)
        others = front[~np.isin(front, first)]
        kept = np.flatnonzero(self.readers[others])  # the rest has nothing to keep
        kept_store = self.store[:, :, others[kept]].clone()
        self.store[:, :, others] = self.store[:, :, last]
        self.store[:, :, last[kept]] = kept_store
        moved = np.arange(len(self.readers))
        moved[last], moved[others] = others, last
        self.readers[:] = self.readers[moved]
        for table in tables:
            table[:] = moved[table]


class Rows:
    """The sequences in the cache, in the order in which they came.

    Attributes:
        samples: `(B,)`, their numbers.
        lengths: `(B,)`, positions that each has in the cache.
        table: `(B, columns)`, its blocks.
    """

    def __init__(self, cache: KVCache, columns: int):
        self.cache, self.columns = cache, columns
        self.samples, self.lengths = np.zeros((2, 0), np.int64)
        self.table = np.zeros((0, columns), np.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def add(self, sample: int, length: int, shared: Ints) -> None:
        """A row whose first blocks others have too."""
        line = np.zeros((1, self.columns), np.int64)
        line[0, : len(shared)] = shared
        self.cache.readers[shared] += 1
        self.samples, self.lengths = np.append(self.samples, sample), np.append(self.lengths, length)
        self.table = np.concatenate([self.table, line])
        missing = np.zeros(len(self), np.int64)
        missing[-1] = num_blocks(length) - len(shared)
        self.extend(missing)

    def extend(self, missing: Ints) -> None:
        """So many more blocks `(B,)` for the rows."""
        rows = np.repeat(np.arange(len(self)), missing)
        nth = np.arange(len(rows)) - np.repeat(missing.cumsum() - missing, missing)
        self.table[rows, self.counts[rows] + nth] = self.cache.take(len(rows))

    @property
    def counts(self) -> Ints:
        """Blocks of each row."""
        return np.count_nonzero(self.table, 1)

    @property
    def shares(self) -> NDArray[np.float64]:
        """Blocks of each row, those with several readers counted in parts."""
        return np.where(self.table > 0, 1 / self.cache.readers.clip(1)[self.table], 0).sum(1)

    def remove(self, places: Sequence[int] | Ints) -> None:
        """Rows that end or step back; their blocks are free where nobody else reads them."""
        gone = self.table[list(places)]
        np.subtract.at(self.cache.readers, gone[gone > 0], 1)
        self._leave(places)

    def move(self, places: Sequence[int] | Ints, to: Rows) -> None:
        """Rows to the end of others, with their blocks."""
        for name in ("samples", "lengths", "table"):
            setattr(to, name, np.concatenate([getattr(to, name), getattr(self, name)[list(places)]]))
        self._leave(places)

    def _leave(self, places: Sequence[int] | Ints) -> None:
        self.samples, self.lengths, self.table = (
            np.delete(part, list(places), 0) for part in (self.samples, self.lengths, self.table)
        )
