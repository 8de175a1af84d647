"""What is said to be written is on the disk, whole.

A file is written aside, synced, and takes its name; then the name is synced in its folder. So a process that is killed,
a machine that loses its power and a full disk leave the old one or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..config import ConfigError
from ..signals import RunError

_said: set[Path] = set()


class WriteError(RunError, OSError):
    """Something that cannot be written, for which the run has no other place."""

    def __init__(self, path: Path, error: Exception):
        self.reason = reason(error)
        super().__init__(f"{path} cannot be written ({self.reason}): make room, or mend it, and start the same again")


def reason(error: Exception) -> str:
    """What is wrong, without the name of the file and what to do."""
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)


@contextlib.contextmanager
def needed(path: Path) -> Iterator[None]:
    """Around what writes `path`: an OSError becomes a WriteError."""
    try:
        yield
    except OSError as error:
        raise error if isinstance(error, WriteError) else WriteError(path, error) from None


@contextlib.contextmanager
def spared(path: Path, errors: type[Exception] = OSError) -> Iterator[None]:
    """Around what writes `path`, which the run can do without: that it failed is said once."""
    try:
        yield
    except errors as error:
        if path not in _said:
            _said.add(path)
            print(f"{path} cannot be written ({reason(error)}): the run goes on without it", flush=True)


def sync(path: Path) -> None:
    """Has what was written to a file, or the names in a folder, on the disk when it returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """And those above it. A folder that is there is left as it is."""
    with needed(path):
        if not path.is_dir():
            make_folder(path.parent)
            path.mkdir(exist_ok=True)
            sync(path.parent)


def aside(path: Path, content: str | bytes) -> Path:
    """Writes what is to be moved to `path`: with that all is done that takes room. Nothing is left where it fails."""
    temporary = path.with_name(path.name + ".tmp")
    with needed(path):
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            sync(temporary)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    return temporary


def move(source: Path, target: Path) -> None:
    """Gives a synced file or folder another name in the same folder, that of a file that it replaces."""
    with needed(target):
        os.replace(source, target)
        sync(target.parent)


def write(path: Path, content: str | bytes) -> None:
    """Replaces a file."""
    move(aside(path, content), path)


def read(path: Path) -> dict[str, Any] | None:
    """A record of a run, in JSON or YAML by its name; None where there is none.

    Raises:
        ConfigError: it was cut short, or is something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        if isinstance(found, dict) and (path.suffix == ".json" or text.endswith("\n")):
            return found
        why = "it was cut short" if text else "it is empty"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = reason(error).splitlines()[0]
    raise ConfigError(f"{path} cannot be read ({why}): remove it, and the phase goes on from its last checkpoint")


def append(path: Path, content: str) -> None:
    """Adds all of `content` to a file or nothing, unsynced."""
    with needed(path), path.open("ab", buffering=0) as file:
        size, left = file.seek(0, os.SEEK_END), memoryview(content.encode())
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise
