"""Megatron's pipeline schedules, played through: how long they take, and how much of that a rank idles."""

from __future__ import annotations

from collections.abc import Sequence

Orders = list[list[tuple[str, int]]]  # of each stage: ("forward" | "backward", micro-batch)


def orders(stages: int, micro_batches: int, has_backward: bool) -> Orders:
    """What each stage does, in its order: all forwards, or one forward and one backward in turn (1F1B)."""
    found: Orders = []
    for stage in range(stages):
        warmup = in_flight(stages, stage, micro_batches) - 1 if has_backward else micro_batches
        order = [("forward", i) for i in range(warmup)]
        if has_backward:
            for i in range(micro_batches - warmup):
                order += [("forward", warmup + i), ("backward", i)]
            order += [("backward", i) for i in range(micro_batches - warmup, micro_batches)]
        found.append(order)
    return found


def in_flight(stages: int, stage: int, micro_batches: int) -> int:
    """Micro-batches whose activations a stage holds at once under 1F1B."""
    return min(stages - stage, micro_batches)


def simulate(
    forward: Sequence[Sequence[float]], backward: Sequence[Sequence[float]] | None = None, transfer: float = 0.0
) -> tuple[float, float]:
    """Seconds from the first action to the last, and the share of all ranks' time that is idle.

    Args:
        forward, backward: seconds of each micro-batch, on each stage; without backward a forward-only pipeline.
        transfer: seconds between two stages.
    """
    stages, todo = len(forward[0]), orders(len(forward[0]), len(forward), backward is not None)
    if stages == 1:
        return sum(map(sum, forward)) + sum(map(sum, backward or ())), 0.0
    done: dict[tuple[str, int, int], float] = {}
    clocks, places, busy = [0.0] * stages, [0] * stages, 0.0
    left = sum(map(len, todo))
    while left:
        for stage, order in enumerate(todo):
            while places[stage] < len(order):
                kind, i = order[places[stage]]
                before = stage - 1 if kind == "forward" else stage + 1
                ready = 0.0
                if 0 <= before < stages:
                    if (kind, i, before) not in done:
                        break
                    ready = done[kind, i, before] + transfer
                assert kind == "forward" or backward is not None
                seconds = forward[i][stage] if kind == "forward" else backward[i][stage]  # type: ignore[index]
                clocks[stage] = done[kind, i, stage] = max(clocks[stage], ready) + seconds
                busy += seconds
                places[stage] += 1
                left -= 1
    return max(clocks), 1 - busy / (stages * max(clocks))
