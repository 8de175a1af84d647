"""Environments of many trajectories at once, as the rank sees them. `server` runs them, a process each."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..config import EnvConfig
from ..signals import RunError
from .frames import ACT, ANSWER, ASK, BEGIN, END, FAULT, SETUP, TELL, Frames, packed

_LONGEST_LINE = 500
_SECONDS_TO_LEAVE = 15.0  # of the server, for its trajectories' `close`


@dataclass(frozen=True)
class Answer:
    """What an environment says.

    Args:
        number: of the trajectory.
        messages: of a reset the prompt, of a step what is observed; none where the trajectory is over.
        info: numbers of the environment's `info`.
        tools: of a reset, JSON schemas that the environment offers.
        failure: what went wrong, in a line; the trajectory is over.
        asks: messages that the model of `user.path` is to go on behind; there is no answer before it is told.
    """

    number: int
    messages: list[dict[str, Any]] = field(default_factory=list)
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: dict[str, float] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    failure: str | None = None
    asks: list[dict[str, Any]] | None = None


class Environments:
    """`env.fn` for each trajectory, in a process of its own that ends with it. They are forked from one small process,
    which has imported the module once and ends with the thread that has made this object, and all others with it.

    Nothing here waits for an environment but `answers`.
    """

    def __init__(self, config: EnvConfig):
        self.config = config
        ours, theirs = socket.socketpair()
        with theirs:
            command = f"from {__package__}.server import main; main()"
            self._process = subprocess.Popen(
                [sys.executable, "-c", command, str(os.getpid()), str(theirs.fileno())],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C is the run's to answer
            )
        self._server = Frames(ours)
        self._ids = itertools.count()
        self._id_of: dict[int, int] = {}  # by the trajectory's number: what names it once and for all
        self._calls: dict[int, int] = {}  # numbers of those that are asked something, by their id
        self._asking = set[int]()  # ids of those among them that ask, and are not told yet
        self._is_ready, self._found = False, list[Answer]()
        self._server.send(SETUP, 0, packed(asdict(config)))

    def begin(self, number: int, row: Mapping[str, Any]) -> None:
        """Has an environment made, and reset with a row: a JSON object of its `messages`, its `seed` and its fields."""
        if number in self._id_of:
            raise ValueError(f"trajectory {number} has begun already")
        self._id_of[number] = next(self._ids)
        self._ask(BEGIN, number, row)

    def act(self, number: int, action: Mapping[str, Any]) -> None:
        """Has it step, with a message of the assistant."""
        self._ask(ACT, number, action)

    def _ask(self, kind: bytes, number: int, value: Mapping[str, Any]) -> None:
        id = self._id_of[number]
        self._calls[id] = number
        self._server.send(kind, id, packed(value))

    def tell(self, number: int, text: str) -> None:
        """What the model has said to one that asks."""
        id = self._id_of[number]
        self._asking.discard(id)
        self._server.send(TELL, id, packed(text))

    def answers(self, timeout: float | None) -> list[Answer]:
        """All that came since, of calls that failed or took longer than `env.timeout` too.

        Args:
            timeout: seconds to wait for the first; None: for ever; 0: not at all. Where nothing is asked, and all of
                those who are asked ask themselves, nobody waits.

        Raises:
            RunError: there is no such environment, or the process that starts all others has ended.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout
        self._hear(0)
        while len(self._calls) > len(self._asking) and not self._found and (left := until - time.monotonic()) > 0:
            self._hear(left)
        found, self._found = self._found, []
        return found

    def wait(self) -> None:
        """Until the module is imported.

        Raises:
            RunError: as above.
        """
        while not self._is_ready:
            self._hear(math.inf)

    def _hear(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self._server, select.POLLIN | (select.POLLOUT if self._server.unsent else 0))
        poll.poll(None if seconds == math.inf else 1000 * seconds)
        self._server.flush()
        for kind, id, payload in self._server.receive():
            if kind == FAULT:
                raise RunError(json.loads(payload))
            self._is_ready = self._is_ready or kind == SETUP
            if kind in (ANSWER, ASK) and (number := self._calls.get(id)) is not None:
                self._found.append(answer := self._answer(number, payload))
                if answer.asks is not None:
                    self._asking.add(id)
                    continue
                del self._calls[id]
                self._asking.discard(id)
        if self._server.closed:
            code = self._process.wait()
            raise RunError(f"the process that starts env.fn={self.config.fn} for all has ended (exit code {code})")

    def _answer(self, number: int, payload: bytes) -> Answer:
        try:
            found = Answer(number, **json.loads(payload))
        except (ValueError, TypeError):  # it has written into what is not its own
            found = Answer(number, failure="what came is no answer")
        if found.failure is None:
            return found
        line = " ".join(f"env.fn={self.config.fn}: {found.failure}".split())
        return Answer(number, failure=line[:_LONGEST_LINE])

    def end(self, number: int) -> None:
        """The trajectory is over, whatever it is doing: what waits for an action may `close`, all else is ended."""
        id = self._id_of.pop(number)
        self._calls.pop(id, None)
        self._asking.discard(id)
        self._found = [answer for answer in self._found if answer.number != number]
        self._server.send(END, id)

    def close(self) -> None:
        """Ends all, with what they have started."""
        for number in list(self._id_of):
            self.end(number)
        self._server.shut()
        self._server.close()
        try:
            self._process.wait(_SECONDS_TO_LEAVE)
        except subprocess.TimeoutExpired:  # it imports a module that does not end
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
