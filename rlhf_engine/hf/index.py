"""Which file of an HF folder holds which tensor. Standard library alone, so that a broken folder is refused early.

Which files are read is as in transformers: one safetensors file, else the files of its index, else the same for `.bin`.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..config import ConfigError
from . import pickles
from .architecture import Architecture
from .config import family, read_json

SCORE_BIAS = "score.bias"  # HF's scalar heads have no bias: ours stands in config.json, under `score_bias`
# a score's head beside the model of TRL and LLaMA-Factory (the latter in a file of its own), and of OpenRLHF
_VALUE_HEADS = ("v_head.summary", "v_head", "value_head")
_HEAD_FILES = ("value_head.safetensors", "value_head.bin")
_NO_WEIGHTS = re.compile(r"(training_args|optimizer.*|scheduler|rng_state.*|random_states.*)\.(bin|pt|pth)")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or an index of several such files; the first that is there
_PIECE = 1 << 22  # bytes compared at once


@dataclass(frozen=True)
class Entry:
    """A tensor's file, its name in there, its shape, and its type and bytes (None in a `.bin` file)."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str | None = None
    start: int = 0
    stop: int = 0

    def same(self, other: Entry) -> bool | None:
        """Whether two tensors have the same numbers, told by their bytes; None where those cannot tell."""
        if self.shape != other.shape:
            return False
        if self.dtype is None or self.dtype != other.dtype:
            return None
        with self.path.open("rb") as mine, other.path.open("rb") as theirs:
            mine.seek(self.start)
            theirs.seek(other.start)
            for place in range(self.start, self.stop, _PIECE):
                size = min(_PIECE, self.stop - place)
                if mine.read(size) != theirs.read(size):
                    return False
        return True


def index(folder: str | Path) -> dict[str, Entry]:
    """Every tensor of an HF folder, by the name that its architecture's table has for it.

    Raises:
        ConfigError: there are no weights, a file is absent or cut off, lacks a tensor that the index promises or has
            one that it does not name, or the folder contradicts its config.json.
    """
    root = Path(folder)
    check_adapter(root)
    config_path = root / "config.json"
    config = read_json(config_path)
    architecture, kind = family(config, str(config_path))
    tied = config.get("tie_word_embeddings", architecture.defaults["tie_word_embeddings"])
    head, embedding = lm_head(architecture)
    stored: dict[str, Entry] = {}
    for path in weight_files(root):
        for name, entry in _tensors(path).items():
            if name in stored and not stored[name].same(entry):
                raise ConfigError(f"{path} and {stored[name].path} both have a tensor {name}: remove one of the files")
            stored.setdefault(name, entry)
    if (listing := _listing(root)) is not None:
        _check_listing(listing, stored, {head} if tied else set())  # saving drops what shares its memory with another
    found = _named(stored, architecture)
    score = found.get(architecture.score)
    if score is not None and score.shape[0] != 1:
        raise ConfigError(f"{score.path}: {score.name} has {score.shape[0]} labels, and a reward model has one")
    if kind == "lm" and not tied and head not in found and score is None:
        raise ConfigError(
            f"{folder} has no tensor {head}, and config.json does not tie it to {embedding}: if it is tied,"
            f" set tie_word_embeddings to true in {config_path}"
        )
    if kind == "lm" and tied and head in found:
        _tie(found, head, embedding, config_path)
    return found


def lm_head(architecture: Architecture) -> tuple[str, str]:
    """HF names of the LM head's weight and of the embedding that it may be tied to."""
    rows = {row.megatron: row.hf for row in architecture.rows}
    return rows["output_layer.weight"], rows["embedding.word_embeddings.weight"]


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder is a megatron checkpoint. With an HF folder's weights in it, it is an HF folder."""
    files = (f"{stem}{suffix}" for stem in _WEIGHTS for suffix in ("", ".index.json"))
    root = Path(folder)
    return (root / ".metadata").is_file() and not any((root / name).is_file() for name in files)


def weight_files(root: Path) -> list[Path]:
    """The files that tensors are read from, all of which are there."""
    for stem in _WEIGHTS:
        if (root / stem).is_file():
            files = [root / stem]
            break
        if (listing := root / f"{stem}.index.json").is_file():
            files = [root / name for name in sorted(set(_weight_map(listing).values()))]
            for path in files:
                if not path.is_file():
                    raise ConfigError(f"{listing} names {path.name}, which is not there")
            break
    else:
        there = f", and holds {_listed(_weights(root))}" if _weights(root) else ""
        raise ConfigError(
            f"{root} has no weights: model.safetensors or pytorch_model.bin, or an index of several{there}"
        )
    head = next((root / name for name in _HEAD_FILES if (root / name).is_file()), None)
    return files if head is None or head in files else [*files, head]


