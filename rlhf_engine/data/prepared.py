"""The rows of a source as token ids on the disk: Arrow files of equal numbers of rows, mapped into memory, and their
index. What a process holds of them are a byte a row and, for each phase, which it draws; the rest are pages."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from ..surviving import durable
from .chat import Messages, text_of

INDEX = "index"  # JSON; no name that a folder of data is read by
ROWS_PER_FILE = 4096
_DIGEST = b"digest"  # of a file's rows, in the metadata of its schema


@dataclass(frozen=True)
class Example:
    """A tokenised row. Plain text is an answer without a prompt."""

    prompt: list[int]
    before: list[int]  # what stands before the answers: the prompt without what the template opens in prompts alone
    before_spoken: list[bool]  # which of its tokens the assistant said in earlier turns
    chosen: list[int] | None  # the end token included
    rejected: list[int] | None
    reward_prompt: list[int]  # the prompt as the reward model reads it
    reward_before: list[int]
    messages: Messages = field(default_factory=list)  # that the prompt says
    fields: dict[str, Any] = field(default_factory=dict)  # what else the row has

    @property
    def prompt_text(self) -> str:
        """The prompt as hh-rlhf writes it; empty for plain text."""
        return text_of(self.messages) if self.messages else ""


_TOKENS, _JSON = pa.list_(pa.int32()), pa.string()
_SCHEMA = pa.schema(
    [
        ("serves", pa.uint8()),  # the kinds of phases that can learn from it, a bit each
        ("prompt", _TOKENS),
        ("before", _TOKENS),
        ("before_spoken", pa.list_(pa.bool_())),
        ("chosen", _TOKENS),
        ("rejected", _TOKENS),
        ("reward_prompt", _TOKENS),
        ("reward_before", _TOKENS),
        ("messages", _JSON),
        ("fields", _JSON),
    ]
)
# Columns that are null where they say nothing that another does not say
_ALIKE = {"before": "prompt", "reward_prompt": "prompt", "reward_before": "before"}
assert {f.name for f in fields(Example)} == set(_SCHEMA.names) - {"serves"}


def packed(rows: Iterable[tuple[int, Example]]) -> bytes:
    """The Arrow file of some rows, each with the kinds of phases that it serves."""
    columns: dict[str, list] = {name: [] for name in _SCHEMA.names}
    digest = hashlib.sha256()
    for serves, example in rows:
        row = {"serves": serves, **vars(example)}
        for name in ("prompt", "chosen", "rejected", "reward_prompt"):
            digest.update(np.asarray(row[name] or (), dtype=np.int32).tobytes() + b"|")
        for name, other in reversed(_ALIKE.items()):
            if row[name] == row[other]:
                row[name] = None
        row["before_spoken"] = row["before_spoken"] if any(row["before_spoken"]) else None
        for name in ("messages", "fields"):
            row[name] = json.dumps(row[name], default=str) if row[name] else None
        for name, column in columns.items():
            column.append(row[name])
    schema = _SCHEMA.with_metadata({_DIGEST: digest.digest()})
    batch = pa.record_batch([pa.array(columns[f.name], f.type) for f in _SCHEMA], schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def damaged(folder: Path, is_thorough: bool) -> list[Path]:
    """Files of a folder that are not what was written, by their sizes or, thoroughly, by all that they hold."""
    try:
        entries = read_index(folder)["files"]
        expected = [(file_of(folder, i), entry["bytes"], entry["crc32"]) for i, entry in enumerate(entries)]
    except (OSError, ValueError, KeyError, TypeError):
        return [folder / INDEX]

    def differs(file: Path, size: int, crc: int) -> bool:
        try:
            return file.stat().st_size != size or (is_thorough and checksum(file) != crc)
        except OSError:
            return True

    with ThreadPoolExecutor() as pool:  # zlib lets other threads run
        found = pool.map(differs, *zip(*expected, strict=True))
        return [file for (file, *_), is_other in zip(expected, found, strict=True) if is_other]


def file_of(folder: Path, number: int) -> Path:
    """Where rows `number * ROWS_PER_FILE` and those behind them are."""
    return folder / f"{number:06}.arrow"


def checksum(file: Path) -> int:
    """CRC-32 of a file."""
    return zlib.crc32(file.read_bytes())


def write_index(folder: Path, count: int, about: dict[str, Any]) -> None:
    """Says that `count` files are all that there is of a source."""
    files = [file_of(folder, i) for i in range(count)]
    entries = [{"bytes": f.stat().st_size, "crc32": checksum(f), "digest": _digest(f)} for f in files]
    durable.write(folder / INDEX, json.dumps({"files": entries, **about}, indent=1))


def read_index(folder: Path) -> dict[str, Any]:
    """What `write_index` wrote.

    Raises:
        OSError, ValueError: it is not there, or is something else.
    """
    return json.loads((folder / INDEX).read_text(encoding="utf-8"))


def is_whole(file: Path) -> bool:
    """Whether a file of rows is there and has been written to its end."""
    try:
        return bool(_digest(file))
    except (OSError, pa.ArrowInvalid):
        return False


def _digest(file: Path) -> str:
    return _read(file).schema.metadata[_DIGEST].hex()


def _read(file: Path) -> pa.RecordBatch:
    return pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)


class Prepared:
    """All rows of a source, mapped.

    Attributes:
        serves: `(N,)`, the kinds of phases that a row serves, a bit each.
        digest: of what the rows say.
    """

    def __init__(self, folder: Path):
        files = read_index(folder)["files"]
        self._batches = [_read(file_of(folder, i)) for i in range(len(files))]
        self.serves = np.concatenate([np.asarray(batch["serves"]) for batch in self._batches])
        self.digest = hashlib.sha256("".join(file["digest"] for file in files).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.serves)

    def example(self, i: int, piece: slice) -> Example:
        """A row; of plain text a piece."""
        number, place = divmod(i, ROWS_PER_FILE)
        found = {name: self._batches[number].column(name)[place] for name in _SCHEMA.names[1:]}
        if not found["messages"].is_valid and found["chosen"].is_valid:
            return Example([], [], [], found["chosen"].values[piece].to_pylist(), None, [], [])
        row = {name: value.as_py() for name, value in found.items()}
        for name, other in _ALIKE.items():
            row[name] = row[other] if row[name] is None else row[name]
        row["before_spoken"] = row["before_spoken"] or [False] * len(row["before"])
        row["messages"] = json.loads(row["messages"] or "[]")
        row["fields"] = json.loads(row["fields"] or "{}")
        return Example(**row)

    def lengths(self, first: int, last: int) -> Iterator[tuple[range, dict[str, np.ndarray]]]:
        """Of the rows from `first` to `last`, a file's at a time, so that nothing grows with their number: which rows,
        and name of a field of Example to `(n,)`, its tokens; -1 where a row has none."""
        for number, batch in enumerate(self._batches):
            start = number * ROWS_PER_FILE
            rows = range(max(first, start), min(last, start + len(batch)))
            if rows:
                batch = batch.slice(rows.start - start, len(rows))
                names = ("prompt", "reward_prompt", "chosen", "rejected")
                found = {name: np.asarray(pa.compute.list_value_length(batch[name]).fill_null(-1)) for name in names}
                reward_prompt = np.where(found["reward_prompt"] < 0, found["prompt"], found["reward_prompt"])
                yield rows, found | {"reward_prompt": reward_prompt}


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Example]):
    """Some rows of a source, in order; of plain text, pieces.

    Args:
        rows: `(n,)`, which.
        starts: `(n,)`, the token at which a piece of text begins.
        length: tokens of a piece, at most.
        is_bad: `(n,)`, for rows of one answer each: whether it is the rejected one. None: rows are whole.
    """

    prepared: Prepared
    rows: np.ndarray
    starts: np.ndarray
    length: int
    is_bad: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> bytes:
        """Of what the rows say."""
        found = hashlib.sha256(f"{self.prepared.digest} {self.length}".encode())
        for part in (self.rows, self.starts, self.is_bad):
            found.update(part.tobytes() if part is not None else b"")
        return found.digest()

    def __getitem__(self, i):  # type: ignore[override]
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        start = int(self.starts[i])
        found = self.prepared.example(int(self.rows[i]), slice(start, start + self.length))
        if self.is_bad is None:
            return found
        return replace(found, chosen=None) if self.is_bad[i] else replace(found, rejected=None)
