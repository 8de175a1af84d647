"""What a finished folder held when it was finished, and whether it still does: sizes and SHA-256 sums of its files.

They are there for accidents: a disk that forgets, a copy cut short. Who may write the files may write the sums as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from . import durable

NAME = "manifest.json"
Entry = tuple[int, str]  # bytes, SHA-256


def entry(path: Path) -> Entry:
    """What a manifest says of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def write(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Says what `folder` holds. It is on the disk when this returns."""
    durable.write(folder / NAME, json.dumps(entries, indent=1, sort_keys=True))


def damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a folder, None if nothing is.

    Args:
        part, parts: only every `parts`-th file is looked at, from number `part` on.
    """
    if not folder.is_dir():
        return "it is not there"
    try:
        entries = sorted((name, tuple(said)) for name, said in json.loads((folder / NAME).read_text()).items())
    except (OSError, ValueError, AttributeError, TypeError):
        return f"its {NAME} cannot be read"
    for name, said in entries[part::parts]:
        path = folder / name
        try:
            size = path.stat().st_size
            if size != said[0]:
                return f"{name} has {size} bytes of {said[0]}"
            if entry(path) != said:
                return f"{name} has another checksum than when it was saved"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None
