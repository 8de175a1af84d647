"""Stages of an iteration, and the schedule that runs them.

An algorithm is a table of stages. Each names the role that it runs on, the fields of the Experience that it reads
and writes, and a body; the schedule checks the table before anything is allocated and holds every body to it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from .experience import FIELDS, Experience

if TYPE_CHECKING:
    from .algorithms.context import Context
    from .models.role import RoleModel

# ctx, the stage's role, the fields that it reads -> the fields that it writes
Body = Callable[["Context", Any, SimpleNamespace], Mapping[str, Tensor] | None]


@dataclass(frozen=True)
class Stage:
    """One row of an algorithm's table.

    Kinds: "rollout" generates, "infer" runs a role forward, "train" updates it, "local" computes on the
    Experience alone and has no role.
    """

    name: str
    kind: Literal["rollout", "infer", "train", "local"]
    body: Body
    role: str | None = None
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


class ScheduleError(ValueError):
    """A stage table that cannot run, or a body that broke its row."""


class Schedule:
    """Runs a table of stages over an Experience, one iteration after the other.

    Args:
        stages: in the order in which they run.
        provided: fields that the Experience of an iteration starts with.
        roles: names of the roles that exist.

    Raises:
        ScheduleError: a field is read before it is written, is unknown, or a role does not exist.
    """

    def __init__(self, stages: Sequence[Stage], provided: Collection[str], roles: Collection[str]):
        self.stages = stages
        written = set(provided)
        for stage in stages:
            if (stage.role is None) != (stage.kind == "local"):
                raise ScheduleError(f"stage {stage.name}: a {stage.kind} stage has {'a' if stage.role else 'no'} role")
            if stage.role is not None and stage.role not in roles:
                raise ScheduleError(f"stage {stage.name} runs on {stage.role}; there are {', '.join(sorted(roles))}")
            for name in (*stage.reads, *stage.writes):
                if name not in FIELDS:
                    raise ScheduleError(f"stage {stage.name}: Experience has no field {name}")
            if missing := set(stage.reads) - written:
                raise ScheduleError(f"stage {stage.name} reads {', '.join(sorted(missing))} before a stage writes it")
            written |= set(stage.writes)

    def run(self, ctx: Context, experience: Experience) -> Experience:
        """One iteration. `time/<stage>` of each stage goes to the metrics, in seconds."""
        for stage in self.stages:
            role: RoleModel | None = ctx.roles[stage.role] if stage.role is not None else None
            started = time.perf_counter()
            view = SimpleNamespace(**{name: getattr(experience, name) for name in stage.reads})
            try:
                with role.on_device() if role is not None else contextlib.nullcontext():
                    result = stage.body(ctx, role, view) or {}
            except Exception as error:
                error.add_note(f"in stage {stage.name} of iteration {ctx.state.iteration}, on rank {ctx.mesh.rank}")
                raise
            if set(result) != set(stage.writes):
                raise ScheduleError(
                    f"stage {stage.name} writes {', '.join(stage.writes) or 'nothing'},"
                    f" and its body gave {', '.join(sorted(result)) or 'nothing'}"
                )
            for name, value in result.items():
                setattr(experience, name, value)
            ctx.metrics.record(f"time/{stage.name}", time.perf_counter() - started)
        return experience
