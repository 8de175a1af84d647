"""The ranks of a run as processes: what each is told, and those of one machine, started, watched and ended."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Sequence

from ..signals import STOPPED, RunError, end_with, is_detached

PARENT = "RLHF_ENGINE_PARENT"  # process id of who started this rank and watches it
# Exit codes after which there is nothing to start again: finished, refused, asked to stop, or it would be no better.
FINAL = {0, 2, os.EX_DATAERR, RunError.code, STOPPED, 128 + signal.SIGINT}
_SECONDS_TO_END = 30.0  # between the first rank's exit with STOPPED and the last one's


def environment(rank: int, world_size: int, local_rank: int, local_size: int, address: str, port: int) -> dict:
    """What a rank finds in its environment under any launcher; torchrun sets the same.

    Args:
        local_rank, local_size: among the ranks of its machine.
        address, port: where the ranks meet, on the machine of rank 0.
    """
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """A port for the rendezvous. Below the range that the system deals to outgoing connections, one of which could
    take it while the ranks are still importing."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port


class Ranks:
    """`count` ranks of a run on this machine, the first of them number `first`. They end when this process does.

    Args:
        command: what each of them runs.
        output: file descriptor that they write to; this process's own where it is None.
    """

    def __init__(
        self,
        command: Sequence[str],
        first: int,
        count: int,
        world_size: int,
        address: str,
        port: int,
        output: int | None = None,
    ):
        shared = {
            PARENT: str(os.getpid()),
            "PYTHONWARNINGS": "ignore",
        }
        self.first, self.output = first, output
        self.code, self.deadline = 0, 0.0
        self.processes = [
            subprocess.Popen(
                command,
                env=os.environ | shared | environment(first + i, world_size, i, count, address, port),
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C reaches a rank once: through `send`
            )
            for i in range(count)
        ]

    def send(self, signum: int) -> None:
        """A signal to each of them."""
        for process in self.processes:
            process.send_signal(signum)

    def end(self, code: int) -> None:
        """Has them end, because one here or elsewhere exited with `code`: at once, unless that says that all will."""
        self.code = code
        if code == STOPPED:  # those that are saving go on, and those that have nothing to save do not wait for the one
            self.send(signal.SIGTERM)
        self.deadline = time.monotonic() + (_SECONDS_TO_END if code == STOPPED else 0)

    def poll(self) -> int | None:
        """The exit code of all of them, that of the first to fail, which ends the others; None while one is running."""
        codes = [process.poll() for process in self.processes]
        for i, code in enumerate(codes):
            if code and not self.code:
                self.end(code if code > 0 else 128 - code)
                if code < 0:
                    by = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
                    line = f"rank {self.first + i} was ended by {by}\n"
                    os.write(2 if self.output is None else self.output, line.encode())
        if self.code and time.monotonic() >= self.deadline:
            self.send(signal.SIGKILL)
        return None if None in codes else self.code


def end_with_parent() -> None:
    """Has this rank end when the process that started it does. One that nohup has started, and whom none of our
    launchers watches, stays."""
    if PARENT in os.environ or not is_detached():
        parent = int(os.environ.get(PARENT, os.getppid()))
        end_with(parent, "error: the process that started this rank has ended\n")
