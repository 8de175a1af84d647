"""What a rehearsal found, as a table beside the plan's figures and as `rehearsal.json`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..launching.preflight import Plan
from ..plan.forecast import forecast
from ..plan.measure import device_of
from ..plan.search import changed, mesh_text, residency
from ..plan.show import si
from .ledger import KINDS
from .rehearsal import Found


@dataclass(frozen=True)
class Line:
    """A stage of the last iteration in which it was rehearsed.

    Args:
        peak: bytes of the fullest rank by kind, at its fullest moment.
        planned: bytes that the plan has for a rank of that pipeline stage; None of what it does not plan.
        sent, planned_sent: bytes of one rank over each group, the plan's of an iteration.
        moved, planned_moved: bytes of one rank between the device and the memory beside it, likewise.
        step: see `Stage`.
    """

    phase: str
    stage: str
    rank: int
    peak: dict[str, int]
    host: int
    planned: float | None
    waits: Counter[str]
    sent: Counter[str]
    planned_sent: dict[str, float]
    moved: int
    planned_moved: float
    collectives: Counter[str]
    kernels: int
    launches: Counter[str]
    captures: int
    replays: int
    step: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return sum(self.peak.values())


def lines(found: Found) -> list[Line]:
    """Each stage as the rank had it that needed most."""
    planned = _planned(found.plan)
    per_stage = found.plan.world_size // found.plan.mesh.pp
    best: dict[tuple[str, str], Line] = {}
    for report in (report for attempt in found.attempts for report in attempt):
        latest: dict[tuple[str, str], dict[str, Any]] = {}
        for stage in report["stages"]:
            name = re.sub(rf" (of|behind|within) (iteration \d+|{stage['phase'] or '-'})$", "", stage["name"])
            latest[stage["phase"], name] = stage  # a later iteration needs what the first left besides
        for (phase, name), stage in latest.items():
            at = report["rank"] // per_stage
            memory, sent, moved = planned.get((phase, name), (None, {}, 0.0))
            line = Line(
                phase, name, report["rank"], stage["peak"], stage["host"], memory[at] if memory else None,
                Counter(stage["waits"]), Counter(stage["sent"]), sent, stage["moved"], moved,
                Counter(stage["collectives"]), stage["kernels"], Counter(stage["launches"]), stage["captures"],
                stage["replays"], stage["step"],
            )  # fmt: skip
            if (phase, name) not in best or line.total > best[phase, name].total:
                best[phase, name] = line
    return list(best.values())


def _planned(plan: Plan) -> dict[tuple[str, str], tuple[list[float], dict[str, float], float]]:
    """Bytes of a rank of each pipeline stage, sent over each group, and moved, of each stage of the run."""
    device = device_of(plan.config, plan.world_size)
    config = changed(plan.config, residency(plan.config, plan.mesh, plan.models, device))
    found = {}
    for phase in forecast(config, plan.mesh, plan.models, device):
        for stage in phase.moments:
            name = "the save" if stage is phase.save else stage.name
            found[phase.phase, name] = [memory.total for memory in stage.memory], dict(stage.sent), stage.moved
    return found


def show(found: Found, overrides: Sequence[str]) -> None:
    """Prints the table, what was assumed, and what is wrong."""
    plan, console = found.plan, Console()
    console = console if console.is_terminal else Console(width=200)
    device = device_of(plan.config, plan.world_size)
    ranks = "all ranks" if len(found.ranks) == found.plan.world_size else f"ranks {', '.join(map(str, found.ranks))}"
    console.print(
        f"{escape(' '.join(overrides))}: {ranks} of {found.plan.world_size} x {device.name}, {mesh_text(plan.mesh)},"
        f" rehearsed in {found.seconds:.0f} s",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("stage")
    columns = [
        "rank",
        "peak",
        "plan",
        "off",
        *(kind.replace("_", " ") for kind in KINDS),
        "host",
        "moved",
        "waits",
        "kernels",
        "a step",
        "sent",
    ]
    for name in columns:
        table.add_column(name, justify="right")
    phase = ""
    for line in lines(found):
        if line.phase != phase:
            phase = line.phase
            table.add_row(phase, style="bold")
        off = f"{line.total / line.planned - 1:+.1%}" if line.planned else ""
        step = f"{line.step['launches']} {line.step['waits']}w" if line.step else ""
        sent = " ".join(f"{group} {si(size)}" for group, size in sorted(line.sent.items()) if size)
        table.add_row(
            f"  {line.stage}", str(line.rank), si(line.total), si(line.planned or 0), off,
            *(si(line.peak.get(kind, 0)) for kind in KINDS), si(line.host), si(line.moved),
            str(sum(line.waits.values())), si(line.kernels), step, sent,
        )  # fmt: skip
    console.print(table)
    assumed: Counter[str] = Counter()
    for report in (report for attempt in found.attempts for report in attempt):
        assumed.update(report["assumed"])
    if assumed:
        console.print(
            f"floats would have decided {sum(assumed.values())} times, at {len(assumed)} places: what was assumed there"
            " is in rehearsal.json",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    for fault in found.faults:
        console.print(f"[bold red]refused[/]: {escape(fault)}", soft_wrap=True, highlight=False)
    if not found.faults:
        done = "starts, fits, saves, stops, resumes and exports" if len(found.attempts) > 1 else "starts and fits"
        console.print(f"the run {done}", highlight=False)


def write(found: Found, overrides: Sequence[str], path: Path) -> None:
    """`rehearsal.json`: the lines of the table, and everything that every rank did."""
    table = [vars(line) | {"total": line.total} for line in lines(found)]
    about = {
        "overrides": list(overrides), "device": device_of(found.plan.config, found.plan.world_size).name,
        "world": found.plan.world_size,
        "ranks": found.ranks, "seconds": found.seconds, "faults": found.faults, "stages": table,
        "attempts": found.attempts,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about, indent=1))
