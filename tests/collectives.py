"""Counts the collectives of a run on CPUs, under the names that a rehearsal has for them."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import cases

NAMES = {
    "allreduce": "all_reduce", "broadcast": "broadcast", "barrier": "barrier", "gather": "gather",
    "scatter": "scatter", "allgather": "all_gather", "all_gather_single": "all_gather",
    "all_gather_single_coalesced": "all_gather", "reduce_scatter": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter", "reduce_scatter_single_coalesced": "reduce_scatter",
    "all_to_all_single": "all_to_all", "alltoall": "all_to_all", "send": "send", "recv": "recv",
    # torch's older names
    "_allgather_base": "all_gather", "allgather_into_tensor_coalesced": "all_gather",
    "_reduce_scatter_base": "reduce_scatter", "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "alltoall_base": "all_to_all",
}  # fmt: skip


def count(settings: Sequence[str], layout: tuple, phases: Sequence[str], folder: Path) -> dict[str, dict[str, int]]:
    """In a rank: runs the phases; how often it called what, by phase and stage."""
    from torch.distributed import ProcessGroup

    from rlhf_engine.algorithms import ALGORITHMS
    from rlhf_engine.rehearse.groups import LABELS
    from rlhf_engine.trainer import train

    found: dict[str, Counter[str]] = defaultdict(Counter)
    phase, stages = "", [""]

    def counted(name, function):
        def call(group, *args, **kwargs):
            if group.size() > 1 and stages[-1]:
                label = "world" if group.group_desc == "default_pg" else LABELS.get(group.group_desc, group.group_desc)
                found[f"{phase} {stages[-1]}"][f"{label} {name}"] += 1
            return function(group, *args, **kwargs)

        return call

    @contextlib.contextmanager
    def watch(name: str):
        stages.append(name)
        found[f"{phase} {name}"].update()
        yield
        stages.pop()

    ctx = cases.context([*settings, f"output_dir={folder}"], layout)
    ctx.watch = watch
    originals = {name: value for name, value in vars(ProcessGroup).items() if name in NAMES}
    try:
        for name in originals:
            setattr(ProcessGroup, name, counted(NAMES[name], getattr(ProcessGroup, name)))
        for phase in phases:
            train(ctx, ALGORITHMS[phase](ctx.config))
    finally:
        for name, function in originals.items():
            setattr(ProcessGroup, name, function)
    return {stage: dict(counts) for stage, counts in found.items()}
