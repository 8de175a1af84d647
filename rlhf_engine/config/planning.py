"""What a run would cost, and whether it would run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DeviceName = Literal["cpu", "a100", "h100", "h200", "b200"]


@dataclass
class PlanConfig:
    """What a run would cost, by arithmetic: nothing is run, and the devices need not be here (docs/plan.md)."""

    show: bool = False  # `plan=true`
    search: bool = False  # the meshes and settings of as many ranks that would be fastest
    calibrate: bool = False  # seconds by a short run of the same stages on this machine, a few layers on one rank
    device: DeviceName | None = None  # null: what is here
    world: int | None = None  # ranks; null: those of the mesh
    memory: float | None = None  # GB of a device; null: what such a device has
    prompt_tokens: int | None = None  # of a usual prompt, for FLOPs and seconds; null: data.max_prompt_len
    response_tokens: int | None = None  # of a usual response; null: rollout.max_new_tokens


@dataclass
class RehearseConfig:
    """A run on devices that are not there, of the kind `plan.device` (docs/rehearse.md)."""

    # those of the world that are rehearsed; null: all of a small run (8 ranks of a small model), of a larger one a rank
    # of each pipeline stage, of the first two and the last two of them
    ranks: list[int] | None = None
    # of each role in a pass; null: all of a small run, of a larger one a few more than it has pipeline stages
    micro_batches: int | None = None
    iterations: int = 2  # of each phase
    # as long as the configuration allows, so that no iteration needs more memory, or as they come
    rows: Literal["longest", "data"] = "longest"
