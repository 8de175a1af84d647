"""Stages of an iteration, and the schedule that runs them.

An algorithm is a table of stages. Each names the role that it runs on, the fields of the Experience that it reads
and writes, and a body; the schedule checks the table before anything is allocated and holds every body to it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from torch import Tensor

from .config import ScheduleConfig
from .context import Context
from .experience import FIELDS, Experience, numbered
from .models import stream
from .models.residency import Presence
from .models.work import Work
from .signals import Stop
from .surviving.guard import NotFinite

Fields = Mapping[str, Any]  # mostly tensors
# What the body of an infer or a train stage is: it yields work for its role and gets an infer's result back. A train
# stage may yield several works at once, for one step.
Works = Generator[Work | list[Work], Tensor, Fields | None]
# ctx, the stage's role, the fields that it reads -> the fields that it writes
Body = Callable[[Context, Any, SimpleNamespace], Fields | Works | None]


@dataclass(frozen=True)
class Stage:
    """One row of an algorithm's table.

    Kinds: "rollout" generates, "infer" runs a role forward, "train" updates it, "local" computes on the
    Experience alone and has no role. Bodies of "infer" and "train" yield `Work` for their role and leave its running
    to the schedule, which may do that of several stages at once.

    Args:
        beside: a role that the body works with besides: of a rollout one that speaks in it; of others one whose head is
            read, which the body sees to itself.
    """

    name: str
    kind: Literal["rollout", "infer", "train", "local"]
    body: Body
    role: str | None = None
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    beside: str | None = None


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
            for role in filter(None, (stage.role, stage.beside)):
                if role not in roles:
                    raise ScheduleError(f"stage {stage.name} runs on {role}; there are {', '.join(sorted(roles))}")
            for name in (*stage.reads, *stage.writes):
                if name not in FIELDS:
                    raise ScheduleError(f"stage {stage.name}: Experience has no field {name}")
            if missing := set(stage.reads) - written:
                raise ScheduleError(f"stage {stage.name} reads {', '.join(sorted(missing))} before a stage writes it")
            written |= set(stage.writes)

    def groups(
        self, config: ScheduleConfig, pp: int, offloaded: Collection[str], done: Collection[str] = ()
    ) -> list[list[Stage]]:
        """Stages that run together, in their order, without those that are done.

        Neighbouring `infer` stages, and neighbouring `train` stages, share one pipeline unless one of them reads what
        another writes. Without a pipeline there is nothing to gain, and roles kept off the device (`offloaded`) are
        not brought there together.
        """
        found: list[list[Stage]] = []
        for stage in (stage for stage in self.stages if stage.name not in done):
            streams = {"infer": config.infer_stream, "train": config.train_stream}.get(stage.kind, False)
            last = found[-1] if found else []
            joins = (
                streams
                and pp > 1
                and last
                and all(other.kind == stage.kind and other.role not in offloaded for other in last)
                and stage.role not in offloaded
                and not any(set(stage.reads) & set(other.writes) for other in last)
                # two steps of one role in a stream would both start from the same weights
                and not (stage.kind == "train" and any(other.role == stage.role for other in last))
            )
            if joins:
                last.append(stage)
            else:
                found.append([stage])
        return found

    def run(self, ctx: Context, experience: Experience) -> Experience:
        """One iteration, or what `experience` says is left of it. `time/<stage>`, or `time/<stage>+<stage>` of those
        that ran together, goes to the metrics.

        Raises:
            Stop: the run was asked to stop; `experience` says how far it has come.
            NotFinite: a stage gave what would ruin every update.
        """
        offloaded = [name for name, role in ctx.roles.items() if role.is_offloaded]
        first = self.groups(ctx.config.schedule, ctx.mesh.pp, offloaded)[0]
        groups = self.groups(ctx.config.schedule, ctx.mesh.pp, offloaded, experience.stages)
        try:
            self._run(ctx, experience, groups, first)
        except (Stop, NotFinite):
            _leave(ctx, first)  # so that a save finds the room that it has behind every iteration
            raise
        return experience

    def _run(
        self, ctx: Context, experience: Experience, groups: Sequence[Sequence[Stage]], first: Sequence[Stage]
    ) -> None:
        for i, group in enumerate(groups):
            # the next that works with roles, the next iteration's first behind the last of this one
            following = next((other for other in groups[i + 1 :] if needs(other)), first)
            name = "+".join(stage.name for stage in group)
            # all of it, for ranks wait for each other behind the stage too
            with ctx.watch(f"{name} of iteration {ctx.state.iteration}"):
                _arrive(ctx, group, following)
                self._run_one(ctx, experience, group, name)
                _leave(ctx, following)
                ctx.stop_if_asked()

    def _run_one(self, ctx: Context, experience: Experience, group: Sequence[Stage], name: str) -> None:
        """A group of stages, and what it gives."""
        started = time.perf_counter()
        try:
            with ctx.trace.stage(name):
                results = self._run_group(ctx, group, experience)
        except Stop:
            raise
        except Exception as error:
            error.add_note(f"in stage {name} of iteration {ctx.state.iteration}, on rank {ctx.mesh.rank}")
            raise
        for stage, result in zip(group, results, strict=True):
            if set(result) != set(stage.writes):
                raise ScheduleError(
                    f"stage {stage.name} writes {', '.join(stage.writes) or 'nothing'},"
                    f" and its body gave {', '.join(sorted(result)) or 'nothing'}"
                )
            for field, value in result.items():
                check_finite(stage, field, value)
                setattr(experience, field, value)
        experience.stages += [stage.name for stage in group]
        ctx.metrics.record(f"time/{name}", time.perf_counter() - started)

    def _run_group(self, ctx: Context, group: Sequence[Stage], experience: Experience) -> list[Fields]:
        """What the bodies of stages that run together give, which is not yet looked at."""
        roles = [ctx.roles[stage.role] if stage.role is not None else None for stage in group]
        with contextlib.ExitStack() as stack:
            for role in roles:
                stack.enter_context(role.on_device() if role is not None else contextlib.nullcontext())
            results: list[Any] = []
            for stage, role in zip(group, roles, strict=True):
                view = SimpleNamespace(**{name: getattr(experience, name) for name in stage.reads})
                results.append(stage.body(ctx, role, view))
            stop = None
            if group[0].kind in ("infer", "train"):
                try:
                    results = together(results, group, ctx, experience.steps)
                except Stop as asked:  # on every rank, unlike an error
                    stop = asked
            if group[0].kind == "train":
                for role in filter(None, roles):
                    role.gather()
            if stop is not None:
                raise stop
        return [result or {} for result in results]


def check_finite(stage: Stage, field: str, value: Any) -> None:
    """Refuses what would ruin every update that it enters.

    Raises:
        NotFinite: names stage, role and samples.
    """
    if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
        samples = (~value.isfinite()).flatten(1).any(1) if value.dim() > 1 else ~value.isfinite()
        role = f" ({stage.role})" if stage.role else ""
        raise NotFinite(
            f"stage {stage.name}{role}: {field} not finite for {numbered(samples.nonzero().flatten().tolist())}"
        )


def needs(group: Sequence[Stage]) -> dict[str, Presence]:
    """How much of which roles a group of stages works with."""
    return {
        role: Presence.TRAINING if stage.kind == "train" else Presence.WEIGHTS
        for stage in group
        for role in (stage.role, stage.beside if stage.kind == "rollout" else None)
        if role is not None
    }


def _arrive(ctx: Context, group: Sequence[Stage], following: Sequence[Stage]) -> None:
    """Brings the group's roles on the device and, to be copied while it works, those of the group behind it."""
    wanted = [needs(group), needs(following) if ctx.config.schedule.prefetch else {}]
    with _span(ctx, "roles arrive"):
        for name, presence in (pair for each in wanted for pair in each.items()):
            ctx.roles[name].move(max(ctx.roles[name].presence, presence))


