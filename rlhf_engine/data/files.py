"""Rows of a source as its file has them: .jsonl, .json and .parquet, a folder of them, or a data set of the hub."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..config import ConfigError

KINDS = (".jsonl", ".json", ".parquet")  # the first two also behind .gz
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)+")  # OWNER/NAME or OWNER/NAME/FOLDER
_HELD_OUT = re.compile(r"(test|val|valid|validation|dev|eval)\b", re.IGNORECASE)


def read_rows(name: str, key: str = "data.sources") -> Iterator[tuple[str, Any]]:
    """Rows of a file, of all files of a folder, or of a data set of the Hugging Face hub, each with its place.

    In a folder, files whose names begin with test, validation or the like are left out.

    Args:
        key: of the configuration, that errors name.

    Raises:
        ConfigError: there is nothing of that name or no row in it, or a row cannot be read.
    """
    path, count = Path(name), 0
    found: Iterator[tuple[str, Any]]
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if _kind(f) in KINDS and not _HELD_OUT.match(f.name)]
        found = (row for file in files for row in _file_rows(file))
    elif path.is_file():
        found = _file_rows(path)
    elif _kind(path) in KINDS or name.startswith((".", "/")) or not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"{key}: {name} is not there")
    else:
        found = _hub_rows(name, key)
    for count, row in enumerate(found, 1):  # noqa: B007
        yield row
    if not count:
        raise ConfigError(f"{key}: {name} has no rows")


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    readers = {".jsonl": _lines, ".json": _document, ".parquet": _table}
    if (kind := _kind(path)) not in readers:
        raise ConfigError(f"{path} is not one of {', '.join(KINDS)}")
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, row in readers[kind](path, cast(BinaryIO, file)):
                yield f"{path}:{number}", row
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}:{number + 1}: {error}") from None


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, _parse(line, f"{path}:{number}")


def _document(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """A list of rows, one row, or lines after all, as many a .json file has."""
    data = file.read()
    try:
        rows = _parse(data, str(path))
    except ConfigError as error:
        if "Extra data" not in str(error):
            raise
        yield from _lines(path, io.BytesIO(data))
        return
    if not isinstance(rows, list) or (rows and all(isinstance(row, dict) and "role" in row for row in rows)):
        rows = [rows]  # which may be a dialogue
    yield from enumerate(rows, 1)


def _table(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(f"{path} needs pyarrow to be read: pip install rlhf-engine[data]") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, ValueError) as error:
        raise ConfigError(f"{path}:{number + 1}: {error}") from None


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _hub_rows(name: str, key: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"{key}: {name} is neither a file nor a folder here; to read it from the Hugging Face hub,"
            " pip install rlhf-engine[data]"
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
