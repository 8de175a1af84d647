"""Decode steps as CUDA graphs: the launches of a step, some hundreds, become one.

A step that reads its rows one by one has shapes that depend on the number of rows alone, so there is one graph for each
of a few sizes, captured when a rollout has come to need it, and a batch is filled up to the next size with rows that
read and write a spare place of the cache. Graphs live as long as their rollout: the cache goes with it, and a role that
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
    """

    def __init__(self, decoder: Decoder, cache: KVCache, most: int):
        self.decoder, self.cache = decoder, cache
        doubles = [2**i for i in range(most.bit_length())]
        # between a power of two and the next one more, so that at most a third of the rows is filling
        self.sizes = sorted({min(most, size) for n in doubles for size in (n, 3 * n // 2)} | {most})
        # tokens, positions, starts and strides of all rows, of which a graph reads the first ones
        self.inputs = torch.zeros(4, most, dtype=torch.int64, device=cache.flat.device)
        self.spare = torch.tensor([[0], [0], [cache.spare], [1]], device=cache.flat.device)
        self.graphs: dict[int, tuple[Callable[[], None], Tensor]] = {}
        self.steps: Counter[int] = Counter()
        self.pool: Pool = None

    def __call__(self, tokens: Tensor, positions: Tensor, starts: Tensor, strides: Tensor) -> Tensor:
        """As `Decoder.decode`; the logits hold until the next call."""
        count = len(tokens)
        size = next(size for size in self.sizes if size >= count)
        if size not in self.graphs:
            self.steps[size] += 1
            if self.steps[size] <= _EAGER_STEPS:
                return self.decoder.decode(tokens, positions, starts, strides, self.cache)
            self.inputs[:, :size] = self.spare  # it runs once before it is captured
            rows = self.inputs[:, :size]
            step = functools.partial(self.decoder.decode, rows[0], rows[1], rows[2], rows[3], self.cache)
            replay, logits, self.pool = capture(step, self.pool)
            self.graphs[size] = replay, logits
        self.inputs[:, :count] = torch.stack([tokens, positions, starts, strides])
        self.inputs[:, count:size] = self.spare
        replay, logits = self.graphs[size]
        replay()
        return logits[:count]
