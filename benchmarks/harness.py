"""What all benchmarks share: sides that take turns, medians, worlds of ranks, rows of benchmarks/results/NAME.csv."""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import gc
import importlib.metadata
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from rlhf_engine.launching.ranks import environment, free_port

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CONTEXT: Any = multiprocessing.get_context("spawn")
Side = TypeVar("Side", bound=Hashable)


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


# -- sides ---------------------------------------------------------------------------------------------------


def take_turns(sides: Mapping[Side, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[Side, list[Any]]:
    """What each side returns, `rounds` times. The sides take turns, so that a load of the machine meets all of them,
    and the first `warm_up` turns do not count."""
    found: dict[Side, list[Any]] = {side: [] for side in sides}
    for _ in range(warm_up + rounds):
        for side, run in sides.items():
            found[side].append(run())
    return {side: samples[warm_up:] for side, samples in found.items()}


def medians(samples: Sequence[Sequence[float]]) -> list[float]:
    """The median of each column."""
    return [statistics.median(column) for column in zip(*samples, strict=True)]


def seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """How long it takes, by the clock of the device."""
    gc.collect()
    if device == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def peak() -> int:
    """The most bytes of resident memory that this process has had since `reset_peak`, or ever (Linux)."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def reset_peak() -> int:
    """The bytes that it has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def launched(*settings: str) -> str:
    """What a whole run prints, of one thread a rank.

    Raises:
        SystemExit: it has failed.
    """
    command = [sys.executable, "launch/run.py", *settings]
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=ROOT, env=one, capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"{' '.join(command)}\n{found.stdout}{found.stderr}")
    return found.stdout


# -- ranks ---------------------------------------------------------------------------------------------------


class World:
    """`size` new processes, the ranks of a world, that run `function(pipe, *args)`; behind the context all have ended.

    Args:
        function: of a module's top level. The pipe leads to this process.
        threads: of each rank.

    Raises:
        SystemExit: a rank has failed, with its traceback, or has died. The others, which may wait for it, are ended.
    """

    _open: ClassVar[dict[connection.Connection, tuple[World, int]]] = {}  # pipes of all worlds, and to which rank

    def __init__(self, function: Callable[..., Any], *args: Any, size: int = 1, threads: int = 1):
        os.environ["OMP_NUM_THREADS"] = str(threads)  # which a rank finds before it imports torch
        self.pipes, self.processes, self.heard = [], [], [[] for _ in range(size)]
        port = free_port()
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            about = environment(rank, size, rank, size, "127.0.0.1", port)
            self.processes.append(CONTEXT.Process(target=_serve, args=(theirs, about, threads, function, args)))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)
            World._open[ours] = self, rank

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join()
            del World._open[pipe]

    def ask(self, word: Any = None) -> Any:
        """Sends a word to the first rank, and waits for its answer."""
        with contextlib.suppress(ConnectionError):  # it has died, which `_next` says
            self.pipes[0].send(word)
        return self._next(0)

    def results(self) -> list[Any]:
        """What the function returns on each rank."""
        return [self._next(rank) for rank in range(len(self.pipes))]

    def _next(self, rank: int) -> Any:
        """The next thing that a rank sends. Any other, of any world, may fail first."""
        while not self.heard[rank]:
            for pipe in connection.wait(World._open):
                world, sender = World._open[pipe]
                try:
                    found = pipe.recv()
                except (EOFError, ConnectionError):
                    world.processes[sender].join()
                    found = _Failure(f"exit code {world.processes[sender].exitcode}")
                if isinstance(found, _Failure):
                    sys.exit(f"rank {sender} of {len(world.pipes)}: {found}")
                world.heard[sender].append(found)
        return self.heard[rank].pop(0)


class _Failure(str):
    """Why a rank failed."""


def _serve(
    pipe: connection.Connection, about: Mapping[str, str], threads: int, function: Callable, args: tuple
) -> None:
    os.environ |= about
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    try:
        pipe.send(function(pipe, *args))
    except BaseException:
        pipe.send(_Failure(traceback.format_exc()))
    pipe.poll(None)  # until all are ended: one that left now would break the others' collectives


def run(function: Callable[..., Any], *args: Any, size: int = 1, threads: int = 1) -> list[Any]:
    """What `function(*args)` returns on each rank of a world of its own. See `World`."""
    with World(_without_pipe, function, args, size=size, threads=threads) as world:
        return world.results()


def _without_pipe(pipe: connection.Connection, function: Callable[..., Any], args: tuple) -> Any:
    return function(*args)


# -- rows ----------------------------------------------------------------------------------------------------


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{model}, {os.cpu_count()} cores"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def append(name: str, rows: Sequence[Mapping[str, object]], packages: Sequence[str] = ()) -> list[dict[str, str]]:
    """Adds rows to NAME.csv, numbers to four digits, behind each the date, the load of the last minute, the machine and
    the versions of torch and `packages`. A column that is new gets its place at the end of all rows.

    Returns:
        All rows of the file.
    """
    about = {"date": datetime.date.today().isoformat(), "load": round(os.getloadavg()[0], 1), "machine": machine()}
    about |= {package: version(package) for package in ("torch", *packages)}
    new = [{key: f"{v:.4g}" if isinstance(v, float) else str(v) for key, v in (row | about).items()} for row in rows]
    path = RESULTS / f"{name}.csv"
    old: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
    found = old + new
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in found for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    temporary.replace(path)
    return found
