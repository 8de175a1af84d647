"""Python that starts warm: commands and ranks as forks of a server that has imported torch, megatron and the engine.

A fresh interpreter spends 4 s of processor time on these imports, a launcher of two ranks 8, and the tests start
hundreds. What is about the start of an interpreter itself (other launchers, what is imported when) uses `subprocess`
instead.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
HERE = Path(__file__).resolve().parent


def start_server() -> None:
    """The server of this process, once; it ends with this process. Its environment is the same for every test."""
    CONTEXT.set_forkserver_preload(["preload"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a driver that was started does not survive a fork
        forkserver.ensure_running()


def process(target, args: tuple, daemon: bool = False):
    """A process that runs `target(*args)`, started warm."""
    start_server()
    started = CONTEXT.Process(target=target, args=args, daemon=daemon)
    started.start()
    return started


class Command:
    """`python ...`, started warm, to be used like a subprocess.Popen. It leads a session of its own.

    Args:
        command: sys.executable, then a script or `-c` and code, then their arguments.
        stdout, stderr: files that are written to; both may be the same.
        env, cwd: this process's own where they are None.
    """

    def __init__(
        self,
        command: Sequence[str],
        stdout: Path | str = os.devnull,
        stderr: Path | str = os.devnull,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ):
        assert command[0] == sys.executable
        self.args = [str(word) for word in command]
        env, cwd = dict(os.environ if env is None else env), str(cwd or Path.cwd())
        self._process = process(_command, (self.args, env, cwd, str(stdout), str(stderr)))
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    command: Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = False,
    timeout: float = 300,
) -> subprocess.CompletedProcess:
    """subprocess.run with captured text, started warm."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        started = Command(command, out, err, env, cwd)
        try:
            code = started.wait(timeout)
        finally:
            started.kill()
        result = subprocess.CompletedProcess(started.args, code, out.read_text(), err.read_text())
    assert not check or code == 0, result.stdout + result.stderr
    return result


# -- in the process that was started ---------------------------------------------------------------------------


def _command(command: list[str], env: dict[str, str], cwd: str, stdout: str, stderr: str) -> None:
    assert hasattr(sys.modules.get("preload"), "READY"), "tests/preload.py cannot be imported"
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where these tests run under nohup
    os.chdir(cwd)
    for number, path in ((1, stdout), (2, stderr)):
        # for reading too, or a terminal would not be this session's
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    from rlhf_engine.launching import ranks

    # the ranks that a launcher starts are forks of it
    ranks.subprocess = types.SimpleNamespace(**vars(subprocess) | {"Popen": _Fork})  # type: ignore[assignment]
    os._exit(_interpret(command, env))


def _interpret(command: list[str], env: Mapping[str, str]) -> int:
    """What the interpreter does with a command line; the exit code."""
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    try:
        if command[1] == "-c":
            sys.argv = ["-c", *command[3:]]
            exec(compile(command[2], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = command[1:]
            sys.path.insert(0, str(Path(command[1]).resolve().parent))
            runpy.run_path(command[1], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


class _Fork:
    """What rlhf_engine.launching.ranks needs of subprocess.Popen, as a fork of this process."""

    def __init__(self, command: Sequence[str], *, env, stdout=None, stderr=None, start_new_session: bool = False):
        sys.stdout.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
                signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
            Path("/proc/self/comm").write_text(f"rank {env['RANK']}")  # its environment cannot be seen from outside
            if start_new_session:
                os.setsid()
            for number, file in ((1, stdout), (2, stderr)):
                if file is not None:
                    os.dup2(file, number)
            os._exit(_interpret(list(command), env))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)
