"""Megatron's pipeline schedules, played through: how long they take, and how much of that a rank idles."""

from __future__ import annotations

from collections.abc import Sequence

Orders = list[list[tuple[str, int, int]]]  # of each stage: ("forward" | "backward", micro-batch, chunk)


def chunk_group(stages: int, micro_batches: int) -> int:
    """Micro-batches that a chunk takes before the stage turns to its next one, as few as megatron can: all groups must
    have as many as there are stages at least, or as there are micro-batches in all."""
    sizes = range(stages, micro_batches)
    return next((n for n in sizes if micro_batches % n == 0 or micro_batches % n >= stages), micro_batches)


def forward_order(stages: int, micro_batches: int, chunks: int = 1) -> list[tuple[int, int]]:
    """(micro-batch, chunk) of a stage's forwards; its backwards have the chunks in reverse.

    Of several chunks of layers a stage takes the first for a group of micro-batches, then the next for the same ones
    (Narayanan et al. 2021, section 2.2).
    """
    size = chunk_group(stages, micro_batches) if chunks > 1 else 1
    groups = [range(first, min(first + size, micro_batches)) for first in range(0, micro_batches, size)]
    return [(i, chunk) for group in groups for chunk in range(chunks) for i in group]


def orders(stages: int, micro_batches: int, has_backward: bool, chunks: int = 1) -> Orders:
    """What each stage does, in its order: all forwards, or one forward and one backward in turn (1F1B)."""
    forward = forward_order(stages, micro_batches, chunks)
    backward = [(i, chunks - 1 - chunk) for i, chunk in forward]
    found: Orders = []
    for stage in range(stages):
        warmup = ahead(stages, stage, micro_batches, chunks) - 1 if has_backward else len(forward)
        order = [("forward", *what) for what in forward[:warmup]]
        if has_backward:
            for onward, back in zip(forward[warmup:], backward, strict=False):
                order += [("forward", *onward), ("backward", *back)]
            order += [("backward", *back) for back in backward[len(forward) - warmup :]]
        found.append(order)
    return found


def ahead(stages: int, stage: int, micro_batches: int, chunks: int = 1) -> int:
    """Forwards of its chunks that a stage is ahead of its backwards under 1F1B: so many activations it holds."""
    if chunks == 1:
        return min(stages - stage, micro_batches)
    before = 2 * (stages - 1 - stage) + (chunks - 1) * chunk_group(stages, micro_batches)
    return min(before + 1, chunks * micro_batches)


def simulate(
    forward: Sequence[Sequence[float]], backward: Sequence[Sequence[float]] | None = None, transfer: float = 0.0,
    chunks: int = 1,
) -> tuple[float, float]:  # fmt: skip
    """Seconds from the first action to the last, and the share of all ranks' time that is idle.

    Args:
        forward, backward: seconds of each micro-batch, on each stage; without backward a forward-only pipeline.
        transfer: seconds between two stages.
        chunks: of each stage, which share its seconds evenly.
    """
    stages, todo = len(forward[0]), orders(len(forward[0]), len(forward), backward is not None, chunks)
    if stages == 1:
        return sum(map(sum, forward)) + sum(map(sum, backward or ())), 0.0
    done: dict[tuple[str, int, int], float] = {}  # by micro-batch and place in the depth: chunk x stages + stage
    clocks, places, busy = [0.0] * stages, [0] * stages, 0.0
    left = sum(map(len, todo))
    while left:
        for stage, order in enumerate(todo):
            while places[stage] < len(order):
                kind, i, chunk = order[places[stage]]
                here = chunk * stages + stage
                before = here - 1 if kind == "forward" else here + 1
                ready = 0.0
                if 0 <= before < stages * chunks:
                    if (kind, i, before) not in done:
                        break
                    ready = done[kind, i, before] + transfer
                times = forward if kind == "forward" or backward is None else backward
                seconds = times[i][stage] / chunks
                clocks[stage] = done[kind, i, here] = max(clocks[stage], ready) + seconds
                busy += seconds
                places[stage] += 1
                left -= 1
    return max(clocks), 1 - busy / (stages * max(clocks))
