"""Stopping a run from outside, so that the same command goes on from there.

A phase of training notes SIGTERM, SIGUSR1 and SIGINT (Ctrl-C). When the iteration is done the ranks agree to stop if
any of them has noted one, save, and exit with `STOPPED`. A second Ctrl-C ends a rank at once.
"""

from __future__ import annotations

import os
import signal

STOPPED = os.EX_TEMPFAIL  # 75, of sysexits.h: all is saved, start the same command again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_noted = False


def listen() -> None:
    """From now on the signals are noted; before, they end a process as they end any other."""
    for signum in SIGNALS:
        signal.signal(signum, _note)


def noted() -> bool:
    """Whether this process was asked to stop."""
    return _noted


def _note(signum: int, frame: object) -> None:
    global _noted
    _noted = True
    if signum == signal.SIGINT:
        signal.signal(signum, signal.SIG_DFL)  # which acts within a collective as well, where Python does not
