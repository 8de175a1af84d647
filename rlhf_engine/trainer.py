"""The loop. A run is a list of phases, a phase an algorithm's stage table run once per iteration."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from . import signals
from .algorithms import ALGORITHMS, jobs
from .algorithms.algorithm import Algorithm, Evaluation, RoleSpec
from .config import JOBS, ConfigError
from .context import Context, TrainState
from .converting.export import RunExport, export_role
from .data.dataset import dialogues
from .launching.build import base_policy, begin, build_context, iterations_of_finished, phase_checkpoints
from .launching.earlier import SUMMARY
from .launching.header import show_run
from .launching.preflight import Plan, lock
from .mesh import ParallelMesh
from .models import checkpoint
from .observing.logbook import Logbook
from .observing.provenance import changes, data_digest, say_finished, write_config
from .observing.report import write_report
from .observing.trace import append_events, cut_events, moments
from .plan.measure import device_of, peak_flops
from .schedule import Schedule
from .signals import RunError, Stop
from .surviving import durable
from .surviving.guard import BadNumbers, Guard, NotFinite
from .surviving.watchdog import Watchdog

BEGUN_AGAIN = "rerun"  # in a phase's folder while a run with rerun=true is under way: the phases of that run


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
    """Decides which roles leave between their stages, by the plan of the run."""
    from .plan.search import residency  # loads what only plans need

    found = None
    if ctx.mesh.is_main:
        models = {name: base.model for name, base in ctx.bases.items()}
        device = device_of(ctx.config, ctx.mesh.world_size)
        found = residency(ctx.config, ctx.mesh.config, models, device)
    found = ctx.mesh.from_main(found)
    ctx.config.schedule.residency, ctx.config.schedule.offload = found.values()
    if ctx.mesh.is_main:
        print(f"residency: {' and '.join(found['schedule.offload']) or 'no role'} leaves between stages", flush=True)


def train(ctx: Context, algorithm: Algorithm) -> bool:
    """One phase: from its checkpoint, or the beginning, to its end; False where it was asked to stop before."""
    config, mesh = ctx.config, ctx.mesh
    folder = Path(config.output_dir) / algorithm.name
    checkpoints = phase_checkpoints(ctx, algorithm.name)
    if config.rerun:
        begin_again(ctx, checkpoints)
    finished = iterations_of_finished(ctx, algorithm.name)
    if finished >= algorithm.iterations:
        if mesh.is_main:
            say_finished(folder, config)
        return True
    specs = algorithm.roles()
    schedule = Schedule(algorithm.stages, algorithm.provided, specs)
    ctx.finished.pop(algorithm.name, None)
    with ctx.watch(f"the check of {algorithm.name}'s checkpoint"):
        found = checkpoints.newest()
    with ctx.watch(f"the loading of {algorithm.name}"):
        begin(ctx, algorithm.name, specs)
        if found:
            ctx.state = TrainState.from_dict(checkpoint.load(found, ctx.roles))
        elif finished >= 0:
            raise ConfigError(
                f"{algorithm.name} has {finished} iterations behind it, and there is no checkpoint in"
                f" {checkpoints.folder}: put it back, or run the phase again (rerun=true)"
            )
    ctx.guard = Guard(config.guard, mesh.is_main, ctx.state.skipped)
    if ctx.state.experience is not None and ctx.state.metrics is not None:
        check_cut(ctx, folder / "config.yaml", algorithm.name)
        ctx.state.experience.widen(mesh.tp)
        ctx.metrics.hold(ctx.state.metrics, mesh)
    if ctx.state.iteration > algorithm.iterations:
        raise ConfigError(
            f"{algorithm.name}.iterations={algorithm.iterations}, and {found} has {ctx.state.iteration} behind it:"
            " use more iterations or another output_dir"
        )
    if mesh.is_main:
        (folder / SUMMARY).unlink(missing_ok=True)  # of a phase that gets more iterations, which is not finished now
    is_within, data = ctx.state.experience is not None, data_digest(ctx.datasets[algorithm.name])
    logbook = Logbook(config, algorithm.name, algorithm.iterations, ctx.state.iteration, mesh.is_main, is_within)
    if mesh.is_main:
        write_config(folder, config, found is not None)
        cut_events(folder / "trace.json", ctx.state.iteration)
        if ctx.state.data not in (None, data):
            print(f"{algorithm.name}: data.sources has other rows from here on", flush=True)
    ctx.state.data = data

    signals.take_note()
    if not iterate(ctx, algorithm, schedule, checkpoints, logbook):
        return False
    signals.leave_at_once()

    with ctx.watch(f"the last evaluation of {algorithm.name}"):
        evaluation = algorithm.evaluate(ctx, final=True)
    with ctx.watch(f"the last save of {algorithm.name}"):
        if algorithm.changes_at_end:
            checkpoints.save(ctx.state.iteration, ctx.roles, ctx.state.to_dict())
        if not checkpoints.finish():
            raise RunError(
                f"{algorithm.name}: what follows needs the last checkpoint: make room and start the same again"
            )
    if config.export_hf:
        with ctx.watch(f"the export of {algorithm.name}"):
            export(ctx, folder, specs)
    if mesh.is_main:
        finish(ctx, folder, algorithm, evaluation, logbook)
    mesh.barrier()
    ctx.roles = {}
    if mesh.is_main:
        shutil.rmtree(folder.parent / "offloaded", ignore_errors=True)
    gc.collect()  # megatron's configuration and its DDP refer to each other
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
    return True


def begin_again(ctx: Context, checkpoints: checkpoint.Checkpoints) -> None:
    """Removes what there is of a phase: once, however often the run is stopped and started until all its phases are
    finished. What is not removed would be taken for the phase's end, so the summary goes last.

    Raises:
        RunError: something cannot be removed.
    """
    folder, phases = checkpoints.folder.parent, " ".join(ctx.config.phases)
    mark = folder / BEGUN_AGAIN
    if ctx.mesh.is_main and not (mark.is_file() and mark.read_text() == phases):
        try:
            checkpoints.clear()
            (folder / SUMMARY).unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text(phases)
        except OSError as error:
            raise RunError(f"rerun=true: {error.filename} cannot be removed or written: {error.strerror}") from None
    ctx.mesh.barrier()


# what cuts an iteration into updates, and deals them its rows
_CUT = ("batch_size", "prompts_per_iteration", "samples_per_prompt", "epochs", "num_minibatches")


def check_cut(ctx: Context, before: Path, phase: str) -> None:
    """An iteration that was left between its updates goes on with the rows that are left.

    Args:
        before: the phase's configuration when it was left.

    Raises:
        ConfigError: they would be other rows now.
    """
    old = ctx.mesh.from_main(durable.read(before) if ctx.mesh.is_main else None) or {}
    for key, was, now in changes(old, asdict(ctx.config)):
        if key in {"seed", *(f"{phase}.{name}" for name in _CUT)}:
            raise ConfigError(
                f"{key}={now}, and {phase} was stopped within iteration {ctx.state.iteration + 1} with {was}: start it"
                f" once more with {key}={was}, to the end of that iteration at least"
            )


def iterate(
    ctx: Context,
    algorithm: Algorithm,
    schedule: Schedule,
    checkpoints: checkpoint.Checkpoints,
    logbook: Logbook,
) -> bool:
    """The iterations that are left of a phase, the first of which may have begun; False where the run was asked to stop
    before the end.

    Raises:
        BadNumbers: too many updates were skipped, or a figure is beyond its limit. What there was before is saved.
    """
    state, done, peak = ctx.state, ctx.state.iteration, peak_flops(ctx.mesh.device)
    while done < algorithm.iterations:
        started = time.perf_counter()
        state.experience = state.experience or algorithm.batch(ctx)
        try:
            schedule.run(ctx, state.experience)
        except NotFinite as error:
            for name in (name for name, role in ctx.roles.items() if role.is_trained):
                ctx.guard.stepped(name, f"iteration {done}, {error}")
        except Stop:
            with ctx.watch(f"the save within iteration {done}"):
                state.metrics = ctx.metrics.held(ctx.mesh)
                checkpoints.save(done, ctx.roles, state.to_dict())
                logbook.stop(done, checkpoints.finish(), is_within=True)
            return False
        done = state.iteration = done + 1
        state.experience = state.metrics = None
        with ctx.watch(f"the figures of iteration {done - 1}"):
            flags = signals.noted(), checkpoints.is_writing
            figures, (is_stopping, is_writing) = ctx.metrics.reduce(ctx.mesh, flags)
            figures |= close_trace(ctx, logbook.folder, figures, peak)
        skipped, reason = ctx.guard.look(figures)
        figures |= skipped
        if algorithm.eval_every and done % algorithm.eval_every == 0 and done < algorithm.iterations:
            with ctx.watch(f"the evaluation behind iteration {done - 1}"):
                figures |= algorithm.evaluate(ctx, final=False).figures
        logbook.write({"iteration": done - 1, **figures, "time/iteration": time.perf_counter() - started})
        started = time.perf_counter()
        ends = is_stopping or reason is not None or done == algorithm.iterations
        with ctx.watch(f"the save behind iteration {done - 1}"):
            if not is_writing:
                checkpoints.finish()
            if ends or done % algorithm.save_every == 0:
                checkpoints.save(done, ctx.roles, state.to_dict())
            is_saved = checkpoints.finish() if ends else True
        ctx.metrics.record("time/save", time.perf_counter() - started)
        if is_stopping or reason is not None:
            logbook.stop(done, is_saved)
        if reason is not None:
            raise BadNumbers(reason)
        if is_stopping:
            return False
    return True


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
        ranks = ctx.mesh.all_gather_object((ctx.trace.spans, moments(ctx.mesh)))
        if ctx.mesh.is_main:
            append_events(folder / "trace.json", ranks, ctx.state.iteration - 1)
    ctx.trace.clear()
    return figures


def finish(ctx: Context, folder: Path, algorithm: Algorithm, evaluation: Evaluation, logbook: Logbook) -> None:
    """Writes report.html and, last, summary.json, which says that the phase is finished."""
    mesh, figures = ctx.mesh, evaluation.figures
    logbook.finish(figures, evaluation.samples)
    about = {
        "data": ", ".join(part.source.spec.name for part in ctx.datasets[algorithm.name].parts),
        "policy": ctx.config.policy.path or "random weights",
        "mesh": f"tp {mesh.tp} x pp {mesh.pp} x dp {mesh.dp}",
    }
    title = f"{algorithm.name} · {folder.parent.name}"
    with durable.spared(folder / "report.html", Exception):  # a drawing
        write_report(folder, title=title, summary={**figures, **about}, samples=evaluation.samples)
    durable.write(folder / SUMMARY, json.dumps({"iterations": ctx.state.iteration, **figures}, indent=1))


def export(ctx: Context, folder: Path, specs: Mapping[str, RoleSpec]) -> None:
    """The phase's trained models in HF format: the critic in `hf_critic`, what else there is in `hf`."""
    prompts = dialogues(ctx.datasets[folder.name], ctx.tokenizer)
    for name, role in ctx.roles.items():
        if role.is_trained:
            base = ctx.bases[specs[name].base].path
            about = RunExport(role.model, role.head, Path(base) if base else None, ctx.tokenizer, prompts)
            target = folder / ("hf_critic" if name == "critic" else "hf")
            with durable.needed(target):
                export_role(role, target, about.config, about.write)
            if ctx.mesh.is_main:
                for note in about.notes:
                    print(f"{target}: {note}", flush=True)
