"""Work on files in several processes, each of which reads and writes its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, as_completed
from typing import TypeVar

from ..config import ConfigError
from ..signals import end_with
from .layout import Progress

Unit = TypeVar("Unit")
Result = TypeVar("Result")
_WORTH_BYTES = 2 * 10**9  # of work for each further process, which takes some seconds to start


def spread(
    work: Callable[[Unit, Progress], Result],
    sizes: Mapping[Unit, int],
    advance: Progress,
    processes: int | None = None,
) -> Iterator[tuple[Unit, Result]]:
    """Each unit with what `work` gives for it, as they are done.

    Args:
        work: is told where to report bytes; of a module's top level, as is what its units are made of.
        sizes: bytes of each unit.
        processes: None: as many as there are cores and enough to do.

    Raises:
        ConfigError: one of them was killed.
    """
    worth = -(-sum(sizes.values()) // _WORTH_BYTES)
    count = min(len(sizes), processes or min(worth, len(os.sched_getaffinity(0))))
    if count <= 1:
        for unit in sizes:
            yield unit, work(unit, advance)
        return
    with _processes(count) as pool:
        futures = {pool.submit(work, unit, _nobody): unit for unit in sizes}
        for future in as_completed(futures):
            try:
                result = future.result()
            except BrokenExecutor:
                raise ConfigError(
                    f"one of {count} processes was killed, by the system where memory is short: --processes N for fewer"
                ) from None
            advance(sizes[futures[future]])
            yield futures[future], result


def _nobody(num_bytes: int) -> None:
    """Of a worker's progress, which shows when its unit is done."""


@contextlib.contextmanager
def _processes(count: int) -> Iterator[Executor]:
    """That end with this one, and at once where it goes on no further."""
    before = multiprocessing.active_children()
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                if process not in before:
                    process.kill()
            raise


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's to answer
    end_with(os.getppid(), "")
