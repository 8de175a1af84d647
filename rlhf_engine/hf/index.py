"""Which file of an HF folder holds which tensor. Standard library alone, so that a broken folder is refused early."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..config import ConfigError
from .config import read_json


@dataclass(frozen=True)
class Entry:
    """A tensor's file and shape; the shape of one in a `.bin` file is known when it is read (None)."""

    path: Path
    shape: tuple[int, ...] | None


def index(folder: str | Path) -> dict[str, Entry]:
    """Every tensor of an HF folder, by name.

    Raises:
        ConfigError: there are no weights, a file is absent or cut off, or lacks a tensor that the index promises.
    """
    root = Path(folder)
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (listing := root / f"{stem}.index.json").is_file():
            return _listed(listing)
        if (single := root / stem).is_file():
            # a pickle names its tensors when it is read: "" stands for all of them
            found = _shapes(single) if single.suffix == ".safetensors" else {"": None}
            return {name: Entry(single, shape) for name, shape in found.items()}
    raise ConfigError(f"{folder} has no weights: model.safetensors or pytorch_model.bin, or an index of several")


def _listed(listing: Path) -> dict[str, Entry]:
    files: dict[str, str] = read_json(listing).get("weight_map", {})
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in sorted(set(files.values())):
        path = listing.parent / name
        if not path.is_file():
            raise ConfigError(f"{listing} names {name}, which is not there")
        if path.suffix == ".safetensors":
            shapes[name] = _shapes(path)
    for tensor, name in files.items():
        if name in shapes and tensor not in shapes[name]:
            raise ConfigError(f"{listing} places {tensor} in {name}, which does not have it")
    return {tensor: Entry(listing.parent / name, shapes.get(name, {}).get(tensor)) for tensor, name in files.items()}


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes from a safetensors header, whose offsets must end where the file ends."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if 8 + length > size:
                raise ConfigError(f"{path} is cut off or no safetensors file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{path} is no safetensors file: {error}") from None
    if 8 + length + end != size:
        raise ConfigError(f"{path} is cut off: {size} bytes, and its header speaks of {8 + length + end}")
    return shapes