def unread_files(folder: str | Path) -> list[Path]:
    """What looks like weights and is not read: an older copy, another format, an index that is left over."""
    root = Path(folder)
    read = weight_files(root)
    listing = _listing(root)
    return [path for path in _weights(root) if path not in read and path != listing]


def check_adapter(folder: str | Path) -> None:
    """Raises:
    ConfigError: the folder holds what was trained on top of another model.
    """
    kinds = ("adapter_*.json", "adapter_*.safetensors", "adapter_*.bin")
    if found := sorted(path.name for kind in kinds for path in Path(folder).glob(kind)):
        raise ConfigError(
            f"{folder} has an adapter ({', '.join(found)}), which is not applied here: merge it into its model first"
            " (peft: merge_and_unload, then save_pretrained), or remove these files if that is done"
        )


def _weights(root: Path) -> list[Path]:
    kinds = (
        "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pth", "*.pt", "*.gguf", "*.h5",
        "*.msgpack", "*.distcp", ".metadata",
    )  # fmt: skip
    found = {path for kind in kinds for path in root.glob(kind)}
    return sorted(path for path in found if not _NO_WEIGHTS.fullmatch(path.name))


def _listed(paths: Iterable[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"])


def _listing(root: Path) -> Path | None:
    """The index that is used."""
    for stem in _WEIGHTS:
        if (root / stem).is_file():
            return None
        if (listing := root / f"{stem}.index.json").is_file():
            return listing
    return None


def _weight_map(listing: Path) -> dict[str, str]:
    found = read_json(listing).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise ConfigError(f"{listing} has no weight_map of tensors and their files")
    return found


def _check_listing(listing: Path, stored: dict[str, Entry], optional: set[str]) -> None:
    named = _weight_map(listing)
    for tensor, file in named.items():
        if tensor in optional and tensor not in stored:
            continue
        if tensor not in stored or not (stored[tensor].path.name == file or tensor in _tensors(listing.parent / file)):
            raise ConfigError(f"{listing} places {tensor} in {file}, which does not have it")
    for tensor, entry in stored.items():
        if tensor not in named and entry.path.name not in _HEAD_FILES:
            raise ConfigError(f"{entry.path} has a tensor {tensor}, which {listing.name} does not name")


def _named(stored: dict[str, Entry], architecture: Architecture) -> dict[str, Entry]:
    """Under the names of the table: published models come with the family's prefix and without, and a score's head
    has several names."""
    rows = _rows(architecture)
    prefix = architecture.rows[0].hf.partition(".")[0]
    found: dict[str, Entry] = {}
    for name, entry in stored.items():
        plain = f"{prefix}.{name}"
        found[plain if rows.fullmatch(plain) and plain not in stored and not rows.fullmatch(name) else name] = entry
    for head in _VALUE_HEADS:
        if f"{head}.weight" in found and architecture.score not in found:
            found[architecture.score] = found.pop(f"{head}.weight")
            if f"{head}.bias" in found:
                found[SCORE_BIAS] = found.pop(f"{head}.bias")
    return found


@lru_cache
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(name).replace(r"\*", r"\d+") for name in names))


def _rows(architecture: Architecture) -> re.Pattern[str]:
    return _pattern(tuple(name for row in architecture.rows for name in row.hf.split()))


def _tie(found: dict[str, Entry], head: str, embedding: str, config: Path) -> None:
    """A tied LM head is the embedding, under either name, or an equal copy of it, which is left out."""
    if embedding not in found:
        found[embedding] = found.pop(head)
    elif (same := found[head].same(found[embedding])) is False:
        raise ConfigError(untied(config, head, embedding))
    elif same:
        del found[head]


def untied(config: Path, head: str, embedding: str) -> str:
    """What to say of a tied LM head that is not."""
    return (
        f"{config} ties {head} to {embedding}, and the weights have other numbers for it: set tie_word_embeddings to"
        " false there to use them, or remove the tensor"
    )


def _tensors(path: Path) -> dict[str, Entry]:
    if path.suffix == ".safetensors":
        return stored_tensors(path)
    try:
        return {name: Entry(path, name, shape) for name, shape in pickles.shapes(path).items()}
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{path} cannot be read without running code from it: {error}") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} is no file of tensors: {error}") from None


def stored_tensors(path: Path) -> dict[str, Entry]:
    """Of a safetensors file, from its header, whose offsets must end where the file ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        if begin > size:
            raise ConfigError(f"{path} is cut off or no safetensors file")
        text = file.read(begin - 8)
    found = {}
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            start, stop = tensor["data_offsets"]
            found[name] = Entry(path, name, tuple(tensor["shape"]), tensor["dtype"], begin + start, begin + stop)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{path} is no safetensors file: {error}") from None
    end = max((entry.stop for entry in found.values()), default=begin)
    if end != size:
        raise ConfigError(f"{path} is cut off: {size} bytes, and its header speaks of {end}")
    return found
