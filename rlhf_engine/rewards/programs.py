"""Programs that responses contain, run on the tests of their rows."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from ..config import CodeConfig, ConfigError, RunConfig
from . import sandbox

_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a thread more is memory more


class OutOfTime(Exception):
    """Of a program."""


def code(config: RunConfig) -> Callable[..., list[float]]:
    """The share of a row's `tests` that the last fenced block of the response passes, or the whole response.

    Tests are Python code, or a list of it, that raises nothing where the program is right; or inputs and outputs,
    `{"inputs": [text, …], "outputs": [text, …]}`, whose words are compared. Each runs in a process of its own; behind
    one that runs out of time the others count as failed.
    """
    limits = config.reward.code

    def code(responses: Sequence[str], tests: Sequence[Any]) -> list[float]:
        return [_share(program(said), read_tests(given), limits) for said, given in zip(responses, tests, strict=True)]

    return code


def program(response: str) -> str:
    """What is to be run of a response."""
    return [response, *_FENCED.findall(response)][-1]


def read_tests(tests: Any) -> list[str] | list[tuple[str, str]]:
    """A row's tests, as code or as pairs of an input and its output.

    Raises:
        ValueError: they are neither.
    """
    with contextlib.suppress(ValueError, TypeError):  # else a text of JSON would be a program that passes
        tests = json.loads(tests)
    if isinstance(tests, dict) and tests.keys() >= {"inputs", "outputs"}:
        tests = list(zip(map(str, tests["inputs"]), map(str, tests["outputs"]), strict=True))
    tests = [tests] if isinstance(tests, str) else tests
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str | tuple) for test in tests):
        raise ValueError(f"'tests' is code, a list of it, or {{'inputs': […], 'outputs': […]}}, not {tests!r:.80}")
    return tests


def _share(source: str, tests: Sequence[str | tuple[str, str]], limits: CodeConfig) -> float:
    passed = 0
    with contextlib.suppress(OutOfTime):
        for test in tests:
            passed += _passes(source, test, limits)
    return passed / len(tests)


def _passes(source: str, test: str | tuple[str, str], limits: CodeConfig) -> bool:
    if isinstance(test, tuple):
        status, output = run(source, test[0], limits)
        return status == 0 and output.split() == test[1].split()
    # a program that only leaves in time has not passed: the word must come from behind the test
    word = secrets.token_hex(16)
    whole = "of = {'__name__': 'program'}\n" + "".join(f"exec({part!r}, of)\n" for part in (source, test))
    status, output = run(f"{whole}print({word!r})", "", limits)
    return status == 0 and output.split()[-1:] == [word]


def start(source: str, given: str | None, limits: CodeConfig) -> tuple[list[str], bytes]:
    """What starts a program, in an empty folder, and what that is told first by its stdin.

    Args:
        given: the program's stdin; None: what is written behind that, when the program has said something.
    """
    prefixes = [sys.prefix, sys.base_prefix]
    prefixes += [os.path.realpath(prefix) for prefix in prefixes]  # a link is put there as one
    job = {
        "program": source, "stdin": given, "isolated": limits.isolated, "timeout": limits.timeout,
        "memory": int(limits.memory * 2**30), "prefixes": prefixes, "environment": _ONE_THREAD,
    }  # fmt: skip
    command = [sys.executable, "-I", "-S", sandbox.__file__, str(os.getpid())]
    return command, json.dumps(job).encode() + b"\n"


def run(source: str, given: str, limits: CodeConfig) -> tuple[int, str]:
    """Exit code and output of a program.

    Raises:
        OutOfTime: it was ended.
    """
    command, job = start(source, given, limits)
    with tempfile.TemporaryFile() as output, tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.DEVNULL, cwd=folder, start_new_session=True
        )
        try:
            process.communicate(job, limits.timeout)
        except subprocess.TimeoutExpired:
            raise OutOfTime from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return process.returncode, output.read().decode(errors="replace")


def try_out(limits: CodeConfig, what: str = "reward.fns=code", key: str = "reward.code.isolated") -> None:
    """Runs a program of one line.

    Args:
        what: asks for it.
        key: of `limits.isolated` there.

    Raises:
        ConfigError: this system cannot.
    """
    try:
        status, output = run("print(1)", "", limits)
    except OutOfTime:
        status, output = 1, "out of time"
    if (status, output) != (0, "1\n"):
        raise ConfigError(
            f"{what}: programs do not run isolated here ({output.strip() or f'exit code {status}'}): allow"
            f" namespaces (docs/rewards.md), or {key}=false leaves them files and network"
        )
