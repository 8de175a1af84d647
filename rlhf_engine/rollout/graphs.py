"""Steps as CUDA graphs: the launches of a step, some hundreds, become one.

A step that reads its rows one by one has shapes that depend on the number of rows alone, so there is one graph for each
of a few sizes, captured when a rollout has come to need it. Graphs live as long as their rollout: the cache goes with
it, and a role that leaves the device comes back elsewhere.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_EAGER_STEPS = 4  # of a size before it is captured, which costs more than so many steps save
Pool = Any  # memory that graphs share, in torch's words


def sizes(most: int) -> list[int]:
    """The numbers of rows, at most so many, that there are graphs for.

    Between a power of two and the next is one more, so that at most a third of the rows is filling; fewer rows than the
    first take no less time, as a step reads all weights, and every size costs a capture in each rollout.
    """
    doubles = [2**i for i in range(3, most.bit_length())]
    return sorted({min(most, size) for n in doubles for size in (n, 3 * n // 2)} | {most})


def capture(step: Callable[[], Tensor], pool: Pool) -> tuple[Callable[[], Tensor], Pool]:
    """A function that repeats the device's work of `step` on the same memory, where its result is each time, and the
    memory that it works in, which graphs that run one after the other may share."""
    graph = torch.cuda.CUDAGraph()
    # other threads, such as one that writes a checkpoint, may call CUDA meanwhile
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay, graph.pool()


class StepGraphs:
    """`step`, replayed.

    Args:
        step: takes rows, which lie where they lay when it was called for as many before.
    """

    def __init__(self, step: Callable[[Tensor], Tensor]):
        self.step = step
        self.graphs: dict[int, Callable[[], Tensor]] = {}
        self.steps: Counter[int] = Counter()
        self.pool: Pool = None

    def __call__(self, rows: Tensor) -> Tensor:
        """As `step`; the result holds until the next call."""
        size = len(rows)
        if size not in self.graphs:
            self.steps[size] += 1
            if self.steps[size] <= _EAGER_STEPS:  # in which libraries and collectives prepare themselves
                return self.step(rows)
            self.graphs[size], self.pool = capture(functools.partial(self.step, rows), self.pool)
        return self.graphs[size]()
