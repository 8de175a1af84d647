"""A job's output while it is made. Rows are written as they are done, and a job that was ended goes on behind them.

OUTPUT                 all rows, in the order of the input; it appears when all are there
OUTPUT.partial         rows so far, in the order in which they are made, part by part
OUTPUT.settings.json   what the rows depend on; of a finished output its size as well
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import ConfigError
from . import durable

_CONTENTS = {"data.sources": "rows", "policy.path": "files", "tokenizer.path": "files"}  # known by what is in them
_SAMPLE = 1 << 20  # bytes at either end of a file
_SIZE = "size"


class Parts:
    """
    Args:
        path: of the output.
        settings: what its rows depend on, as JSON has it.
        rerun: whatever else is there is written over.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], rerun: bool = False):
        self.path, self.rerun = path, rerun
        self.settings = json.loads(json.dumps(settings))
        self.partial = path.with_name(path.name + ".partial")
        self._settings_path = path.with_name(path.name + ".settings.json")

    @property
    def is_finished(self) -> bool:
        """Whether the output is whole, and need not be made again."""
        found = self._found()
        return not self.rerun and found is not None and found.get(_SIZE) is not None

    def check(self) -> None:
        """
        Raises:
            ConfigError: what is there was made with other settings, or by somebody else.
        """
        if self.path.exists() and not self.path.is_file():
            raise ConfigError(f"output={self.path} is not a file")
        if self.rerun:
            return
        found = self._found()
        if found is None:
            if self.path.is_file() and self.path.stat().st_size and not self.partial.is_file():
                raise ConfigError(
                    f"output={self.path} is there, and this job has not made it: use another output, or rerun=true to"
                    " write over it"
                )
        elif changes := differences(found, self.settings):
            raise ConfigError(
                f"output={self.path}: the rows that are there were made with {'; '.join(changes)}: use another output,"
                " or rerun=true to begin again"
            )

    def begin(self, sizes: Sequence[int]) -> int:
        """Opens the output to add parts of so many rows, in this order.

        Returns:
            How many of them are there already; what is behind the last whole one is cut off.
        """
        found = self._found()
        if found is None or _SIZE in found or differences(found, self.settings):
            self.partial.unlink(missing_ok=True)
            durable.write(self._settings_path, json.dumps(self.settings, indent=1) + "\n")
        self._file = self.partial.open("a+b")
        durable.sync(self.partial.parent)
        self._file.seek(0)
        self._places = array("Q", [0])  # where each row begins, and the last one ends
        for line in self._file:
            if not _is_whole(line):
                break
            self._places.append(self._places[-1] + len(line))
        whole, rows = 0, 0
        for size in sizes:
            if rows + size > len(self._places) - 1:
                break
            whole, rows = whole + 1, rows + size
        del self._places[rows + 1 :]
        self._file.truncate(self._places[-1])
        return whole

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """The next part. It is on the disk when this returns."""
        for row in rows:
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            self._file.write(line)
            self._places.append(self._places[-1] + len(line))
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, order: Sequence[int]) -> None:
        """Makes the output of all parts.

        Args:
            order: which row of the input each row was, in the order in which they were made.
        """
        place = {row: k for k, row in enumerate(order)}
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("wb") as file:
            for row in range(len(order)):
                k = place[row]
                self._file.seek(self._places[k])
                file.write(self._file.read(self._places[k + 1] - self._places[k]))
            file.flush()
            os.fsync(file.fileno())
        durable.move(temporary, self.path)
        size = self.path.stat().st_size
        durable.write(self._settings_path, json.dumps(self.settings | {_SIZE: size}, indent=1) + "\n")
        self._file.close()
        self.partial.unlink()

    def _found(self) -> dict[str, Any] | None:
        """The settings of the rows that are there, with a size where they are a finished output; None without rows."""
        try:
            found = json.loads(self._settings_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if _SIZE in found:
            is_whole = self.path.is_file() and self.path.stat().st_size == found[_SIZE]
            return found if is_whole else None
        return found if self.partial.is_file() else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each key that has another value than before."""
    found = []
    for key in sorted((before.keys() | now.keys()) - {_SIZE}):
        was, value = before.get(key), now.get(key)
        if was != value and key in _CONTENTS:
            found.append(f"other {_CONTENTS[key]} in {key}")
        elif was != value:
            found.append(f"{key}={_spelled(was)}, not {_spelled(value)}")
    return found


def rows_digest(rows: Iterable[Any]) -> str:
    """Of the content of rows, wherever they are read from."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def folder_digest(path: str) -> str:
    """Of a model's or a tokenizer's files: names, sizes, and the bytes at either end, in which other weights differ.

    Raises:
        ConfigError: one of them cannot be read.
    """
    digest, place = hashlib.sha256(), Path(path)
    try:
        for file in [place] if place.is_file() else sorted(f for f in place.iterdir() if f.is_file()):
            with file.open("rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                digest.update(json.dumps([file.name, size]).encode() + opened.read(_SAMPLE))
                opened.seek(max(0, size - _SAMPLE))
                digest.update(opened.read())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return digest.hexdigest()


def _is_whole(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
