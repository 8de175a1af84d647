"""All checks of a run, one after the other: a line for each as it ends, and verify.json."""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..algorithms import ALGORITHMS
from ..config import SAMPLING
from ..context import Context
from ..launching.build import build_context
from ..launching.preflight import Plan
from ..mesh import ParallelMesh
from ..plan.search import mesh_text
from ..surviving import durable
from ..surviving.guard import NotFinite
from ..surviving.watchdog import Watchdog
from ..trainer import settle_residency
from . import export, layouts, phases, policy
from .findings import Finding, Skipped, worst
from .measure import Iteration, few, first_iteration, generated, small
from .subject import Subject
from .updates import measure_rounding

_NAME, _DETAIL = 58, 70  # columns


@dataclass(frozen=True)
class Line:
    """A check's outcome: "pass", "FAIL" or "skipped"."""

    name: str
    outcome: str
    figure: float | None
    limit: float | None
    detail: str
    seconds: float


class Report:
    """Runs checks on all ranks; the main one prints and writes."""

    def __init__(self, ctx: Context):
        self.ctx = ctx
        self.lines: list[Line] = []
        self.started = time.perf_counter()

    def check(self, name: str, body: Callable[..., Finding], *args: Any) -> bool:
        """One check, judged by the rank where it looks worst.

        Returns:
            Whether it has not failed.
        """
        started, mesh = time.perf_counter(), self.ctx.mesh
        outcome, finding, why = "pass", None, ""
        with self.ctx.watch(name):
            try:
                finding = body(*args)
            except Skipped as reason:
                outcome, why = "skipped", str(reason)
            except (NotFinite, FloatingPointError) as error:  # the same on every rank
                finding = Finding(math.inf, 0, str(error))
            if finding is not None:
                found: list[Finding] = mesh.all_gather_object(finding)
                finding = worst(found)
                outcome, why = "pass" if finding.figure <= finding.limit else "FAIL", finding.detail
        figure, limit = (finding.figure, finding.limit) if finding else (None, None)
        self.lines.append(Line(name, outcome, figure, limit, why, round(time.perf_counter() - started, 3)))
        if mesh.is_main:
            print(_text(self.lines[-1]), flush=True)
        return outcome != "FAIL"

    def finish(self, about: dict[str, Any], path: Path) -> int:
        """The last line and verify.json; the exit code."""
        counts = {
            outcome: sum(line.outcome == outcome for line in self.lines) for outcome in ("pass", "FAIL", "skipped")
        }
        seconds = time.perf_counter() - self.started
        if self.ctx.mesh.is_main:
            # JSON has no words for what is not finite
            rows = [
                {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(line).items()}
                for line in self.lines
            ]
            found = {"passed": not counts["FAIL"], **about, "seconds": round(seconds, 1), "checks": rows}
            durable.write(path, json.dumps(found, indent=1) + "\n")
            print(
                f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['skipped']} skipped"
                f" in {seconds:.0f} s: {path}",
                flush=True,
            )
        return 1 if counts["FAIL"] else 0


def _text(line: Line) -> str:
    figures = f"{line.figure:9.2g} {line.limit:9.2g}" if line.figure is not None else " " * 19
    return f"{line.outcome:8}{line.name:{_NAME}}{figures}  {line.detail:.{_DETAIL}}".rstrip()


