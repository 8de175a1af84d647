"""The tokenizer that a run trains on its own rows, where none is given: once, as models learn its ids."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import BUILDS_ON, RunConfig
from ..surviving import durable
from ..surviving.places import Lock
from .chat import said_in
from .formats import text_of
from .sources import Source
from .tokenizer import Tokenizer, train_tokenizer

_FOLDER = "tokenizer"  # of the run
_MODEL, _RECORD = "tokenizer.model", "trained_on.json"
_ROWS_TO_LEARN = 100_000  # of each source: it holds them in memory


def trained_tokenizer(config: RunConfig, sources: Sequence[Source]) -> Tokenizer:
    """That of `output_dir`, which the first process that asks trains. One that was trained on something else is trained
    anew, unless a phase has learned its ids.

    Raises:
        ConfigError: the rows have too little text for `tokenizer.vocab_size`.
    """
    folder, about = Path(config.output_dir) / _FOLDER, _about(config, sources)
    path, record = folder / _MODEL, folder / _RECORD
    lock = Lock(folder / "lock", "the training of the tokenizer")
    if lock.acquire_unless(lambda: path.is_file() and (durable.read(record) == about or _is_learned(config))):
        try:
            if path.is_file():
                print(f"{folder}: trained again, as {_changes(record, about)}", flush=True)
            record.unlink(missing_ok=True)
            train_tokenizer(_said(sources), path, config.tokenizer.vocab_size)
            durable.write(record, json.dumps(about))
        finally:
            lock.release()
    tokenizer = Tokenizer(str(path), config.tokenizer.template)
    tokenizer.call_format = config.tokenizer.tool_calls or tokenizer.call_format
    return tokenizer


def tokenizer_notes(config: RunConfig, sources: Sequence[Source]) -> list[str]:
    """That the run goes on with a tokenizer which it would not train today."""
    folder = Path(config.output_dir) / _FOLDER
    record = folder / _RECORD
    if not record.is_file() or not _is_learned(config):  # before files are looked at
        return []
    if durable.read(record) == (about := _about(config, sources)):
        return []
    return [f"{folder}: kept, as phases here have learned its ids, though {_changes(record, about)}"]


def _about(config: RunConfig, sources: Sequence[Source]) -> dict[str, Any]:
    """What it depends on."""
    return {"tokenizer.vocab_size": config.tokenizer.vocab_size} | {
        f"data.sources: {source.spec.name}": source.identity() for source in sources
    }


def _changes(record: Path, about: dict[str, Any]) -> str:
    before = durable.read(record)
    if before is None:
        return "what it was trained on is not known"
    changed = [key for key in (before | about) if before.get(key) != about.get(key)]
    return f"it was trained with another {', '.join(changed)}"


def _is_learned(config: RunConfig) -> bool:
    return any((Path(config.output_dir) / phase).is_dir() for phase in BUILDS_ON)


def _said(sources: Sequence[Source]) -> Iterator[str]:
    """What is said in the rows, each text behind either speaker's name."""
    rows = itertools.chain.from_iterable(source.first_rows(_ROWS_TO_LEARN)[0] for source in sources)
    for row in rows:
        answers = (text_of(answer) for answer in (row.chosen, row.rejected) if answer is not None)
        for text in (*map(said_in, row.prompt), *answers):
            yield from (speaker + text for speaker in ("\n\nHuman: ", "\n\nAssistant: "))
