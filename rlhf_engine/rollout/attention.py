"""Attention over the cache's blocks as suits a CPU: one product over all blocks in use, whosever they are.

A block's keys and values are read where they lie, once; only queries, scores and outputs, which are small beside them,
are put in the blocks' order and back into the rows'. Blocks that several rows read come once more behind the others,
with the queries of all of their readers side by side.

A row's result is the same to the bit whoever is decoded with it: a product of `LEAST` rows or more rounds each of them
alike, and one of fewer, for which BLAS has other kernels, does not, so there are never fewer.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import BLOCK, Ints

LEAST = 4  # and with threads, which share rows out, a multiple of it


class BlockReading:
    """Who reads what, until the table changes.

    A piece is a block as one row reads it: of the first `count` pieces each is the block of its number as its only
    reader sees it (or nobody, as of block 0), behind them are those of the shared blocks, `most` of each.

    Args:
        table: `(B, C)`, blocks of the rows; rows of nothing fill it up to a multiple of `LEAST`.
        groups, queries: G and n.
    """

    def __init__(self, table: Ints, groups: int, queries: int):
        table = np.pad(table, ((0, -len(table) % LEAST), (0, 0)))
        rows, columns = np.nonzero(table)
        blocks = table[rows, columns]
        self.count = int(blocks.max()) + 1
        readers = np.bincount(blocks, minlength=self.count)
        shared = np.flatnonzero(readers > 1)
        self.most = int(readers[shared].max(initial=0))
        pieces = table.copy()
        if len(shared):
            order = np.argsort(blocks, kind="stable")
            nth = np.empty_like(order)
            nth[order] = np.arange(len(order)) - (readers.cumsum() - readers)[blocks[order]]
            several = readers[blocks] > 1
            place = np.searchsorted(shared, blocks[several]) * self.most + nth[several]
            pieces[rows[several], columns[several]] = self.count + place
        readers_of = np.zeros((2, self.count + len(shared) * self.most), np.int64)
        readers_of[:, pieces[rows, columns]] = rows, columns
        self.shared, self.pieces = torch.from_numpy(shared), torch.from_numpy(pieces)
        mine, column = torch.from_numpy(readers_of).unsqueeze(2)  # (pieces, 1) both
        # in rows each group has n query heads, in pieces as many as a product needs, the last of them repeated
        heads, self.least = groups * queries, max(LEAST, queries)
        head, group = torch.arange(heads), torch.arange(groups).unsqueeze(1)
        in_piece = head + head // queries * (self.least - queries)
        in_row = (group * queries + torch.arange(self.least).clamp(max=queries - 1)).flatten()
        self.queries = (mine * heads + in_row).flatten()
        self.by_piece = ((mine * heads + in_row) * table.shape[1] + column).flatten()
        self.by_row = (self.pieces.unsqueeze(1) * groups * self.least + in_piece.unsqueeze(1)).flatten()

    def mask(self, positions: Tensor, window: int | None) -> Tensor:
        """Added to scores: 0 where each row, whose newest position is given `(B,)`, sees, `(B, 1, C BLOCK)`."""
        t, newest = torch.arange(self.pieces.shape[1] * BLOCK), positions.unsqueeze(1)
        hidden = t > newest
        if window is not None:
            hidden |= t <= newest - window
        return torch.where(hidden, -torch.inf, 0.0).unsqueeze(1)

    def __call__(self, q: Tensor, store: Tensor, mask: Tensor) -> Tensor:
        """softmax(q K^T / sqrt(D)) V of `(B, G, n, D)`, the newest position of each row; store: of the layer."""
        batch, groups, queries, dim = q.shape
        keys, values = store.float() if q.dtype is not torch.float32 else store
        each = (-1, groups, self.least)
        mine = (q.float() * dim**-0.5).view(-1, dim).index_select(0, self.queries).view(*each, dim)
        scores = self._products(mine, keys.mT).view(-1, BLOCK).index_select(0, self.by_row)
        p = scores.view(batch, groups * queries, -1).add_(mask).softmax(-1)
        p = p.view(-1, BLOCK).index_select(0, self.by_piece).view(*each, BLOCK)
        outs = self._products(p, values)[:, :, :queries].flatten(1)
        # the sum over a row's pieces, without that of block 0
        return F.embedding_bag(self.pieces, outs, mode="sum", padding_idx=0).view(q.shape).to(q.dtype)

    def _products(self, x: Tensor, blocks: Tensor) -> Tensor:
        """Of pieces `(pieces, G, n, I)` with `(blocks, G, I, J)`."""
        own = x[: self.count].flatten(0, 1) @ blocks[: self.count].flatten(0, 1)
        own = own.unflatten(0, (self.count, -1))
        if not self.most:
            return own
        side_by_side = x[self.count :].unflatten(0, (-1, self.most)).transpose(1, 2).flatten(2, 3)
        found = (side_by_side @ blocks[self.shared]).unflatten(2, (self.most, -1)).transpose(1, 2).flatten(0, 1)
        return torch.cat([own, found])
