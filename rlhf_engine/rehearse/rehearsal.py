"""A rehearsal as a whole: which ranks, their processes, what they found, and the plan beside it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any
from unittest import mock

from .. import preflight
from ..compose import compose
from ..config import JOBS, ConfigError, LogConfig, RunConfig
from ..plan.partition import num_parameters
from ..ranks import PARENT
from ..signals import STOPPED
from . import shim
from .exchange import Exchange
from .rank import Part

_SMALL_WORLD, _SMALL_MODEL = 8, 50e6  # ranks and parameters of a run that is rehearsed whole, with all that it writes
_FEW_STAGES = 4  # pipeline stages of which a rank each is rehearsed in a larger one


@dataclass
class Found:
    """What was seen.

    Attributes:
        faults: a line each; none where the run would have started, fitted, saved and resumed.
        attempts: of each start of the run, what each rank did.
    """

    plan: preflight.Plan
    world_size: int
    ranks: list[int]
    attempts: list[list[dict[str, Any]]]
    faults: list[str]
    seconds: float


def is_small(plan: preflight.Plan) -> bool:
    sizes = (replace(base.model, vocab_size=base.model.vocab_size or plan.vocab_size) for base in plan.bases.values())
    return plan.world_size <= _SMALL_WORLD and max(num_parameters(model, "lm") for model in sizes) <= _SMALL_MODEL


def chosen(plan: preflight.Plan) -> list[int]:
    """The ranks that are rehearsed, in order.

    Raises:
        ConfigError: there is no such rank.
    """
    world_size, pp, asked = plan.world_size, plan.mesh.pp, plan.config.rehearse.ranks
    if asked is not None:
        ranks = sorted({0, *asked})  # the main rank writes
        if ranks[-1] >= world_size or ranks[0] < 0:
            raise ConfigError(f"rehearse.ranks={asked}: the world has ranks 0 to {world_size - 1}")
        return ranks
    if is_small(plan):
        return list(range(world_size))
    stages = list(range(pp)) if pp <= _FEW_STAGES else [0, 1, pp - 2, pp - 1]
    # of the last stage the last rank: what hangs on the place in the other groups shows there
    return sorted({stage * (world_size // pp) for stage in stages[:-1]} | {0, world_size - 1})


def settle(overrides: Sequence[str], world_size: int, output_dir: str) -> preflight.Plan:
    """The run as it is rehearsed: each phase as many iterations, saved after each."""
    config = compose(overrides)
    config.output_dir, config.rerun, config.device = output_dir, False, "cuda"
    for phase in (config.sft, config.reward, config.ppo):
        phase.iterations = min(phase.iterations, config.rehearse.iterations)
        phase.save_every = 1
    config.log = LogConfig()
    config.timeout.stage = 1e9
    with mock.patch.object(preflight, "num_gpus", lambda: world_size):
        return preflight.plan(config, world_size)


def world_of(config: RunConfig) -> int:
    model_ranks = config.mesh.tp * config.mesh.pp
    return config.plan.world or model_ranks * (config.mesh.dp or 1)


def rehearse(overrides: Sequence[str], patch: str | None = None) -> Found:
    """Runs the ranks of an experiment on devices that are not there.

    Args:
        patch: a module that is imported in each of them first; its `plant` is called.

    Raises:
        ConfigError: the run would be refused before it starts.
    """
    started = time.perf_counter()
    config = compose(overrides)
    if set(config.phases) & JOBS:
        raise ConfigError(f"phases={config.phases} trains nothing, and training is what is rehearsed")
    if config.plan.device in (None, "cpu"):
        overrides = [*overrides, "plan.device=h100"]
    world_size = world_of(config)
    plan = settle(overrides, world_size, config.output_dir)
    ranks = chosen(plan)
    shim.built()
    place = Path(tempfile.mkdtemp(prefix="rehearsal_"))
    found = Found(plan, world_size, ranks, [], [], 0.0)
    last = config.phases[-1]
    is_whole = ranks == list(range(world_size)) and is_small(plan)
    few = plan.config.rehearse.micro_batches or (None if is_whole else plan.mesh.pp + 2)
    try:
        for stops_in in (last, None) if is_whole else (None,):
            codes, reports, faults = _attempt(overrides, ranks, world_size, place, stops_in, is_whole, few)
            found.attempts.append(reports)
            expected = STOPPED if stops_in is not None else 0
            if not faults and set(codes) != {expected}:
                faults = [f"the ranks ended with {codes}, and {expected} was to be expected"]
            found.faults += faults
            if faults:
                break
    finally:
        shutil.rmtree(place, ignore_errors=True)
    found.seconds = time.perf_counter() - started
    return found


def _attempt(
    overrides: Sequence[str],
    ranks: list[int],
    world_size: int,
    place: Path,
    stops_in: str | None,
    writes: bool,
    micro_batches: int | None,
) -> tuple[list[int], list[dict], list[str]]:
    """One start of the run: exit codes, reports, and what is wrong."""
    exchange, processes = Exchange(ranks), []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", PARENT: str(os.getpid())}
    for rank in ranks:
        ours, theirs = Pipe()
        part = Part(
            list(overrides), rank, world_size, ranks, str(place), theirs.fileno(), stops_in, writes, micro_batches
        )
        command = [sys.executable, "-m", "rlhf_engine.rehearse.rank", pickle.dumps(part).hex()]
        log = (place / f"rank_{rank}.log").open("wb")
        processes.append(subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdout=log, stderr=log))
        log.close()
        theirs.close()
        exchange.serve(rank, ours)
    try:
        codes = [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            process.kill()
        raise
    reports, faults = [], []
    for rank, code in zip(ranks, codes, strict=True):
        path = place / f"rank_{rank}.json"
        if not path.is_file():
            tail = (place / f"rank_{rank}.log").read_text(errors="replace").strip().splitlines()[-15:]
            faults.append(f"rank {rank} ended with {code}: " + "\n".join(tail))
            continue
        report = json.loads(path.read_text())
        path.unlink()
        reports.append(report)
        if report["fault"] is not None and not report["is_echo"]:
            faults.append(report["fault"])
    if exchange.fault is not None:
        faults.insert(0, exchange.fault)
    elif not faults and (line := exchange.left_over()) is not None:
        faults.append(line)
    return codes, reports, faults
