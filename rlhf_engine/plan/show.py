"""A forecast and a schedule's decisions, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from rich.console import Console
from rich.table import Table

from ..algorithms import ALGORITHMS
from ..config import ConfigError, MeshConfig, ModelConfig, RunConfig
from ..config.devices import Device
from ..launching.preflight import Plan
from ..schedule import Schedule
from .calibrate import stage_factors
from .forecast import PhaseForecast, StageForecast, forecast, training_phases
from .measure import device_of
from .memory import Memory
from .search import Choice, changed, mesh_text, overrides, remedy, residency, search


def show(plan: Plan) -> None:
    """What `plan=true`, `plan.search=true` and `schedule=explain` ask for.

    Raises:
        ConfigError: the run does not fit, with the smallest change that would; or no mesh of the world does; or it
            trains nothing.
    """
    console = Console()
    console = console if console.is_terminal else Console(width=180)
    config = plan.config
    if not training_phases(config):
        raise ConfigError(f"phases={config.phases} trains nothing: plans are made of {', '.join(ALGORITHMS)}")
    if config.schedule.explain:
        for phase in training_phases(config):
            explain(console, phase, config, plan.mesh)
    if not (config.plan.show or config.plan.search):
        return
    models = plan.models
    device = device_of(config, plan.world_size)
    factors = None
    if config.plan.calibrate:
        factors = stage_factors(plan, device)
        shown = ", ".join(f"{kind} {factor:.2f}" for kind, factor in factors.items())
        console.print(f"measured over planned seconds of a few layers on one rank: {shown}")
    if config.plan.search:
        show_choices(console, search(config, plan.world_size, models, device, factors), plan.world_size, device)
        return
    if changes := residency(config, plan.mesh, models, device, factors):
        text = f"schedule.residency=auto is {overrides(changes)}"
        console.print(text, soft_wrap=True, highlight=False, markup=False)
        config = changed(config, changes)
    found = forecast(config, plan.mesh, models, device, factors)
    for each in found:
        show_phase(console, each, config, plan.mesh)
    if not all(phase.fits for phase in found):
        raise ConfigError(refusal(found, config, plan.mesh, models, device))


def refusal(
    found: list[PhaseForecast], config: RunConfig, mesh: MeshConfig, models: Mapping[str, ModelConfig], device: Device
) -> str:
    """Where a run is too large, and what would make it fit."""
    phase = max(found, key=lambda phase: max(phase.peaks))
    stage, rank, bytes_ = max(
        ((stage, p, memory.total) for stage in phase.moments for p, memory in enumerate(stage.memory)),
        key=lambda entry: entry[2],
    )
    where = f" of pipeline stage {rank}" if mesh.pp > 1 else ""
    text = f"{phase.phase} needs {si(bytes_)}B in {stage.name} on a rank{where}, and {_holds(device)}"
    changes = remedy(config, mesh, models, device)
    return f"{text}: {'it fits with ' + changes if changes else 'no mesh and no device known here has room'}"


# -- tables --------------------------------------------------------------------------------------------------


def show_phase(console: Console, phase: PhaseForecast, config: RunConfig, mesh: MeshConfig) -> None:
    """Prints the tables of a phase."""
    rows, device, peak = phase.rows, phase.device, max(phase.peaks)
    console.print(
        f"[bold]{phase.phase}[/] on {phase.world} x {device.name}, {mesh_text(mesh)}:"
        f" {rows.total} rows an iteration, {rows.steps} optimizer step{'s' * (rows.steps > 1)},"
        f" micro-batches of {rows.usual[0]} x {rows.usual[1]} tokens, recompute {config.schedule.recompute}"
    )
    console.print(_role_table(phase))
    console.print(_stage_table(phase))
    ranks = min(device.node, phase.world)
    console.print(
        f"a save fills {si(phase.copied)}B of host memory for a rank,"
        f" {si(ranks * phase.copied)}B for the {ranks} of a node",
        soft_wrap=True,
    )
    if mesh.pp > 1:
        console.print(f"peak of a rank, by pipeline stage: {'  '.join(map(si, phase.peaks))}", soft_wrap=True)
    iterations = ALGORITHMS[phase.phase](config).iterations
    rate = sum(stage.flops for stage in phase.stages) / phase.world / phase.seconds
    console.print(
        f"{phase.phase} {'fits' if phase.fits else 'does not fit'}: {si(peak)}B at most, and {_holds(device)}."
        f" {iterations} iterations take {_duration(iterations * phase.seconds)}, {si(rate)}FLOP/s a device\n"
    )


def _role_table(phase: PhaseForecast) -> Table:
    table = _table("role", "parameters", "on a rank", "weights", "gradients", "optimizer")
    for role in phase.roles:
        memory = role.memory
        values = role.parameters, role.held.total, memory.weights, memory.gradients, memory.optimizer
        table.add_row(role.name, *map(si, values))
    return table


def _stage_table(phase: PhaseForecast) -> Table:
    """Stages in their order, each with the bytes of its fullest rank, and the sums and greatest of an iteration."""
    groups, kinds = ["tp", "pp", "dp"], [field.name for field in fields(Memory)]
    groups[1:1] = ["ep"] * any(stage.sent.get("ep") for stage in phase.stages)
    kinds = [kind for kind in kinds if kind != "process" or phase.device.base]  # a GPU's memory has none
    sends, holds = [f"{group} sent" for group in groups], [kind.replace("_", " ") for kind in kinds]
    stages = [stage for stage in phase.stages if stage.kind != "local"]
    moves = ["moved"] * any(stage.moved for stage in stages)
    table = _table("stage", "seconds", "FLOPs", "MFU", "idle", *sends, *moves, *holds, "sum")
    flops = sum(stage.flops for stage in stages)
    sent = [sum(stage.sent.get(group, 0.0) for stage in stages) for group in groups]
    most = [max(getattr(memory, kind) for stage in stages for memory in stage.memory) for kind in kinds]
    sent += [sum(stage.moved for stage in stages)] * len(moves)
    totals = map(si, [*sent, *most, max(memory.total for stage in stages for memory in stage.memory)])

    def add(stage: StageForecast) -> None:
        fullest = max(stage.memory, key=lambda memory: memory.total)
        mfu = stage.flops / (stage.seconds * phase.world * phase.device.peak)
        values = [stage.sent.get(group, 0.0) for group in groups] + [stage.moved] * len(moves)
        values += [getattr(fullest, kind) for kind in kinds]
        shares = (f"{mfu:.0%}", f"{stage.idle:.0%}") if stage.flops else ("", "")
        name = stage.name.replace("+", " + ")
        table.add_row(name, si(stage.seconds), si(stage.flops), *shares, *map(si, [*values, fullest.total]))

    for stage in stages:
        add(stage)
    table.add_row("iteration", si(phase.seconds), si(flops), "", "", *totals, style="bold")
    add(phase.save)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def show_choices(console: Console, choices: list[Choice], world: int, device: Device) -> None:
    """The best few of a search.

    Raises:
        ConfigError: there are none.
    """
    if not choices:
        raise ConfigError(f"no mesh of {world} ranks has room: {_holds(device)}, try more ranks (plan.world)")
    console.print(f"fastest meshes of {world} x {device.name}: seconds of an iteration, fullest rank, overrides")
    for choice in choices:
        line = f"{choice.seconds:8.4g}  {si(choice.peak):>6}B  {choice.overrides}"
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def explain(console: Console, phase: str, config: RunConfig, mesh: MeshConfig) -> None:
    """What the schedule of a phase does: which stages run together, and which roles are on the device meanwhile."""
    algorithm = ALGORITHMS[phase](config)
    specs = algorithm.roles()
    offloaded = [name for name in specs if config.schedule.moves(name)]
    groups = Schedule(algorithm.stages, algorithm.provided, specs).groups(config.schedule, mesh.pp, offloaded)
    table = Table(
        "stages", "kind", "at work", "waiting on the device", "comes and leaves", box=None, padding=(0, 2, 0, 0)
    )
    for group in groups:
        at_work = [stage.role for stage in group if stage.role is not None]
        waiting = [name for name in specs if name not in offloaded and name not in at_work]
        come = [name for name in at_work if name in offloaded]
        stages = " + ".join(stage.name for stage in group)
        table.add_row(stages, group[0].kind, *(", ".join(names) for names in (at_work, waiting, come)))
    console.print(f"[bold]{phase}[/] on {mesh_text(mesh)}")
    console.print(table)
    console.print(
        "Stages joined by + share one pipeline.\n" if mesh.pp > 1 else "Without a pipeline (pp 1) none is shared.\n"
    )


# -- units ---------------------------------------------------------------------------------------------------


def si(value: float) -> str:
    """Three digits and a unit of 1,000s: 70.6G."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{unit}" if value < 999.5 * size else f"{value / size:.0f}{unit}"
    return f"{value:.3g}" if value else "-"


def _holds(device: Device) -> str:
    return f"{'a rank here' if device.name == 'cpu' else device.name} has {si(device.memory)}B"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"
