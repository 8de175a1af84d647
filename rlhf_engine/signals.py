"""Stopping a run from outside, so that the same command goes on from there.

SIGTERM, SIGUSR1, SIGINT (Ctrl-C) and SIGHUP (a lost connection) end a rank with the exit code `STOPPED`. While it
trains it notes them instead: behind each update and each stage the ranks agree to stop if any of them has noted one,
save, and exit with that code. A second Ctrl-C ends a rank at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

STOPPED = os.EX_TEMPFAIL  # 75, of sysexits.h: nothing that was saved is lost, start the same command again
_SECONDS_BETWEEN_LOOKS = 0.2  # whether the parent is there
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

_noted = False
_last_acts: list[Callable[[], None]] = []


def say_errors_once() -> None:
    """Keeps Python 3.13 from telling of a file that a failed write has closed once more, when its object goes, and any
    Python of an error in TensorBoard's thread, which its next caller gets."""

    def quiet(usual: Callable[[Any], Any]) -> Callable[[Any], None]:
        def hook(what: Any) -> None:
            is_closed = isinstance(what.exc_value, ValueError) and "closed file" in str(what.exc_value)
            if not is_closed and not type(getattr(what, "thread", None)).__module__.startswith("tensorboard."):
                usual(what)

        return hook

    sys.unraisablehook, threading.excepthook = quiet(sys.unraisablehook), quiet(threading.excepthook)


class Stop(Exception):
    """The run was asked to stop, and is at a point from which it can go on."""


class RunError(RuntimeError):
    """A run that cannot go on, in one line for its user."""

    code = os.EX_UNAVAILABLE  # 69: that the process exits with


def answer(how: Callable[[int, object], None] | signal.Handlers) -> None:
    """What this process does from now on when it is asked to stop. Under nohup a lost connection asks for nothing."""

    def heard(signum: int, frame: object) -> None:
        if signum == signal.SIGHUP:
            _fall_silent()
        how(signum, frame)  # type: ignore[operator]

    for signum in SIGNALS:
        if signum != signal.SIGHUP or not is_detached():
            signal.signal(signum, heard if callable(how) else how)


def is_detached() -> bool:
    """Whether nohup has started this process."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def _fall_silent() -> None:
    """What goes to a terminal or a pipe goes nowhere from now on: nobody is there, and an error would end the run."""
    for descriptor in (1, 2):
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def leave_at_once() -> None:
    """From now on a signal ends this process, as does one that was noted: there is nothing to save."""
    if _noted:
        _leave()
    answer(lambda signum, frame: _leave())


def before_leaving(act: Callable[[], None]) -> None:
    """Has a signal that ends this process do this first; what was asked for last comes first."""
    _last_acts.insert(0, act)


def _leave() -> None:
    for act in _last_acts:
        act()
    os._exit(STOPPED)


def take_note() -> None:
    """From now on a signal is noted."""
    answer(_note)


def end_with(parent: int, words: str) -> None:
    """Has this process end, with such words, when its parent does, however that happens.

    Linux's own PR_SET_PDEATHSIG would also act when one thread of the parent ends.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        with contextlib.suppress(OSError):
            os.write(2, words.encode())
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def ignore() -> None:
    """From now on a signal changes nothing: this process is about to exit with a code of its own. Python gives every
    other answer back to the system when it ends, and a late signal would then be the end that is seen."""
    answer(signal.SIG_IGN)


def noted() -> bool:
    """Whether this process was asked to stop."""
    return _noted


def _note(signum: int, frame: object) -> None:
    global _noted
    _noted = True
    if signum == signal.SIGINT:
        signal.signal(signum, signal.SIG_DFL)  # which acts within a collective as well, where Python does not
