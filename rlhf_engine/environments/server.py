"""The process that has imported `env.fn`, and forks one for each trajectory: small and without threads, as a rank is
not.

It waits for nobody: what a trajectory does not read is kept, and one that takes longer than `env.timeout` is ended.
With each goes what it has started, in its process group. A process whose trajectory has ended well, and left neither
threads nor processes, gets another: a fork costs more than most steps.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config import ConfigError, EnvConfig
from ..rewards.sandbox import end_with_parent
from ..signals import SIGNALS
from . import model
from .contract import Trajectory
from .frames import ACT, ANSWER, ASK, BEGIN, END, FAULT, HEAD, SETUP, TELL, Frames, frame, packed
from .load import load

_SECONDS_TO_CLOSE = 5.0  # of a trajectory that is over and was not busy
_SECONDS_FREE = 60.0  # that a process waits for its next trajectory
_CHILD_SUBREAPER = 36  # of prctl
_ORPHANED = signal.SIGUSR2  # that the rank has ended; none of `SIGNALS`


@dataclass(eq=False)
class _Child:
    """A trajectory's process.

    Args:
        id: of the trajectory.
        doing: "reset" or "step", or "" where it waits for an action.
        due: when it is ended, if it has not answered, closed or got another trajectory before.
        is_over: its trajectory is.
        ended: how it has, when nobody asked it anything.
    """

    id: int
    pid: int
    frames: Frames
    doing: str = ""
    due: float | None = None
    is_over: bool = False
    ended: str | None = None


class Server:
    """Answers the frames of a rank, whose process `parent` is."""

    def __init__(self, rank: Frames, parent: int):
        self._rank, self._parent, self._pid = rank, parent, os.getpid()
        self._config = EnvConfig()
        self._fn: Callable[..., Any] | None = None  # of the config, once it is loaded
        self._children: dict[int, _Child] = {}  # by their trajectories
        self._free: list[_Child] = []
        self._by_pid: dict[int, _Child] = {}  # all that are not reaped
        self._selector = selectors.DefaultSelector()
        self._wake, self._alarm = socket.socketpair()

    def serve(self) -> None:
        """Until the rank has gone, and all trajectories with it."""
        self._selector.register(self._rank, selectors.EVENT_READ, self._obey)
        self._selector.register(self._wake, selectors.EVENT_READ, self._reap)
        is_leaving = False
        while not is_leaving or self._by_pid:
            due = min((child.due for child in self._by_pid.values() if child.due is not None), default=None)
            for key, _ in self._selector.select(None if due is None else max(0.0, due - time.monotonic())):
                key.data()
            self._end_late()
            if not is_leaving and (self._rank.closed or os.getppid() != self._parent):
                is_leaving = True
                self._selector.unregister(self._rank)
                for child in list(self._children.values()):
                    self._dismiss(child)
                for child in self._by_pid.values():
                    child.frames.shut()

    # -- the rank ------------------------------------------------------------------------------------------------

    def _obey(self) -> None:
        self._rank.flush()
        for kind, id, payload in self._rank.receive():
            child = self._children.get(id)
            if kind == SETUP:
                self._set_up(EnvConfig(**json.loads(payload)))
            elif kind == BEGIN and self._fn is not None:
                self._begin(id, payload)
            elif kind == ACT and child is not None:
                self._ask(child, ACT, payload)
            elif kind == TELL and child is not None and child.doing:
                self._send(child, TELL, payload)
            elif kind == END and child is not None:
                self._dismiss(child)
        self._watch(self._rank)

    def _set_up(self, config: EnvConfig) -> None:
        self._config = config
        try:
            self._fn = load(config)
        except ConfigError as error:
            self._tell(FAULT, 0, packed(str(error)))
            return
        sys.stdout.flush()  # or each child would say it again
        gc.collect()
        gc.freeze()  # what is not touched stays shared
        for signum in (signal.SIGCHLD, _ORPHANED, *SIGNALS):  # the latter are the run's to answer
            signal.signal(signum, lambda *args: None)
        self._alarm.setblocking(False)
        self._wake.setblocking(False)
        signal.set_wakeup_fd(self._alarm.fileno(), warn_on_full_buffer=False)
        self._tell(SETUP, 0)

    def _tell(self, kind: bytes, id: int, payload: bytes = b"null") -> None:
        self._rank.send(kind, id, payload)
        self._watch(self._rank)

    def _watch(self, frames: Frames) -> None:
        """Waits for what comes, and where something is unsent for room."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if frames.unsent else 0)
        if frames.fileno() >= 0 and (key := self._selector.get_key(frames)).events != events:
            self._selector.modify(frames, events, key.data)

    # -- trajectories --------------------------------------------------------------------------------------------

    def _begin(self, id: int, row: bytes) -> None:
        if (child := self._free.pop() if self._free else self._forked(id)) is None:
            return
        child.id, child.is_over = id, False
        self._children[id] = child
        self._ask(child, BEGIN, row)

    def _forked(self, id: int) -> _Child | None:
        try:
            ours, theirs = socket.socketpair()
            pid = os.fork()
        except OSError as error:
            self._tell(ANSWER, id, packed({"failure": f"no process could be started: {error.strerror}"}))
            return None
        if pid == 0:
            ours.close()
            self._become(theirs)
        theirs.close()
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # here as there, so that it is done before anybody needs it
        child = self._by_pid[pid] = _Child(id, pid, Frames(ours))
        self._selector.register(child.frames, selectors.EVENT_READ, lambda: self._hear(child))
        return child

    def _become(self, end: socket.socket) -> None:
        """The child's whole life."""
        fn, code = self._fn, 1
        assert fn is not None
        try:
            end_with_parent(self._pid)
            os.setpgid(0, 0)
            ctypes.CDLL(None).prctl(_CHILD_SUBREAPER, 1, 0, 0, 0)  # what it starts stays its own, for `_is_alone`
            signal.set_wakeup_fd(-1)
            for signum in (signal.SIGCHLD, _ORPHANED):
                signal.signal(signum, signal.SIG_DFL)
            self._selector.close()
            for frames in (self._rank, *(child.frames for child in self._by_pid.values())):
                frames.close()
            _live(end, lambda: Trajectory(fn, self._config.args))
            sys.stdout.flush()
            code = 0
        finally:
            os._exit(code)

    def _ask(self, child: _Child, kind: bytes, payload: bytes) -> None:
        if child.ended is not None:
            self._tell(ANSWER, child.id, packed({"failure": child.ended}))
            return
        child.doing = "reset" if kind == BEGIN else "step"
        self._send(child, kind, payload)

    def _send(self, child: _Child, kind: bytes, payload: bytes) -> None:
        child.due = time.monotonic() + self._config.timeout
        child.frames.send(kind, child.id, payload)
        self._watch(child.frames)

    def _hear(self, child: _Child) -> None:
        child.frames.flush()
        try:
            for kind, _, payload in child.frames.receive():
                if kind == END and child.is_over and child.id in self._children:
                    del self._children[child.id]
                    self._free.append(child)
                    child.due = time.monotonic() + _SECONDS_FREE
                elif child.doing and not child.is_over:
                    child.due = None  # what it asks, the model takes its time for
                    child.doing = child.doing if kind == ASK else ""
                    self._tell(ASK if kind == ASK else ANSWER, child.id, payload)
        except ValueError as error:
            line = f"what {child.doing or 'it'} gave is no answer: {error}"
            return self._drop(child) if child.is_over else self._fail(child, line)
        if child.frames.closed:
            self._drop(child) if child in self._free else self._let_go(child)
        else:
            self._watch(child.frames)

    def _dismiss(self, child: _Child) -> None:
        """Its trajectory is over."""
        child.is_over = True
        if child.doing or child.ended is not None:
            self._drop(child)
        else:
            child.due = time.monotonic() + _SECONDS_TO_CLOSE
            child.frames.send(END, child.id)
            self._watch(child.frames)

    def _end_late(self) -> None:
        now = time.monotonic()
        for child in [child for child in self._by_pid.values() if child.due is not None and child.due <= now]:
            if child.is_over:
                self._drop(child)
            else:
                self._fail(child, f"{child.doing} took longer than env.timeout={self._config.timeout:g} s")

    def _fail(self, child: _Child, line: str) -> None:
        self._tell(ANSWER, child.id, packed({"failure": line}))
        self._drop(child)

    def _drop(self, child: _Child) -> None:
        """Ends its process, if it is there, and forgets it."""
        self._children.pop(child.id, None)
        if child in self._free:
            self._free.remove(child)
        child.is_over, child.due = True, None
        self._let_go(child)
        if child.pid in self._by_pid:
            _kill(child.pid)

    def _let_go(self, child: _Child) -> None:
        if child.frames.fileno() >= 0:
            self._selector.unregister(child.frames)
            child.frames.close()

    def _reap(self) -> None:
        """Processes that have ended."""
        with contextlib.suppress(BlockingIOError):
            while self._wake.recv(4096):
                pass
        with contextlib.suppress(ChildProcessError):  # there is none
            while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                child = self._by_pid.pop(found.si_pid, None)
                if child is not None:
                    _kill(child.pid)  # what it has started; its number is taken until the next line
                os.waitpid(found.si_pid, 0)
                if child is not None:
                    self._bury(child, found)

    def _bury(self, child: _Child, found: os.waitid_result) -> None:
        if child.frames.fileno() >= 0:
            self._hear(child)  # what it has said before
        how = f"exit code {found.si_status}"
        if found.si_code != os.CLD_EXITED:
            how = signal.Signals(found.si_status).name
        line = f"{child.doing or 'what it has left running'} ended its process ({how})"
        if child.is_over:
            self._drop(child)
        elif child.doing:
            self._fail(child, line)
        else:
            child.ended = line
            self._let_go(child)


def _kill(pid: int) -> None:
    """A process, with its group."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)


def _live(end: socket.socket, begun: Callable[[], Trajectory]) -> None:
    """Answers a row and then actions, of one trajectory after the other, until nobody asks any more."""
    trajectory = begun()
    with end.makefile("rwb") as pipe:
        model.connect(pipe)
        while head := pipe.read(HEAD.size):
            kind, id, length = HEAD.unpack(head)
            given, answer = json.loads(pipe.read(length)), b"null"
            if kind == END:
                trajectory.close()
                if trajectory.has_failed or not _is_alone():
                    return
                trajectory = begun()
            else:
                answer = trajectory.reset(given) if kind == BEGIN else trajectory.step(given)
            pipe.write(frame(kind, id, answer))
            pipe.flush()
    trajectory.close()


def _is_alone() -> bool:
    """Whether this process has neither other threads nor others that it, or one of these, has started."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return threading.active_count() == 1
    return False


def main() -> None:
    """Of that process, whose arguments are its parent's number and a socket's."""
    parent = int(sys.argv[1])
    end_with_parent(parent, _ORPHANED)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one of each trajectory is open
    Server(Frames(socket.socket(fileno=int(sys.argv[2]))), parent).serve()