def _leave(ctx: Context, following: Sequence[Stage]) -> None:
    """Takes off the device what the next group does not need: at an iteration's end, the first of the next one."""
    wanted = needs(following)
    with _span(ctx, "roles leave"):
        for name, role in ctx.roles.items():
            role.move(min(role.presence, wanted.get(name, Presence.AWAY)))


def _span(ctx: Context, name: str) -> contextlib.AbstractContextManager[None]:
    """In the trace, where more than gradients moves, which are not copied."""
    are_copied = any(role.is_offloaded for role in ctx.roles.values())
    return ctx.trace.span(name, "move") if are_copied else contextlib.nullcontext()


def together(
    bodies: Sequence[Works], group: Sequence[Stage], ctx: Context, made: dict[str, int]
) -> list[Fields | None]:
    """Runs the bodies of a group, which yield `Work`, in step with each other, and gives what each returns.

    Args:
        made: updates that each train stage has made, which are passed over; kept up to date.
    """
    for body, row in zip(bodies, group, strict=True):
        for _ in range(made.get(row.name, 0)):
            next(body, None)
    results: list[Fields | None] = [None] * len(bodies)
    answers: dict[int, Any] = dict.fromkeys(range(len(bodies)))
    while answers:
        works = {}
        for i, answer in answers.items():
            try:
                works[i] = bodies[i].send(answer)
            except StopIteration as stop:
                results[i] = stop.value
        steps = [step if isinstance(step, list) else [step] for step in works.values()]
        flat = [work for step in steps for work in step]
        if group[0].kind == "infer":
            answers = dict(zip(works, stream.infer(flat, ctx.trace) if flat else (), strict=True))
        else:
            problems = stream.train_step(flat, ctx.metrics, ctx.trace) if flat else {}
            for role, problem in problems.items():
                stage = next(stage.name for stage in group if stage.role == role)
                made[stage] = made.get(stage, 0) + 1
                ctx.guard.stepped(role, problem and f"iteration {ctx.state.iteration}, stage {stage}: {problem}")
            answers = dict.fromkeys(works)
            if works:
                ctx.stop_if_asked()
    return results
