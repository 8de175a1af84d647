"""Processes that call functions with one sample at a time, so that a call that takes too long can be ended.

Each runs `main`, and ends with the process that has started it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from ..config import RunConfig
from ..signals import SIGNALS, RunError
from .built_in import LATE
from .functions import Numbers, Part, Sample, load
from .sandbox import end_with_parent


class Late(RunError):
    """A call that took too long."""


class Pool:
    """`reward.processes` of them, or one for each core of this rank. Each is served by a thread of this process, which
    starts it at its first call.

    Args:
        parts: those of `reward.fns`; the processes import the ones alone that are to be called there.
    """

    def __init__(self, config: RunConfig, parts: Sequence[Part]):
        fns = [text for text, part in zip(config.reward.fns, parts, strict=True) if part.apart]
        self.config = replace(config, reward=replace(config.reward, fns=fns))
        self.names = [part.name for part in parts if part.apart]
        self._calls: queue.SimpleQueue[tuple[Future[Numbers], int, Sample]] = queue.SimpleQueue()
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        for _ in range(config.reward.processes or max(1, cores)):
            threading.Thread(target=self._serve, daemon=True).start()

    def submit(self, part: int, sample: Sample) -> Future[Numbers]:
        """A call of the function of that number among those."""
        future: Future[Numbers] = Future()
        self._calls.put((future, part, sample))
        return future

    def _serve(self) -> None:
        worker: _Worker | None = None
        while True:
            future, part, sample = self._calls.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                worker = worker or _Worker(self.config)
                future.set_result(worker.call(part, self.names[part], sample))
            except Exception as error:
                if worker is not None:
                    worker.end()
                    worker = None
                if isinstance(error, Late) and self.names[part] in LATE:
                    future.set_result([LATE[self.names[part]]])
                else:
                    future.set_exception(error)


class _Worker:
    def __init__(self, config: RunConfig):
        self.timeout = config.reward.timeout
        self._pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import main; main()", str(os.getpid()), str(theirs.fileno())],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C is the run's to answer
            )
        self._pipe.send(config)
        with contextlib.suppress(EOFError, ConnectionError):  # which the first call will find
            self._pipe.recv()

    def call(self, part: int, name: str, sample: Sample) -> Numbers:
        """What the function of that number and name gives for a sample.

        Raises:
            Late: it took too long.
            RunError: it raised an error, whose traceback it has printed, ended its process or gave no number.
        """
        said = f"the response {sample.response!r:.80}"
        try:
            self._pipe.send((part, sample))
            if not self._pipe.poll(self.timeout):
                raise Late(f"reward.fns={name} took longer than reward.timeout={self.timeout:g} s for {said}")
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            code = self._process.wait()
            raise RunError(f"reward.fns={name} ended its process (exit code {code}) for {said}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        """With what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def serve(pipe: Connection) -> None:
    """Answers each call with numbers, or with what is to be raised."""
    parts = load(pipe.recv())
    pipe.send(None)
    while True:
        part, sample = pipe.recv()
        try:
            pipe.send(parts[part]([sample]))
        except RunError as error:
            pipe.send(error)
        except Exception as error:
            traceback.print_exc()
            pipe.send(RunError(f"{error.__notes__[-1]}: {type(error).__name__}: {error}"))


def main() -> None:
    """Of such a process, whose arguments are its parent's number and a pipe's."""
    end_with_parent(int(sys.argv[1]))
    for signum in SIGNALS:  # the run's to answer; by a handler, because what is ignored stays so in what is started
        signal.signal(signum, lambda *args: None)
    with contextlib.suppress(EOFError):
        serve(Connection(int(sys.argv[2])))
