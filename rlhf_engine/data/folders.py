"""Which files of a folder are rows to train on, by the rules of the `datasets` library and a little wider.

https://huggingface.co/docs/hub/datasets-file-names-and-splits
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

KINDS = (".jsonl", ".ndjson", ".json", ".parquet")
PACKED = (".gz", ".zst")  # what may stand behind them
TEST_SPLIT = "called a test split"  # why a file is not read

# What a data set says of itself, and no rows
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # "testPrefs_v2" has test, Prefs, v
_TRAIN = re.compile(r"\btrain(ing)?( ?(set|split|data))?\b")
_HELD_OUT = re.compile(
    r"\b(tests?|testing|eval|evals|evaluation|val|valid|validation|dev|held ?out|hold ?out)( ?(set|split|data))?\b"
)
_SHOWN = 8  # names in a line


@dataclass
class Folder:
    """What of a folder is read, in order, and why the rest is not: reason -> names, relative to the folder."""

    path: Path
    files: list[Path]
    left_out: dict[str, list[str]]

    def __str__(self) -> str:
        """A line for people."""
        read = _names([file.relative_to(self.path).as_posix() for file in self.files])
        left_out = "; ".join(f"{_names(names)} ({reason})" for reason, names in self.left_out.items())
        return f"{self.path}: read {read or 'nothing'}" + (f"; not read: {left_out}" if left_out else "")


def look_into(path: Path) -> Folder:
    """Sorts the files of a folder.

    What is hidden, of another kind, or called a test split is not read; and where some files are called train, only
    those are. A file's split is what the front matter of README.md says (`configs`, `data_files`), or else what its own
    name and those of the folders around it say, up to `path`.
    """
    files = {file.relative_to(path).as_posix(): file for file in _walk(path)}
    obstacles = {name: _obstacle(file) for name, file in files.items()}
    splits = _splits([name for name, obstacle in obstacles.items() if obstacle is None], _card(path))
    if "train" in splits.values():
        obstacles |= {name: "not called train, as others are" for name, split in splits.items() if split is None}
    obstacles |= {name: TEST_SPLIT for name, split in splits.items() if split == "test"}
    left_out: dict[str, list[str]] = {}
    for name, obstacle in obstacles.items():
        if obstacle is not None:
            left_out.setdefault(obstacle, []).append(name)
    return Folder(path, [file for name, file in files.items() if obstacles[name] is None], left_out)


def _splits(names: list[str], card: list[tuple[str | None, str]]) -> dict[str, str | None]:
    """`train`, `test` or None for each file, by a card that lists some of them, else by their names."""
    if not any(fnmatchcase(name, pattern) for name in names for _, pattern in card):
        return {name: _split(name) for name in names}
    found = {name: {split for split, pattern in card if fnmatchcase(name, pattern)} for name in names}
    return {name: next((s for s in ("train", "test") if s in said), None) for name, said in found.items()}


def kind(path: Path) -> str:
    """A file's kind, in small letters: `.jsonl` of rows.JSONL.gz."""
    name = path.name.lower()
    for suffix in PACKED:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def _walk(path: Path) -> Iterator[Path]:
    """Files below a folder, in order, links to folders followed; a hidden folder stands for all that is in it."""
    seen: set[str] = set()
    files: list[Path] = []
    for root, folders, names in os.walk(path, followlinks=True):
        if (real := os.path.realpath(root)) in seen:  # a link back
            folders.clear()
            continue
        seen.add(real)
        files += [Path(root, name) for name in (*names, *(name for name in folders if _is_hidden(name)))]
        folders[:] = [name for name in folders if not _is_hidden(name)]
    yield from sorted(files)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _obstacle(file: Path) -> str | None:
    """Why a file has no rows for us, whatever its split."""
    if _is_hidden(file.name):
        return "hidden"
    if file.name in _METADATA:
        return "about the data set"
    if not file.is_file() or kind(file) not in KINDS:
        return f"not {', '.join(KINDS)}"
    if file.suffix in PACKED and file.with_suffix("").is_file():
        return "packed, and beside it unpacked"
    return None


def _split(name: str) -> str | None:
    """`train`, `test` or None for a path. A folder or file that is called both, like train_test_split, says nothing."""
    said = [" ".join(_WORD.findall(part)).lower() for part in Path(name).parts]
    trains, tests = ({i for i, words in enumerate(said) if rule.search(words)} for rule in (_TRAIN, _HELD_OUT))
    return "test" if tests - trains else "train" if trains - tests else None


def _card(path: Path) -> list[tuple[str | None, str]]:
    """Split and pattern of each entry of `data_files` in a data set's README.md; none where it says nothing."""
    try:
        _, matter, _ = (path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        configs = yaml.safe_load(matter)["configs"]
        entries = [entry for config in configs for entry in _entries(config.get("data_files", []))]
        return [(_split(split), pattern.replace("**/", "*")) for split, pattern in entries]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return []


def _entries(data_files: str | list) -> Iterator[tuple[str, str]]:
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        split, paths = (entry["split"], entry["path"]) if isinstance(entry, dict) else ("train", entry)
        for pattern in paths if isinstance(paths, list) else [paths]:
            yield split, pattern


def _names(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
