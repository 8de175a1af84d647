"""One rehearsed rank: a process in which the run's own code finds a GPU and the ranks beside it."""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from . import shim


@dataclass(frozen=True)
class Part:
    """What a rank is told.

    Args:
        overrides: of the command line.
        place: folder of the rehearsal; what the run writes goes to `run` in it.
        stops_in: the phase whose first iteration ends with a request to stop; None where the run goes to its end.
        writes: whether checkpoints and exports are small enough to be written.
        micro_batches: of each role in a pass, at most.
    """

    overrides: list[str]
    rank: int
    world_size: int
    present: list[int]
    place: str
    line: int
    stops_in: str | None
    writes: bool
    micro_batches: int | None


def main(part: Part) -> int:
    """Rehearses the rank; writes what it did to `rank_N.json`, or what is wrong. The exit code of the run."""
    from ..ranks import end_with_parent, environment

    end_with_parent()
    os.environ |= environment(part.rank, part.world_size, part.rank % 8, min(8, part.world_size), "127.0.0.1", 1)
    shim.load()
    faulthandler.register(signal.SIGUSR2)
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    import torch

    from .. import preflight
    from ..config import ConfigError
    from ..plan.measure import device_of
    from ..signals import RunError
    from . import cuda, wire
    from .device import FakeGPU
    from .rehearsal import settle
    from .stand_ins import stand_in

    torch.set_num_threads(1)
    preflight.check_reward = lambda *args: None  # who started this has looked, in the run's own folder
    checked = settle(part.overrides, part.world_size, str(Path(part.place) / "run"))
    device = device_of(checked.config, part.world_size)
    gpu = FakeGPU(device.memory, device.name, part.rank, part.writes)
    cuda.install(gpu, device)
    per_stage = part.world_size // checked.mesh.pp
    line = wire.Wire(gpu, part.rank, part.present, lambda rank: rank // per_stage, Connection(part.line))
    wire.install(line, part.rank, part.world_size)
    stand_in(gpu, part, checked)
    from ..trainer import run

    fault, code, is_echo = None, 1, False
    try:
        with gpu:
            code = run(checked)
    except (ConfigError, RunError) as error:
        fault, is_echo = str(error), isinstance(error, wire.Unanswered)
    except BaseException:
        fault = traceback.format_exc()
    found: dict[str, Any] = {
        "rank": part.rank,
        "fault": fault,
        "is_echo": is_echo,
        "assumed": gpu.assumed,
        "stages": [vars(stage) for stage in gpu.stages],
    }
    Path(part.place, f"rank_{part.rank}.json").write_text(json.dumps(found))
    line.connection.close()
    sys.stdout.flush()
    os._exit(code if fault is None else 1)  # past the destructors of groups that have no backend


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main(pickle.loads(bytes.fromhex(sys.argv[1])))
