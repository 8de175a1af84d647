"""python launch/run.py +exp=NAME [key=value ...]
python launch/run.py xtuner_config=FILE.py [key=value ...]

Hydra composes the configuration; the engine checks it, and this script starts one process per rank unless a
launcher (torchrun, srun, launch/ray/run.py) already did. `plan=true` and `schedule=explain` say what a run would cost
and do, and start nothing.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Callable

from rlhf_engine.config import JOBS, ConfigError
from rlhf_engine.launching.compose import compose
from rlhf_engine.launching.environment import check_meeting, launched_world, num_threads, set_defaults
from rlhf_engine.launching.preflight import Plan, lock, plan
from rlhf_engine.launching.ranks import FINAL, Ranks, end_with_parent, free_port
from rlhf_engine.launching.reference import text
from rlhf_engine.launching.rows import prepare
from rlhf_engine.signals import RunError, answer, ignore, leave_at_once, say_errors_once
from rlhf_engine.surviving.places import ATTEMPT, LAUNCH
from rlhf_engine.xtuner.read import from_command_line

_SECONDS_OF_SILENCE = 5.0  # of a rank that has only an echo of another one's failure to report


def train(checked: Plan) -> int:
    """The phases of a run."""
    from rlhf_engine.trainer import run

    return run(checked)


def start_ranks(world_size: int, argv: list[str], max_restarts: int, script: str = __file__) -> int:
    """Runs a script once per rank on this machine, again when a rank has died, and gives its last exit code."""
    command, asked, code = [sys.executable, script, *argv], False, 0
    os.environ[LAUNCH] = secrets.token_hex(8)
    for left in range(max_restarts, -1, -1):
        os.environ[ATTEMPT] = str(max_restarts - left)
        ranks = Ranks(command, 0, world_size, world_size, "127.0.0.1", free_port())

        def pass_on(signum: int, frame: object, ranks: Ranks = ranks) -> None:
            nonlocal asked
            asked = True
            ranks.send(signum)

        answer(pass_on)
        if asked:  # while nobody was there to be told
            ranks.send(signal.SIGTERM)
        while (found := ranks.poll()) is None:
            time.sleep(0.1)
        code = found
        if code in FINAL or asked:
            break
        if left:
            print(f"exit code {code}: starting again, {left - 1} of max_restarts={max_restarts} left", flush=True)
    return code


def run_rank(checked: Plan, job: Callable[[Plan], int] = train) -> int:
    """This process as one rank of a job; its exit code."""
    import logging
    import warnings

    say_errors_once()
    set_defaults(checked.device, checked.mesh.tp)
    warnings.simplefilter("ignore")  # megatron's, about packages that are optional here
    logging.getLogger("megatron").setLevel(logging.ERROR)
    import torch

    torch.set_num_threads(num_threads())
    try:
        code = job(checked)
    except BaseException as error:
        answer(signal.SIG_DFL)
        refused = isinstance(error, ConfigError | RunError)
        # An error of a collective follows from another rank's end, and a refusal is found by every rank: the first to
        # say it ends the others.
        broken = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if broken or (refused and os.environ["RANK"] != "0"):
            time.sleep(_SECONDS_OF_SILENCE)
        print(f"error: {error}" if refused else traceback.format_exc(), file=sys.stderr, flush=True)
        # at once, and past every destructor: the other ranks may be waiting for this one in a collective
        os._exit(2 if isinstance(error, ConfigError) else getattr(error, "code", 1))
    ignore()
    torch.distributed.destroy_process_group()
    return code


def prepare_first(checked: Plan, is_main: bool = True) -> int | None:
    """The rows of a run, before torch and a process group exist; an exit code where that fails."""
    if set(checked.config.phases) & JOBS:
        return None
    leave_at_once()
    try:
        prepare(checked, is_main)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else error.code
    return None


def say_notes(checked: Plan) -> None:
    """What a user should read before the run starts."""
    for note in checked.notes:
        print(f"note: {note}", flush=True)


def main(
    argv: list[str], job: Callable[[Plan], int] = train, script: str = __file__, about: str | None = __doc__
) -> int:
    """What `script`, whose docstring is `about`, does with a command line."""
    if {"--help", "-h"} & set(argv):
        print(about, text(), sep="\n")
        return 0
    try:
        world_size = launched_world()
    except ConfigError as error:  # of this rank alone, perhaps
        print(f"error: {error}", file=sys.stderr)
        return 2
    is_main = os.environ.get("RANK", "0") == "0"
    if world_size is not None:
        end_with_parent()
        leave_at_once()
    try:
        checked = plan(compose(argv), world_size)
        if checked.config.starts_nothing:
            from rlhf_engine.plan.show import show

            if is_main:
                say_notes(checked)
                show(checked)
            return 0
        if job is not train and set(checked.config.phases) & JOBS:
            raise ConfigError(f"phases={checked.config.phases} trains nothing, and training is what is verified")
        if job is train and is_main:
            lock(checked.config).look()
    except ConfigError as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if world_size is None:
        if (code := prepare_first(checked)) is not None:
            return code
        return start_ranks(checked.world_size, argv, checked.config.max_restarts if job is train else 0, script)
    try:
        check_meeting()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    theirs, _ = from_command_line(argv)
    if is_main:
        if theirs is not None:
            print(theirs.table(), flush=True)
        say_notes(checked)
    code = prepare_first(checked, is_main)
    return run_rank(checked, job) if code is None else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
