"""Preparing a source: its rows read, checked, rendered and tokenised once, by all cores of one process's machine, for
every start and every rank that asks for the same."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn

from ..signals import before_leaving, end_with
from ..surviving import durable
from ..surviving.places import Lock
from .files import Meter
from .formats import read_row
from .prepared import INDEX, ROWS_PER_FILE, Prepared, damaged, file_of, is_whole, packed, read_index, write_index
from .render import example
from .sources import PRESETS, Source, bits, kind_of
from .tokenizer import Tokenizer

_FORM = 3  # of the files, and of what is made of a row: to be raised with either
_SECONDS_BETWEEN_LINES = 10.0

RawRows = list[tuple[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """What the prepared rows of a source depend on, but for the source itself."""

    tokenizer: Tokenizer
    presets: tuple[str | None, str | None]  # of the policy, and of the reward model
    kinds: frozenset[str]

    def made(self, rows: RawRows) -> bytes:
        """The file of some rows.

        Raises:
            ConfigError: names the file and the row that cannot be read.
        """
        checked = (read_row(row, where) for where, row in rows)
        return packed((bits(row), example(row, self.presets, self.kinds, self.tokenizer)) for row in checked)

    def about(self, source: Source) -> dict[str, Any]:
        """All of it, and the source, as a record."""
        recipe = [_FORM, self.tokenizer.digest(), *self.presets, *sorted(self.kinds)]
        recipe += [source.split] if source.generated and source.split != "train" else []
        return {"source": source.spec.name, "recipe": recipe, "content": source.identity()}


def prepare(
    source: Source, tokenizer: Tokenizer, phases: Sequence[str], cache: Path, is_checking: bool = True
) -> Prepared:
    """The rows of a source as `phases` need them: those that are there, or else made here, or by whoever is at it.

    Args:
        cache: folder of all that is prepared.
        is_checking: reads every file once, to be sure of it.

    Raises:
        ConfigError: names the file and the row that cannot be read.
        WriteError: there is no room.
    """
    spec = source.spec
    presets = PRESETS[spec.system], PRESETS[spec.reward if spec.reward is not None else spec.system]
    recipe = Recipe(tokenizer, presets, frozenset(map(kind_of, phases)))
    about = recipe.about(source)
    folder = cache / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    lock = Lock(folder / "lock", f"the preparation of {spec.name}")
    while True:
        if is_new := lock.acquire_unless((folder / INDEX).is_file):
            before_leaving(lock.release)
            try:
                _say_changed(about, cache)
                _make(folder, source, recipe, about)
            finally:
                lock.release()
        if not (bad := damaged(folder, is_checking and not is_new)):  # what is new has just been read
            return Prepared(folder)
        print(f"{bad[0]} is not what was written there: prepared again", flush=True)
        for file in (folder / INDEX, *bad):
            file.unlink(missing_ok=True)


def _say_changed(about: dict[str, Any], cache: Path) -> None:
    for index in cache.glob(f"*/{INDEX}"):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # another source's, which is not asked for
            before = read_index(index.parent)
            if any(before.get(key) != about[key] for key in ("source", "recipe")):
                continue
            print(f"{about['source']} has changed since it was prepared in {index.parent}: prepared again", flush=True)


def _make(folder: Path, source: Source, recipe: Recipe, about: dict[str, Any]) -> None:
    """Every file that is not there yet, and then the index."""
    meter, started = Meter(), time.monotonic()
    count = num_rows = 0
    with _Show(source.spec.name, meter) as show:
        for count, (rows, content) in enumerate(_contents(folder, _chunks(source, meter), recipe), 1):
            num_rows += rows
            if content is not None:
                durable.write(file_of(folder, count - 1), content)
            show.rows(num_rows)
    write_index(folder, count, about)
    if count > 1:
        print(
            f"prepared {source.spec.name}: {num_rows} rows in {time.monotonic() - started:.0f} s, in {folder}",
            flush=True,
        )


def _chunks(source: Source, meter: Meter) -> Iterator[RawRows]:
    rows = source.raw_rows(meter)
    while chunk := list(itertools.islice(rows, ROWS_PER_FILE)):
        yield chunk


def _contents(folder: Path, chunks: Iterator[RawRows], recipe: Recipe) -> Iterator[tuple[int, bytes | None]]:
    """Number of rows and content of each file in turn; None where the file is there. Of chunks that are made at the
    same time there are two for each core at most."""
    first, cores = list(itertools.islice(chunks, 2)), len(os.sched_getaffinity(0))
    todo = enumerate(itertools.chain(first, chunks))
    if len(first) < 2 or cores == 1:
        for i, rows in todo:
            yield len(rows), None if is_whole(file_of(folder, i)) else recipe.made(rows)
        return
    with _workers(cores, recipe) as pool:
        waiting: deque[tuple[int, Future[bytes] | None]] = deque()
        for i, rows in todo:
            waiting.append((len(rows), None if is_whole(file_of(folder, i)) else pool.submit(_work, rows)))
            if len(waiting) > 2 * cores:
                yield _done(*waiting.popleft())
        while waiting:
            yield _done(*waiting.popleft())


def _done(num_rows: int, content: Future[bytes] | None) -> tuple[int, bytes | None]:
    return num_rows, None if content is None else content.result()


_recipe: Recipe  # of a worker


def _workers(count: int, recipe: Recipe) -> Executor:
    # A fork of a process with threads and a GPU may hang, so workers begin anew.
    return ProcessPoolExecutor(count, get_context("spawn"), _begin, (recipe, os.getpid()))


def _begin(recipe: Recipe, parent: int) -> None:
    global _recipe
    _recipe = recipe
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for asked in (signal.SIGINT, signal.SIGHUP):  # which a terminal sends to all: the parent answers
        signal.signal(asked, signal.SIG_IGN)
    end_with(parent, "")


def _work(rows: RawRows) -> bytes:
    return _recipe.made(rows)


class _Show:
    """How far the preparation is: a bar on a terminal, else a line every few seconds."""

    def __init__(self, name: str, meter: Meter):
        self.name, self.meter = name, meter
        self.started = self.said = time.monotonic()
        self.bar: Progress | None = None

    def __enter__(self) -> _Show:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def rows(self, count: int) -> None:
        """So many rows are done."""
        seconds, share = time.monotonic() - self.started, self.meter.share
        left = int(seconds * (1 - share) / share) if share else None
        line = f"preparing {self.name}: {count} rows, {count / max(seconds, 1e-9):.0f} rows/s"
        line += f", {left // 60}:{left % 60:02d} left" if left is not None else ""
        if sys.stdout.isatty():
            self._draw(line, share)
        elif time.monotonic() - self.said >= _SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            print(line, flush=True)

    def _draw(self, line: str, share: float) -> None:
        if self.bar is None:
            self.bar = Progress(BarColumn(), TextColumn("{task.description}", markup=False), transient=True)
            self.bar.add_task(line, total=1)
            self.bar.start()
        self.bar.update(self.bar.task_ids[0], description=line, completed=share)