def run(plan: Plan) -> int:
    """Every check on this rank.

    Returns:
        The process's exit code: 0 where none has failed, else 1.
    """
    limit = plan.config.timeout.stage
    mesh = ParallelMesh(plan.mesh, plan.device, 2 * limit)
    watchdog = Watchdog(limit, mesh.rank, mesh.world_size)
    ctx = build_context(replace(plan, config=small(plan.config, mesh.world_size)), mesh)
    ctx.watch = watchdog.stage
    if ctx.config.schedule.residency == "auto":
        settle_residency(ctx)
    rows = ctx.config.sft.batch_size
    ctx.datasets = {name: few(dataset, rows) for name, dataset in ctx.datasets.items()}
    training: list[str] = [name for name in ALGORITHMS if name in ctx.config.phases]
    folder = Path(ctx.config.output_dir) / "verify"
    about = {
        "mesh": mesh_text(plan.mesh),
        "ranks": mesh.world_size,
        "device": plan.device,
        "policy": plan.config.policy.path,
    }
    report = Report(ctx)
    if mesh.is_main:
        print(f"{about['mesh']} = {mesh.world_size} ranks on {plan.device}, {rows} rows a batch")
        if plan.config.dtype != ctx.config.dtype:
            print(f"dtype={plan.config.dtype} is verified as dtype={ctx.config.dtype}")
        print(f"{'':8}{'check':{_NAME}}{'figure':>9} {'limit':>9}")
        shutil.rmtree(folder, ignore_errors=True)  # of a check that was killed
        folder.mkdir(parents=True)
    mesh.barrier()
    check_policy(report, ctx, training[0], folder)
    report.check("export: prompts, read back", export.tokenizer, ctx, training[0], folder)
    found = {name: check_phase(report, ctx, name) for name in training}
    iterations = {name: iteration for name, iteration in found.items() if iteration is not None}
    report.check(
        f"{training[-1]}: interrupted against uninterrupted", layouts.resumed, ctx, training[-1], folder / "checkpoints"
    )
    free(ctx)
    check_layouts(report, ctx, plan, iterations)
    code = report.finish(about, folder.with_suffix(".json"))
    if ctx.mesh.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    watchdog.close()
    ctx.mesh.close()
    return code


def check_policy(report: Report, ctx: Context, phase: str, folder: Path) -> None:
    """The policy as it is loaded, with rows of a phase."""
    subject = Subject(ctx, ctx.datasets[phase].batch(0, ctx.config.sft.batch_size), folder)
    for name, body in policy.CHECKS.items():
        report.check(name, body, subject)
    del subject
    free(ctx)


def check_phase(report: Report, ctx: Context, phase: str) -> Iteration | None:
    """A phase's first iteration; None where it has no gradients to compare with."""
    kept: list[Iteration] = []

    def finite() -> Finding:
        kept.append(first_iteration(ctx, phase))
        measure_rounding(kept[0])
        missing = [name for name in kept[0].works if f"{name}/loss" not in kept[0].figures]
        return Finding(len(missing), 0, f"the step of {missing[0]} was skipped" if missing else "")

    if not report.check(f"{phase}: numbers are finite", finite):
        free(ctx)
        return None
    for name, body in phases.checks(ALGORITHMS[phase](ctx.config).stages).items():
        report.check(f"{phase}: {name}", body, kept[0])
    kept[0].works.clear()
    free(ctx)
    return kept[0]


def check_layouts(report: Report, ctx: Context, plan: Plan, iterations: dict[str, Iteration]) -> None:
    """The phases' first iterations on all other meshes of the world, one mesh at a time."""
    world, models = ctx.mesh.world_size, [base.model for base in ctx.bases.values()]
    others = list(layouts.layouts(world, plan.mesh, models))
    given = {
        phase: generated(found.experience, world) if phase in SAMPLING else None for phase, found in iterations.items()
    }
    for mesh in others:
        ctx.mesh.close()
        ctx.mesh = ParallelMesh(mesh, plan.device, 2 * plan.config.timeout.stage)
        for phase, wanted in iterations.items():
            arguments = ctx, phase, wanted, given[phase]
            report.check(f"{phase} on {mesh_text(mesh)}", layouts.same_iteration, *arguments)
            free(ctx)


def free(ctx: Context) -> None:
    """Lets go of the roles and of the memory that they had."""
    ctx.roles = {}
    gc.collect()  # megatron's configuration and its DDP refer to each other
    if ctx.mesh.device.type == "cuda":
        torch.cuda.empty_cache()
