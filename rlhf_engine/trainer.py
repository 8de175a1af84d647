"""The loop. A run is a list of phases, a phase an algorithm's stage table run once per iteration."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from . import signals
from .algorithms import ALGORITHMS, jobs
from .algorithms.algorithm import Algorithm
from .algorithms.passing import evaluate
from .config import JOBS
from .context import Context
from .launching.build import base_policy, build_context
from .launching.header import show_run
from .launching.phase import BEGUN_AGAIN, Phase, close_phase, open_phase, save, save_within
from .launching.preflight import Plan, lock
from .mesh import ParallelMesh
from .observing.trace import append_events, moments
from .plan.measure import device_of, peak_flops
from .signals import Stop
from .surviving.guard import BadNumbers, NotFinite
from .surviving.watchdog import Watchdog


def run(plan: Plan) -> int:
    """Runs every phase of a planned run on this rank.

    Returns:
        The process's exit code: 0, or `signals.STOPPED` when the run was asked to stop and has saved.
    """
    if os.environ["RANK"] != "0":
        return run_phases(plan)
    held = lock(plan.config).acquire()
    signals.before_leaving(held.release)
    try:
        return run_phases(plan)
    finally:
        held.release()


def run_phases(plan: Plan) -> int:
    """`run`, in a place that is held."""
    limit = plan.config.timeout.stage
    mesh = ParallelMesh(plan.mesh, plan.device, 2 * limit)  # the watchdog, which knows more, speaks first
    watchdog = Watchdog(limit, mesh.rank, mesh.world_size)
    with watchdog.stage("the reading of data"):
        ctx = build_context(plan, mesh)
        if plan.config.schedule.residency == "auto":
            settle_residency(ctx)
    ctx.watch = watchdog.stage
    if mesh.is_main:
        show_run(plan, ctx)
    code = 0
    for phase in plan.config.phases:
        if phase in JOBS:
            jobs.run(ctx, plan.made_with, lambda: base_policy(ctx))
        elif not train(ctx, ALGORITHMS[phase](plan.config)):
            code = signals.STOPPED
            break
    else:
        for phase in plan.config.phases if mesh.is_main else ():
            (Path(plan.config.output_dir) / phase / BEGUN_AGAIN).unlink(missing_ok=True)
    watchdog.close()
    mesh.barrier()
    return code


def settle_residency(ctx: Context) -> None:
    """Decides which roles leave between their stages, and how large the cache is, by the plan of the run."""
    from .plan.search import change, residency  # loads what only plans need

    found = None
    if ctx.mesh.is_main:
        models = {name: base.model for name, base in ctx.bases.items()}
        device = device_of(ctx.config, ctx.mesh.world_size)
        found = residency(ctx.config, ctx.mesh.config, models, device)
    found = ctx.mesh.from_main(found)
    change(ctx.config, found)
    if ctx.mesh.is_main:
        leave = f"{' and '.join(found.get('schedule.offload', ())) or 'no role'} leaves between stages"
        print(f"residency: {leave}, the cache gets {ctx.config.rollout.cache_share:.0%} of what is free", flush=True)


def train(ctx: Context, algorithm: Algorithm) -> bool:
    """One phase: from its checkpoint, or the beginning, to its end; False where it was asked to stop before."""
    phase = open_phase(ctx, algorithm)
    if phase is None:
        return True
    signals.take_note()
    if not iterate(phase):
        return False
    signals.leave_at_once()
    close_phase(phase)
    return True


def iterate(phase: Phase) -> bool:
    """The iterations that are left of a phase, the first of which may have begun; False where the run was asked to stop
    before the end.

    Raises:
        BadNumbers: too many updates were skipped, or a figure is beyond its limit. What there was before is saved.
    """
    ctx, algorithm, state = phase.ctx, phase.algorithm, phase.ctx.state
    peak = peak_flops(ctx.mesh.device)
    while state.iteration < algorithm.iterations:
        started = time.perf_counter()
        try:
            state.experience = state.experience or algorithm.batch(ctx)
            phase.schedule.run(ctx, state.experience)
        except NotFinite as error:
            skip(ctx, error)
        except Stop:
            save_within(phase)
            return False
        figures, reason, is_stopping, is_writing = look(phase, peak)
        seconds = time.perf_counter() - started
        phase.logbook.write({"iteration": state.iteration - 1, **figures, "time/iteration": seconds})
        is_last = is_stopping or reason is not None
        is_saved = save(phase, is_last or state.iteration == algorithm.iterations, is_writing, figures)
        if is_last:
            phase.logbook.stop(state.iteration, is_saved)
        if reason is not None:
            raise BadNumbers(reason)
        if is_stopping:
            return False
    return True


def skip(ctx: Context, error: NotFinite) -> None:
    """An iteration that can make no update counts as one skipped of each trained role."""
    for name in (name for name, role in ctx.roles.items() if role.is_trained):
        ctx.guard.stepped(name, f"iteration {ctx.state.iteration}, {error}")


def look(phase: Phase, peak: float | None) -> tuple[dict[str, float], str | None, bool, bool]:
    """The figures of an iteration that is done, with those of an evaluation where it is time for one; why the run is to
    end, if there is a reason; and whether any rank was asked to stop, and is still writing a checkpoint.

    Args:
        peak: as for `close_trace`.
    """
    ctx, algorithm, state = phase.ctx, phase.algorithm, phase.ctx.state
    done = state.iteration = state.iteration + 1
    state.experience = state.metrics = None
    with ctx.watch(f"the figures of iteration {done - 1}"):
        flags = signals.noted(), phase.checkpoints.is_writing
        figures, (is_stopping, is_writing) = ctx.metrics.reduce(ctx.mesh, flags)
        figures |= close_trace(ctx, phase.folder, figures, peak)
    skipped, reason = ctx.guard.look(figures)
    figures |= skipped
    if algorithm.eval_every and done % algorithm.eval_every == 0 and done < algorithm.iterations:
        with ctx.watch(f"the evaluation behind iteration {done - 1}"):
            figures |= evaluate(ctx, algorithm, final=False).figures
    return figures, reason, is_stopping, is_writing


def close_trace(ctx: Context, folder: Path, times: Mapping[str, float], peak: float | None) -> dict[str, float]:
    """Idle shares of the iteration's pipelines and utilisation by its train stages; with `trace=true` its spans go to
    `trace.json`.

    Args:
        times: `time/<stage>` of the iteration.
        peak: FLOP/s of one rank's device; None where it is not known, and then there is no utilisation.
    """
    ctx.trace.finish()
    figures = ctx.trace.idle_shares(ctx.mesh) if ctx.mesh.pp > 1 else {}
    if peak is not None:
        for stage, flops in ctx.trace.flops.items():
            figures[f"mfu/{stage}"] = flops / (times[f"time/{stage}"] * ctx.mesh.world_size * peak)
    if ctx.config.trace:
        ranks = ctx.mesh.to_main((ctx.trace.spans, moments(ctx.mesh)))
        if ctx.mesh.is_main:
            append_events(folder / "trace.json", ranks, ctx.state.iteration - 1)
    ctx.trace.clear()
    return figures
