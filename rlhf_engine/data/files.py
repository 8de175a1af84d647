"""Rows of a source as its file has them: .jsonl, .json and .parquet, a folder of them, or a data set of the hub."""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..config import ConfigError
from .folders import KINDS, TEST_SPLIT, Folder, kind, look_into

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)+")  # OWNER/NAME or OWNER/NAME/FOLDER
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_rows(name: str, key: str = "data.sources") -> Iterator[tuple[str, Any]]:
    """Rows of a file, of all files of a folder, or of a data set of the Hugging Face hub, each with its place.

    Of a folder, what `look_into` leaves out is not read.

    Args:
        key: of the configuration, that errors name.

    Raises:
        ConfigError: there is nothing of that name or no row in it, or a row cannot be read.
    """
    path, count = Path(name), 0
    found: Iterator[tuple[str, Any]]
    if path.is_dir():
        folder = look_into(path)
        if not folder.files:
            raise ConfigError(_nothing_in(folder, key))
        found = (row for file in folder.files for row in _file_rows(file))
    elif path.is_file():
        found = _file_rows(path)
    elif kind(path) in KINDS or name.startswith((".", "/")) or not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"{key}: {name} is not there")
    else:
        found = _hub_rows(name, key)
    for count, row in enumerate(found, 1):  # noqa: B007
        yield row
    if not count:
        raise ConfigError(f"{key}: {name} has no rows")


def _nothing_in(folder: Folder, key: str) -> str:
    names = folder.left_out.get(TEST_SPLIT)
    way_on = (
        f"; a file that is named itself is read, whatever its name: {key}=[{folder.path / names[0]}]" if names else ""
    )
    return f"{key}: nothing to train on in {folder}{way_on}"


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    readers = {".jsonl": _json, ".ndjson": _json, ".json": _json, ".parquet": _table}
    if kind(path) not in readers:
        raise ConfigError(f"{path} is not one of {', '.join(KINDS)}, of which .gz and .zst may be behind any")
    number = 0
    try:
        with _open(path) as file:
            for number, row in readers[kind(path)](path, file):
                yield f"{path}:{number}", row
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise ConfigError(f"{path}:{number + 1}: {error}") from None


def _open(path: Path) -> BinaryIO:
    """A file, unpacked and in UTF-8. What it begins with tells what it is, whatever its name."""
    file: BinaryIO = path.open("rb")
    begin = file.read(32)
    file.seek(0)
    if begin.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.open(file))
    if begin.startswith(b"\x28\xb5\x2f\xfd"):
        pyarrow = _pyarrow(path)
        return cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd")))
    if begin.startswith(_UTF_16):
        return io.BytesIO(file.read().decode("utf-16").encode())
    if begin.startswith(b"version https://git-lfs"):
        raise ConfigError(f"{path} only points to a file of Git LFS: git lfs pull brings it")
    return file


def _json(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """A row in each line, or a document: a list of rows, one row, or, in a .json, an object around a list of rows."""
    lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    head = list(itertools.islice(lines, 2))
    if len(head) == 2 and _is_json(head[0][1]):
        for number, line in itertools.chain(head, lines):
            yield number, _parse(line, path, number)
    elif head:
        rows = _parse(b"".join(line for _, line in head) + file.read(), path, head[0][0])
        if isinstance(rows, dict) and kind(path) == ".json":
            lists = [value for value in rows.values() if isinstance(value, list)]
            if len(lists) == 1 and lists[0] and isinstance(lists[0][0], dict) and not _is_dialogue(lists[0]):
                rows = lists[0]
        if not isinstance(rows, list) or _is_dialogue(rows):
            rows = [rows]
        yield from enumerate(rows, 1)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def _is_dialogue(rows: list) -> bool:
    return bool(rows) and all(isinstance(row, dict) and row.keys() & {"role", "from"} for row in rows)


def _table(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    pyarrow = _pyarrow(path)
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, ValueError) as error:
        raise ConfigError(f"{path}:{number + 1}: {error}") from None


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{path} needs pyarrow to be read: pip install -e '.[data]'") from None
    return pyarrow


def _parse(data: bytes, path: Path, number: int) -> Any:
    """JSON whose first line is the file's line `number`."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        number += error.lineno - 1
        reason = f"{error.msg} at column {error.colno}, {error.doc[error.pos :][:20].partition(chr(10))[0]!r}"
    except UnicodeDecodeError as error:
        number += data.count(b"\n", 0, error.start)
        reason = f"byte {data[error.start]:#x} is not UTF-8"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise ConfigError(f"{path}:{number}: {reason}")


def _hub_rows(name: str, key: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"{key}: {name} is neither a file nor a folder here; to read it from the Hugging Face hub,"
            " pip install -e '.[data]'"
        ) from None
    owner, repository, *folder = name.split("/")
    try:
        rows = datasets.load_dataset(f"{owner}/{repository}", data_dir="/".join(folder) or None, split="train")
        for number, row in enumerate(rows, 1):
            yield f"{name}:{number}", row
    except Exception as error:  # of whatever kind the network, the hub and the data set raise
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{key}: {name} is neither a file nor a folder here, and the Hugging Face hub does not give it: {reason}"
        ) from None
