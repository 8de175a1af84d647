"""Decode steps as CUDA graphs: the launches of a step, some hundreds, become one.

A step that reads its rows one by one has shapes that depend on the number of rows alone, so there is one graph for each
of a few sizes, captured when a rollout has come to need it, and a batch is filled up to the next size with rows that
read and write a spare block of the cache. Graphs live as long as their rollout: the cache goes with it, and a role that
leaves the device comes back elsewhere.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cache import KVCache
from .decoder import Decoder

_EAGER_STEPS = 4  # of a size before it is captured, which costs more than so many steps save
Pool = Any  # memory that graphs share, in torch's words


def capture(step: Callable[[], Tensor], pool: Pool) -> tuple[Callable[[], None], Tensor, Pool]:
    """A function that repeats the device's work of `step` on the same memory, where its result is each time, and the
    memory that it works in, which graphs that run one after the other may share."""
    step()  # libraries and collectives prepare themselves outside the capture
    graph = torch.cuda.CUDAGraph()
    # other threads, such as one that writes a checkpoint, may call CUDA meanwhile
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = step()
    return graph.replay, result, graph.pool()


class DecodeGraphs:
    """`Decoder.decode` by rows, replayed.

    Args:
        most: rows that there can be at once.
        columns: of their table.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, most: int, columns: int):
        self.decoder, self.cache = decoder, cache
        # between a power of two and the next one more, so that at most a third of the rows is filling; fewer rows than
        # the first take no less time, as a step reads all weights, and every size costs a capture in each rollout
        doubles = [2**i for i in range(3, most.bit_length())]
        self.sizes = sorted({min(most, size) for n in doubles for size in (n, 3 * n // 2)} | {most})
        # token, position and blocks of all rows, of which a graph reads the first ones; a row of nothing is of zeros
        self.inputs = torch.zeros(most, 2 + columns, dtype=torch.int64, device=cache.store.device)
        self.graphs: dict[int, tuple[Callable[[], None], Tensor]] = {}
        self.steps: Counter[int] = Counter()
        self.pool: Pool = None

    def __call__(self, tokens: Tensor, positions: Tensor, table: Tensor) -> Tensor:
        """As `Decoder.decode`; the logits hold until the next call."""
        count = len(tokens)
        size = next(size for size in self.sizes if size >= count)
        if size not in self.graphs:
            self.steps[size] += 1
            if self.steps[size] <= _EAGER_STEPS:
                return self.decoder.decode(tokens, positions, table, self.cache)
            rows = self.inputs[:size].zero_()  # it runs once before it is captured
            step = functools.partial(self.decoder.decode, rows[:, 0], rows[:, 1], rows[:, 2:], self.cache)
            replay, logits, self.pool = capture(step, self.pool)
            self.graphs[size] = replay, logits
        torch.cat([tokens.unsqueeze(1), positions.unsqueeze(1), table], 1, out=self.inputs[:count])
        self.inputs[count:size] = 0
        replay, logits = self.graphs[size]
        replay()
        return logits[:count]
