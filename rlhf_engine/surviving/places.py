"""Where a run writes: tried before there is any work, and held by one run at a time.

A run holds its `output_dir`, or its `output`, by a file in it that says who it is. The holder renews the file every few
seconds, so that one that has died is known: on its own machine by its process, which is gone, elsewhere by a file that
nobody renews. Times are those of the file system that both see; no clock of a machine is asked. It takes nothing but
creating, renaming and reading files, as NFS and Lustre have it; the system's own locks do not reach every other host.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..config import ConfigError
from ..signals import RunError
from . import durable

LAUNCH, ATTEMPT = "RLHF_ENGINE_LAUNCH", "RLHF_ENGINE_ATTEMPT"  # set by our own launchers
_SECONDS_BETWEEN_BEATS = 10.0
_SECONDS_OF_SILENCE = 60.0  # after which a holder on another host is taken for dead
_SECONDS_BETWEEN_QUESTIONS = 0.1, 2.0  # at first, and in the end
_BYTES_TO_TRY = 4096


def try_folder(folder: Path, key: str) -> None:
    """That files can be written there, by writing one. Leaves nothing, and no folder that was not there before.

    Raises:
        ConfigError: names `key` and what is in the way.
    """
    made: list[Path] = []
    try:
        for path in (*reversed(folder.parents), folder):
            if not path.is_dir():
                path.mkdir()
                made.append(path)
        trial = folder / f".trial-{secrets.token_hex(8)}"
        try:
            with trial.open("xb") as file:
                file.write(bytes(_BYTES_TO_TRY))
                file.flush()
                os.fsync(file.fileno())
        finally:
            trial.unlink(missing_ok=True)
    except FileExistsError as error:
        raise ConfigError(f"{key}: nothing can be written in {folder}: {error.filename} is not a folder") from None
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError(f"{key}: nothing can be written in {folder}: {reason}") from None
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # another run has put something into it
                path.rmdir()


@dataclass(frozen=True)
class Holder:
    """A process that holds a place.

    `machine` is a boot of a machine and a space of process ids in it, `started` when the process began there.
    `attempts` names the launches that it belongs to, and which attempt of each it is.
    """

    host: str
    pid: int
    machine: str
    started: str
    since: str
    attempts: dict[str, int]
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @classmethod
    def this(cls) -> Holder:
        """This process."""
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        return cls(socket.gethostname(), os.getpid(), _machine(), _started(os.getpid()) or "", since, _attempts())

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def is_gone(self, me: Holder) -> bool:
        """Whether that is certain without waiting: an earlier attempt of this run, or a process that is not there."""
        if any(me.attempts.get(launch, 0) > attempt for launch, attempt in self.attempts.items()):
            return True
        return self.is_here(me) and _started(self.pid) != self.started

    def is_here(self, me: Holder) -> bool:
        """Whether it is a process of this machine, which can be asked for."""
        return self.machine == me.machine


class Lock:
    """`path` names who holds a place.

    Args:
        what: the setting that names the place, for messages.
    """

    def __init__(self, path: Path, what: str):
        self.path, self.what, self.me = path, what, Holder.this()
        self._closed = threading.Event()

    def look(self) -> None:
        """Before there is anything to hold it with.

        Raises:
            ConfigError: another run on this machine holds the place.
        """
        found = self._read()
        if found is not None and found.is_here(self.me) and not found.is_gone(self.me):
            raise ConfigError(self._refusal(found))

    def acquire(self) -> Lock:
        """Holds the place until `release`, or the end of this process. Waits while a holder on another host may have
        died.

        Raises:
            ConfigError: another run holds the place.
        """
        durable.make_folder(self.path.parent)
        first: int | None = None
        while not self._create():
            self.look()
            holder, beat, age = self._heard()
            if beat is None:  # it has gone in this moment
                continue
            if self._is_dead(holder, age):
                self._remove(holder)
            elif first is not None and beat > first:
                raise ConfigError(self._refusal(holder))
            else:
                if first is None:
                    left = _SECONDS_OF_SILENCE - age
                    print(f"{self.what} is held by {holder}: waiting up to {left:.0f} s for a sign of it", flush=True)
                first = beat
                time.sleep(_SECONDS_BETWEEN_BEATS / 4)
        self._hold()
        return self

    def acquire_unless(self, is_done: Callable[[], bool]) -> bool:
        """Holds the place for one piece of work, or waits while another process does it.

        Returns:
            Whether this process holds it, and is to do the work.
        """
        durable.make_folder(self.path.parent)
        pause, is_said = _SECONDS_BETWEEN_QUESTIONS[0], False
        while not is_done():
            if self._create():
                self._hold()
                if not is_done():
                    return True
                self.release()
                break
            holder, beat, age = self._heard()
            if beat is not None and self._is_dead(holder, age):
                self._remove(holder)
                continue
            if holder is not None and not is_said:
                print(f"waiting for {self.what} ({holder})", flush=True)
                is_said = True
            time.sleep(pause)
            pause = min(2 * pause, _SECONDS_BETWEEN_QUESTIONS[1])
        return False

    def _hold(self) -> None:
        self._closed.clear()
        threading.Thread(target=self._renew, daemon=True).start()

    def _is_dead(self, holder: Holder | None, age: float) -> bool:
        return age > _SECONDS_OF_SILENCE or (holder is not None and holder.is_gone(self.me))

    def release(self) -> None:
        """Lets the next run in."""
        self._closed.set()
        if self._is_mine():
            self.path.unlink(missing_ok=True)

    def _refusal(self, holder: Holder | None) -> str:
        key, _, value = self.what.partition("=")
        return f"{self.what} is in use by another run ({holder}): wait for its end, or use another {key} than {value}"

    def _create(self) -> bool:
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(asdict(self.me)))
        except FileExistsError:
            return False
        except OSError as error:
            raise ConfigError(f"{self.what}: {self.path} cannot be written: {error.strerror}") from None
        return True

    def _read(self, path: Path | None = None) -> Holder | None:
        """Who holds it; None where nobody does, or somebody who has not yet said who he is."""
        try:
            return Holder(**json.loads((path or self.path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _heard(self) -> tuple[Holder | None, int | None, float]:
        """The holder, when it was last heard of, and the seconds since then, both by the clock of the file system."""
        trial = self.path.with_name(f"{self.path.name}.{self.me.token}")
        try:
            with trial.open("x") as file:
                now = os.fstat(file.fileno()).st_mtime_ns
            trial.unlink()
            with self.path.open() as file:  # which has a network file system ask again
                last = os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None, None, 0.0
        except OSError as error:
            raise ConfigError(f"{self.what}: {error}") from None
        return self._read(), last, (now - last) / 1e9

    def _remove(self, holder: Holder | None) -> None:
        """Takes away what a dead holder has left. Of several that try, one gets the file, and looks once more whose."""
        taken = self.path.with_name(f"{self.path.name}.{self.me.token}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(taken)
            if self._read(taken) != holder and not self.path.exists():  # another run was quicker, and this is its file
                taken.rename(self.path)
            taken.unlink(missing_ok=True)

    def _is_mine(self) -> bool:
        return self._read() == self.me

    def _renew(self) -> None:
        while not self._closed.wait(_SECONDS_BETWEEN_BEATS):
            with contextlib.suppress(OSError):
                if self._is_mine():
                    os.utime(self.path)
                elif (other := self._read()) is not None and not self._closed.is_set():
                    # this process was stopped for so long that it was taken for dead
                    os.write(2, f"error: {self.what} was taken over by another run ({other})\n".encode())
                    os._exit(RunError.code)


def _machine() -> str:
    """This boot of this machine, and the process ids that count here: a container has its own."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process of this machine began, in ticks of this boot; None where there is none, or a dead one."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in "ZX" else rest[18]


def _attempts() -> dict[str, int]:
    """The launches that this process belongs to, as far as launchers say so, and which attempt of each it is."""
    found = {}
    for name, count in (
        (LAUNCH, ATTEMPT),
        ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
        ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
    ):
        value, attempt = os.environ.get(name), os.environ.get(count, "0")
        if value and value != "none":  # torchrun's name for a run without one
            found[f"{name}={value}"] = int(attempt) if attempt.isdecimal() else 0
    return found
