"""`retrieve`: passages of a local file, found by BM25 (Robertson and Zaragoza 2009) as bm25s has it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, ClassVar

from ..config import ConfigError
from .tools import ToolEnvironment, schema

_TEXT = ("text", "contents", "content", "passage")
_LONGEST = 2000  # characters of a passage


class Retrieve(ToolEnvironment):
    """A tool that searches.

    Args:
        file: .jsonl, each line an object with `text` and perhaps a `title`, or text whose paragraphs are the passages.
        k: passages that are shown where the model does not say how many.
        scored: see `ToolEnvironment`.
    """

    tools: ClassVar = [
        schema(
            "search",
            "Finds the passages that fit a query best.",
            query=("string", "Words to look for"),
            k=("integer?", "How many passages"),
        )
    ]

    def __init__(self, file: str, k: int = 3, scored: bool = False):
        super().__init__(scored)
        self._passages, self._index = indexed(file)
        self._k = k

    @classmethod
    def prepare(cls, **args: Any) -> None:
        """Reads the file once for all."""
        cls(**args)

    def search(self, query: str, k: int | None = None) -> str:
        """The passages, the best first, each as a paragraph with its number."""
        import bm25s

        k = min(max(1, int(k or self._k)), len(self._passages))
        words = bm25s.tokenize([str(query)], show_progress=False)
        (found,), (scores,) = self._index.retrieve(words, k=k, show_progress=False)
        best = [i for i, score in zip(found.tolist(), scores.tolist(), strict=True) if score > 0]
        if not best:
            return "nothing was found"
        return "\n\n".join(f"[{place}] {self._passages[i][:_LONGEST]}" for place, i in enumerate(best, 1))


@functools.cache
def indexed(file: str) -> tuple[list[str], Any]:
    """The passages of a file and their index.

    Raises:
        ConfigError: it is not there or has none, or bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise ConfigError("it needs bm25s: pip install -e '.[retrieve]'") from None
    if not Path(file).is_file():
        raise ConfigError(f"env.args.file={file} is not there")
    passages = _passages(Path(file))
    if not passages:
        raise ConfigError(f"env.args.file={file} has no passages")
    index = bm25s.BM25(backend="numpy")
    index.index(bm25s.tokenize(passages, show_progress=False), show_progress=False)
    return passages, index


def _passages(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".jsonl":
        return [part for part in (" ".join(part.split()) for part in text.split("\n\n")) if part]
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            said = next(row[key] for key in _TEXT if key in row)
        except (ValueError, TypeError, StopIteration):
            raise ConfigError(f"{file}:{number} is not an object with 'text', one a line") from None
        found.append(f"{row['title']}: {said}" if row.get("title") else str(said))
    return found
