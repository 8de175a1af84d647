"""A rehearsal as a whole: which ranks, their processes, what they found, and the plan beside it."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from ..config import JOBS, ConfigError
from ..launching import preflight
from ..launching.compose import compose
from ..launching.ranks import PARENT
from ..launching.rows import prepare
from ..signals import STOPPED, RunError
from . import shim
from .exchange import Exchange
from .part import Part, chosen, is_small, settle, world_of

_LAST_LINES = 15  # of a rank's output, where it has left nothing else


@dataclass
class Found:
    """What was seen.

    Attributes:
        faults: a line each; none where the run would have started, fitted, saved and resumed.
        attempts: of each start of the run, what each rank did.
    """

    plan: preflight.Plan
    ranks: list[int]
    attempts: list[list[dict[str, Any]]]
    faults: list[str]
    seconds: float


class Ranks:
    """Starts rehearsed ranks, as copies of one process. It ends with this object's `close`, or with this process."""

    def __init__(self) -> None:
        self.door, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", PARENT: str(os.getpid())}
        command = [sys.executable, "-m", "rlhf_engine.rehearse.rank", str(theirs.fileno())]
        self.process = subprocess.Popen(command, env=os.environ | own, pass_fds=[theirs.fileno()])
        theirs.close()

    def run(self, parts: Sequence[Part], exchange: Exchange) -> list[int]:
        """Their exit codes."""
        for part in parts:
            ours, theirs = Pipe()
            socket.send_fds(self.door, [pickle.dumps(part)], [theirs.fileno()])
            theirs.close()
            exchange.serve(part.rank, ours)
        self.door.send(b"codes")
        answer = self.door.recv(1 << 16)
        if not answer:
            raise RunError(f"the process that starts rehearsed ranks has ended with {self.process.wait()}")
        return pickle.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        self.door.close()
        self.process.wait()


def rehearse(overrides: Sequence[str], before: str | None = None, ranks: Ranks | None = None) -> Found:
    """Runs the ranks of an experiment on devices that are not there.

    Args:
        before: `module:function` that each rank calls with its number before it runs.
        ranks: starts them; a fresh one where there is none.

    Raises:
        ConfigError: the run would be refused before it starts.
    """
    started = time.perf_counter()
    config = compose(overrides)
    if set(config.phases) & JOBS:
        raise ConfigError(f"phases={config.phases} trains nothing, and training is what is rehearsed")
    if config.plan.device in (None, "cpu"):
        overrides = [*overrides, "plan.device=h100"]
    world = world_of(config)
    plan = settle(overrides, world, config.output_dir)
    if plan.tokenizer is not None:  # else ranks train one, in a place of their own
        prepare(plan)
    present = chosen(plan)
    shim.built()
    is_whole = present == list(range(world)) and is_small(plan)
    few = plan.config.rehearse.micro_batches or (None if is_whole else plan.mesh.pp + 2)
    found = Found(plan, present, [], [], 0.0)
    starter = ranks or Ranks()
    try:
        with tempfile.TemporaryDirectory(prefix="rehearsal_") as place:
            for stops_in in (config.phases[-1], None) if is_whole else (None,):
                parts = [
                    Part(list(overrides), rank, world, present, place, stops_in, is_whole, few, before)
                    for rank in present
                ]
                _attempt(parts, starter, found)
                if found.faults:
                    break
    finally:
        if ranks is None:
            starter.close()
    found.seconds = time.perf_counter() - started
    return found


def _attempt(parts: Sequence[Part], starter: Ranks, found: Found) -> None:
    """One start of the run: adds what its ranks did, and what is wrong."""
    exchange = Exchange([part.rank for part in parts])
    codes, reports, faults = starter.run(parts, exchange), [], []
    for part, code in zip(parts, codes, strict=True):
        path, log = (Path(part.place, f"rank_{part.rank}.{ending}") for ending in ("json", "log"))
        if path.is_file():
            reports.append(json.loads(path.read_text()))
            path.unlink()
        else:
            tail = log.read_text(errors="replace").strip().splitlines()[-_LAST_LINES:]
            faults.append(f"rank {part.rank} ended with {code}: " + "\n".join(tail))
    faults += [report["fault"] for report in reports if report["fault"] is not None and not report["is_echo"]]
    if exchange.fault is not None:
        faults.append(exchange.fault)
    elif not faults and len(parts) == parts[0].world_size and (line := exchange.left_over()) is not None:
        faults.append(line)  # of a part of the world some messages go to ranks that are not there
    expected = STOPPED if parts[0].stops_in is not None else 0
    if not faults and set(codes) != {expected}:
        faults.append(f"the ranks ended with {codes}, and {expected} was to be expected")
    found.attempts.append(reports)
    found.faults += faults
