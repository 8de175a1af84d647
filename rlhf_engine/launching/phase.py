"""A phase of training: where it begins, what is kept of it while it runs, and what it leaves at its end."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..algorithms.algorithm import Algorithm, Evaluation, RoleSpec
from ..algorithms.passing import evaluate
from ..config import ConfigError
from ..context import Context, TrainState
from ..converting.export import RunExport, export_role
from ..data.dataset import dialogues
from ..models import checkpoint
from ..observing.logbook import Logbook
from ..observing.provenance import changes, say_finished, write_config
from ..observing.report import write_report
from ..observing.trace import cut_events
from ..schedule import Schedule
from ..signals import RunError
from ..surviving import durable
from ..surviving.guard import Guard
from .build import begin, iterations_of_finished, phase_checkpoints
from .earlier import SUMMARY

BEGUN_AGAIN = "rerun"  # in a phase's folder while a run with rerun=true is under way: the phases of that run

# what cuts an iteration into updates, and deals them its rows
_CUT = ("batch_size", "prompts_per_iteration", "samples_per_prompt", "epochs", "num_minibatches")


@dataclass
class Phase:
    """A phase that has been opened: its roles and its state are in `ctx`."""

    ctx: Context
    algorithm: Algorithm
    specs: Mapping[str, RoleSpec]
    schedule: Schedule
    checkpoints: checkpoint.Checkpoints
    logbook: Logbook
    folder: Path


def open_phase(ctx: Context, algorithm: Algorithm) -> Phase | None:
    """A phase where it was left, or at its beginning; None where it is finished.

    Raises:
        ConfigError: what there is of it does not fit the configuration, or is gone.
    """
    folder = Path(ctx.config.output_dir) / algorithm.name
    checkpoints = phase_checkpoints(ctx, algorithm.name)
    if ctx.config.rerun:
        begin_again(ctx, checkpoints)
    finished = iterations_of_finished(ctx, algorithm.name)
    if finished >= algorithm.iterations:
        if ctx.mesh.is_main:
            say_finished(folder, ctx.config)
        return None
    specs = algorithm.roles()
    schedule = Schedule(algorithm.stages, algorithm.provided, specs)
    ctx.finished.pop(algorithm.name, None)
    with ctx.watch(f"the check of {algorithm.name}'s checkpoint"):
        found = checkpoints.newest()
    if found is None and finished >= 0:
        raise ConfigError(
            f"{algorithm.name} has {finished} iterations behind it, and there is no checkpoint in"
            f" {checkpoints.folder}: put it back, or run the phase again (rerun=true)"
        )
    with ctx.watch(f"the loading of {algorithm.name}"):
        begin(ctx, algorithm.name, specs)
        if found:
            ctx.state = TrainState.from_dict(checkpoint.load(found, ctx.roles))
    if ctx.state.iteration > algorithm.iterations:
        raise ConfigError(
            f"{algorithm.name}.iterations={algorithm.iterations}, and {found} has {ctx.state.iteration} behind it:"
            " use more iterations or another output_dir"
        )
    ctx.guard = Guard(ctx.config.guard, ctx.mesh.is_main, ctx.state.skipped)
    is_within = ctx.state.experience is not None
    if ctx.state.experience is not None and ctx.state.metrics is not None:
        check_cut(ctx, folder / "config.yaml")
        ctx.state.experience.widen(ctx.mesh.tp)
        ctx.metrics.hold(ctx.state.metrics, ctx.mesh)
    if ctx.state.carried is not None:
        check_carried(ctx, folder / "config.yaml")
    if ctx.mesh.is_main:
        (folder / SUMMARY).unlink(missing_ok=True)  # of a phase that gets more iterations, which is not finished now
    logbook = Logbook(
        ctx.config, algorithm.name, algorithm.iterations, ctx.state.iteration, ctx.mesh.is_main, is_within
    )
    _record(ctx, folder, found is not None)
    return Phase(ctx, algorithm, specs, schedule, checkpoints, logbook, folder)


def _record(ctx: Context, folder: Path, is_resumed: bool) -> None:
    """What the phase goes on with from here: its configuration, and which rows it draws."""
    data = ctx.datasets[ctx.phase].digest()
    if ctx.mesh.is_main:
        write_config(folder, ctx.config, is_resumed)
        cut_events(folder / "trace.json", ctx.state.iteration)
        if ctx.state.data not in (None, data):
            print(f"{ctx.phase}: data.sources has other rows from here on", flush=True)
    ctx.state.data = data


def save_within(phase: Phase) -> None:
    """An iteration that is left between two of its stages or updates."""
    ctx, done = phase.ctx, phase.ctx.state.iteration
    with ctx.watch(f"the save within iteration {done}"):
        ctx.state.metrics = ctx.metrics.held(ctx.mesh)
        phase.checkpoints.save(done, ctx.roles, ctx.state.to_dict())
        phase.logbook.stop(done, phase.checkpoints.finish(), is_within=True)


def save(phase: Phase, ends: bool, is_writing: bool, figures: Mapping[str, float]) -> bool:
    """Behind an iteration, where it is time for it; whether what was to be on the disk is.

    Args:
        ends: the run stops here, or the phase has come to its end.
        is_writing: a rank's thread is still at work on the last save.
        figures: of the iteration, which may make it the best.
    """
    ctx, started, done = phase.ctx, time.perf_counter(), phase.ctx.state.iteration
    with ctx.watch(f"the save behind iteration {done - 1}"):
        if not is_writing:
            phase.checkpoints.finish()
        best = phase.checkpoints.improves(figures)
        if ends or best is not None or done % phase.algorithm.save_every == 0:
            phase.checkpoints.save(done, ctx.roles, ctx.state.to_dict(), best)
        is_saved = phase.checkpoints.finish() if ends else True
    ctx.metrics.record("time/save", time.perf_counter() - started)
    return is_saved


def close_phase(phase: Phase) -> None:
    """The last evaluation, the exports and the report; the phase's memory is free then.

    Raises:
        RunError: the last checkpoint, which what follows needs, could not be saved.
    """
    ctx, algorithm = phase.ctx, phase.algorithm
    with ctx.watch(f"the last evaluation of {algorithm.name}"):
        evaluation = evaluate(ctx, algorithm, final=True)
    with ctx.watch(f"the last save of {algorithm.name}"):
        if algorithm.changes_at_end:
            phase.checkpoints.save(ctx.state.iteration, ctx.roles, ctx.state.to_dict())
        if not phase.checkpoints.finish():
            raise RunError(
                f"{algorithm.name}: what follows needs the last checkpoint: make room and start the same again"
            )
        if (value := phase.checkpoints.improves(evaluation.figures)) is not None:
            phase.checkpoints.mark(value)
    if ctx.config.export_hf:
        with ctx.watch(f"the export of {algorithm.name}"):
            if ctx.config.checkpoint.build_on == "best" and (found := phase.checkpoints.chosen()):
                checkpoint.load(found, ctx.roles)
            export(ctx, phase.folder, phase.specs)
    if ctx.mesh.is_main:
        finish(phase, evaluation)
    ctx.mesh.barrier()
    ctx.roles = {}
    if ctx.mesh.is_main:
        shutil.rmtree(phase.folder.parent / "offloaded", ignore_errors=True)
    gc.collect()  # megatron's configuration and its DDP refer to each other
    if ctx.mesh.device.type == "cuda":
        torch.cuda.empty_cache()


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
        except OSError as error:
            raise RunError(f"rerun=true: {error.filename} cannot be removed: {error.strerror}") from None
        durable.make_folder(folder)
        durable.write(mark, phases)
    ctx.mesh.barrier()


def check_cut(ctx: Context, before: Path) -> None:
    """An iteration that was left between its updates goes on with the rows that are left.

    Args:
        before: the phase's configuration when it was left.

    Raises:
        ConfigError: they would be other rows now.
    """
    for key, was, now in _changed(ctx, before, {"seed", *(f"{ctx.phase}.{name}" for name in _CUT)}):
        raise ConfigError(
            f"{key}={now}, and {ctx.phase} was stopped within iteration {ctx.state.iteration + 1} with {was}:"
            f" start it once more with {key}={was}, to the end of that iteration at least"
        )


def check_carried(ctx: Context, before: Path) -> None:
    """Responses that are carried need an iteration that goes on with them, in the groups that they are of.

    Args:
        before: as of `check_cut`.

    Raises:
        ConfigError: there would be none.
    """
    for key, was, now in _changed(ctx, before, {"rollout.tail", f"{ctx.phase}.samples_per_prompt"}):
        raise ConfigError(
            f"{key}={now}, and {ctx.phase} carries responses that were begun with {was}: start it once more with"
            f" {key}={was} and rollout.done_share=1, to the end of an iteration at least"
        )


def _changed(ctx: Context, before: Path, keys: Collection[str]) -> list[tuple[str, str, str]]:
    """Which of these keys have other values than in a configuration: that, and the present one, as they are typed."""
    old = ctx.mesh.from_main(durable.read(before) if ctx.mesh.is_main else None) or {}
    found = changes(old, asdict(ctx.config))
    return [(key, was.strip('"'), now.strip('"')) for key, was, now in found if key in keys]


def finish(phase: Phase, evaluation: Evaluation) -> None:
    """Writes report.html and, last, summary.json, which says that the phase is finished."""
    ctx, folder, algorithm, figures = phase.ctx, phase.folder, phase.algorithm, evaluation.figures
    mesh, best = ctx.mesh, phase.checkpoints.best
    phase.logbook.finish(figures, evaluation.samples)
    about = {
        "data": ", ".join(part.source.spec.name for part in ctx.datasets[algorithm.name].parts),
        "policy": ctx.config.policy.path or "random weights",
        "mesh": f"tp {mesh.tp} x pp {mesh.pp} x dp {mesh.dp}",
    }
    title = f"{algorithm.name} · {folder.parent.name}"
    with durable.spared(folder / "report.html", Exception):  # a drawing
        write_report(folder, title=title, summary={**figures, **about}, samples=evaluation.samples)
    about_best = {"best": {"checkpoint": best[0], ctx.config.checkpoint.best: best[1]}} if best else {}
    durable.write(folder / SUMMARY, json.dumps({"iterations": ctx.state.iteration, **figures, **about_best}, indent=1))


def export(ctx: Context, folder: Path, specs: Mapping[str, RoleSpec]) -> None:
    """The phase's trained models in HF format: the critic in `hf_critic`, what else there is in `hf`."""
    prompts = dialogues(ctx.datasets[folder.name])
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
