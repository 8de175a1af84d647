"""`python`: an interpreter that keeps its state for a trajectory, isolated and limited as programs of the reward `code`
are."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

from ..config import CodeConfig
from ..rewards.programs import start, try_out
from .tools import ToolEnvironment, schema

_PROGRAM = Path(__file__).with_name("interpreter.py").read_text(encoding="utf-8")
_MOST = 1 << 22  # bytes of an answer
_CALLS = 64  # whose time an interpreter may take of a core; each is also bounded by the clock


class Python(ToolEnvironment):
    """A tool that runs code. An interpreter starts with the first call, and anew where one has ended.

    Args:
        timeout, memory, isolated: see `CodeConfig`.
        max_output: characters of an answer; of more the middle is left out.
        scored: see `ToolEnvironment`.
    """

    tools: ClassVar = [
        schema(
            "python",
            "Runs Python code. What was defined in earlier calls is still there. Gives what is printed, the value of"
            " the last expression, or the error.",
            code=("string", "Python code"),
        )
    ]

    def __init__(
        self,
        timeout: float = CodeConfig.timeout,
        memory: float = CodeConfig.memory,
        isolated: bool = CodeConfig.isolated,
        max_output: int = 4000,
        scored: bool = False,
    ):
        super().__init__(scored)
        self._limits, self._max_output = CodeConfig(timeout, memory, isolated), max_output
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory | None = None

    @classmethod
    def prepare(cls, **args: Any) -> None:
        """Tries whether programs run here."""
        try_out(cls(**args)._limits, "it runs programs", "env.args.isolated")

    def python(self, code: str) -> str:
        """What came of it."""
        until = time.monotonic() + self._limits.timeout
        if self._process is None:
            self._begin()
            if self._line(until) is None:
                return self._gone("did not start")
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):  # which the answer will tell
            self._process.stdin.write(json.dumps(str(code)).encode() + b"\n")
            self._process.stdin.flush()
        line = self._line(until)
        try:
            return str(json.loads(line or "")) or "(nothing was printed)"
        except ValueError:
            late = time.monotonic() >= until
            return self._gone(f"took longer than {self._limits.timeout:g} s" if late else "ended")

    def _begin(self) -> None:
        limits = dataclasses.replace(self._limits, timeout=_CALLS * self._limits.timeout)
        command, job = start(f"{_PROGRAM}\n\nmain({self._max_output})\n", None, limits)
        if not limits.isolated:  # else it has a folder in a memory of its own
            self._folder = self._folder or tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder.name if self._folder is not None else "/",
        )
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(job)
            self._process.stdin.flush()

    def _line(self, until: float) -> str | None:
        """Of the interpreter, or None, if it takes too long or has ended."""
        assert self._process is not None and self._process.stdout is not None
        got, pipe = b"", self._process.stdout
        while len(got) < _MOST and (left := until - time.monotonic()) > 0 and select.select([pipe], [], [], left)[0]:
            part = os.read(pipe.fileno(), 1 << 16)
            got += part
            if not part or got.endswith(b"\n"):
                return got.decode(errors="replace") or None
        return None

    def _gone(self, why: str) -> str:
        self.close()
        return f"error: the interpreter {why}, and what was defined is lost"

    def close(self) -> None:
        """Ends the interpreter, and removes its files."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
