"""Rows of a source as its file has them: .jsonl, .json and .parquet, a folder of them, or a data set of the hub."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..config import ConfigError
from .folders import KINDS, TEST_SPLIT, Folder, kind, look_into

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)+")  # OWNER/NAME, with a configuration or a folder of it behind
_SAMPLES, _SAMPLE = 16, 1 << 16  # of a file, and bytes of each
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Meter:
    """How much of a source's files has been read, as far as that is known."""

    def __init__(self) -> None:
        self._total = self._before = self._size = 0  # bytes: of all, of the files before, and of this one
        self._file: BinaryIO | None = None

    def begin(self, files: Sequence[Path]) -> None:
        """Before the first of them is opened."""
        self._total = sum(file.stat().st_size for file in files)

    def next(self, file: BinaryIO) -> None:
        """The next of them, from its beginning."""
        self._before, self._size, self._file = self._before + self._size, os.fstat(file.fileno()).st_size, file

    @property
    def share(self) -> float:
        """From 0 to 1; 0 where it is not known."""
        if self._file is None or not self._total:
            return 0.0
        return (self._before + (self._size if self._file.closed else self._file.tell())) / self._total


def read_rows(name: str, key: str = "data.sources", meter: Meter | None = None) -> Iterator[tuple[str, Any]]:
    """Rows of a file, of all files of a folder, or of a data set of the Hugging Face hub, each with its place.

    Of a folder, what `look_into` leaves out is not read.

    Args:
        key: of the configuration, that errors name.
        meter: is told what is read.

    Raises:
        ConfigError: there is nothing of that name or no row in it, or a row cannot be read.
    """
    path, count, meter = Path(name), 0, meter or Meter()
    found: Iterator[tuple[str, Any]]
    if path.is_dir() or path.is_file():
        files = files_of(name, key)
        meter.begin(files)
        found = (row for file in files for row in _file_rows(file, meter))
    elif kind(path) in KINDS or name.startswith((".", "/")) or not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"{key}: {name} is not there")
    else:
        found = _hub_rows(name, key)
    for count, row in enumerate(found, 1):  # noqa: B007
        yield row
    if not count:
        raise ConfigError(f"{key}: {name} has no rows")


def files_of(name: str, key: str = "data.sources") -> list[Path]:
    """The files that are read of a file or a folder; none of a data set of the hub.

    Raises:
        ConfigError: there is nothing to train on in the folder.
    """
    path = Path(name)
    if not path.is_dir():
        return [path] if path.is_file() else []
    folder = look_into(path)
    if not folder.files:
        raise ConfigError(_nothing_in(folder, key))
    return folder.files


def identity(name: str, key: str = "data.sources") -> list[Any]:
    """What tells whether a source has changed: of each file its name, its size, when it was written, and a digest of
    some of its bytes; of a data set of the hub its fingerprint there."""
    files = files_of(name, key)
    return [_identity(file) for file in files] or [getattr(_hub(name, key), "_fingerprint", None)]


def _identity(file: Path) -> list[Any]:
    digest, stat = hashlib.sha256(), file.stat()
    with file.open("rb") as opened:
        for start in range(0, stat.st_size, max(_SAMPLE, stat.st_size // _SAMPLES)):
            opened.seek(start)
            digest.update(opened.read(_SAMPLE))
    return [file.name, stat.st_size, stat.st_mtime_ns, digest.hexdigest()]


def _nothing_in(folder: Folder, key: str) -> str:
    names = folder.left_out.get(TEST_SPLIT)
    way_on = (
        f"; a file that is named itself is read, whatever its name: {key}=[{folder.path / names[0]}]" if names else ""
    )
    return f"{key}: nothing to train on in {folder}{way_on}"


def _file_rows(path: Path, meter: Meter) -> Iterator[tuple[str, Any]]:
    readers = {".jsonl": _json, ".ndjson": _json, ".json": _json, ".parquet": _table}
    if kind(path) not in readers:
        raise ConfigError(f"{path} is not one of {', '.join(KINDS)}, of which .gz and .zst may be behind any")
    number = 0
    try:
        with _open(path, meter) as file:
            for number, row in readers[kind(path)](path, file):
                yield f"{path}:{number}", row
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise ConfigError(f"{path}:{number + 1}: {error}") from None


def _open(path: Path, meter: Meter) -> BinaryIO:
    """A file, unpacked and in UTF-8. What it begins with tells what it is, whatever its name."""
    file: BinaryIO = path.open("rb")
    meter.next(file)
    begin = file.read(32)
    file.seek(0)
    if begin.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.open(file))
    if begin.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow

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
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, ValueError) as error:
        raise ConfigError(f"{path}:{number + 1}: {error}") from None


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
    yield from ((f"{name}:{number}", row) for number, row in enumerate(_hub(name, key), 1))


def _hub(name: str, key: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"{key}: {name} is neither a file nor a folder here; to read it from the Hugging Face hub,"
            " pip install -e '.[data]'"
        ) from None
    owner, repository, *folder = name.split("/")
    path, part = f"{owner}/{repository}", "/".join(folder) or None
    try:
        is_config = part is not None and part in datasets.get_dataset_config_names(path)
        return datasets.load_dataset(path, **{"name" if is_config else "data_dir": part}, split="train")
    except Exception as error:  # of whatever kind the network, the hub and the data set raise
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{key}: {name} is neither a file nor a folder here, and the Hugging Face hub does not give it: {reason}"
        ) from None
