"""Sources of a mixture for tests: read at once, or made of rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rlhf_engine.data.formats import Row
from rlhf_engine.data.sources import Source, Spec, mixture


@dataclass
class Split:
    """A source with its rows, those to train on and those held out."""

    source: Source
    train: list[Row]
    held_out: list[Row]


def read(*names: str, num_rows: int = 0, num_eval_rows: int | None = 0) -> list[Split]:
    """All rows of a mixture."""
    found = []
    for source in mixture(names, num_rows, num_eval_rows, 1):
        rows = list(source.rows())
        cut = len(rows) - source.num_held_out(len(rows))
        found.append(Split(source, rows[:cut], rows[cut:]))
    return found


def source_of(file: Path, rows: list[Row], share: float = 1.0, **presets: str) -> Source:
    """A source of such rows, of which the last is held out."""
    file.write_text("".join(json.dumps(_raw(row)) + "\n" for row in rows))
    return Source(Spec(str(file), **presets), share, 1)


def _raw(row: Row) -> dict:
    if not row.prompt:
        return {"text": row.chosen}
    if row.rejected is not None and row.chosen is None:
        return {"prompt": row.prompt, "completion": row.rejected, "label": False}
    if row.rejected is not None:
        return {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
    return {"prompt": row.prompt, **({"completion": row.chosen} if row.chosen is not None else {})}
