"""Tensors of an HF folder, read by the slice and written one after the other, in files of a limited size."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import ConfigError
from ..surviving import durable
from .config import family, read_json
from .index import SCORE_BIAS, index, lm_head, stored_tensors, untied
from .rows import Window

# Besides weights and config.json, what an HF folder may hold that belongs to the model. Never code.
ASSETS = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"

# types of weights by their names in safetensors files
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_PIECE = 1 << 18  # bytes of a write


class HFFolder:
    """The weights of an HF folder, by the names of its architecture's table; only the slices asked for are read.

    Raises:
        ConfigError: see `index`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json")
        self.tensors = index(folder)
        self._bin: tuple[Path, dict[str, Tensor]] | None = None
        self._check_tied()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or name == SCORE_BIAS

    def read(self, window: Window) -> Tensor:
        """A window of a tensor.

        Raises:
            ConfigError: the tensor is absent, of another shape, quantised, or has entries that are not finite.
        """
        if (entry := self.tensors.get(window.name)) is None:
            if window.name == SCORE_BIAS:
                return torch.tensor([float(self.config.get("score_bias", 0.0))])
            raise ConfigError(f"{self.folder} has no tensor {window.name}")
        path, name = entry.path, entry.name
        if entry.shape != window.shape:
            raise ConfigError(f"{path}: {name} has shape {entry.shape}, and config.json makes it {window.shape}")
        bounds = (slice(None),) * window.dim + (slice(window.start, window.stop),)
        if path.suffix == ".bin":
            tensor = self._load_bin(path)[name][bounds]
        else:
            try:
                # opened anew each time: a file that stays mapped counts as memory for what was read of it
                with safe_open(path, "pt") as file:
                    tensor = file.get_slice(name)[bounds]
            except SafetensorError as error:
                raise ConfigError(f"{path}: {error}") from None
        if tensor.dtype not in _NAMES:
            raise ConfigError(f"{path}: {name} is stored as {tensor.dtype}: a quantised model is not read")
        if tensor.numel() and not all(bool(end.isfinite()) for end in tensor.aminmax()):  # which pass NaN on
            raise ConfigError(f"{path}: {name} has entries that are not finite")
        return tensor

    def _check_tied(self) -> None:
        """Drops an LM head that the index could not tell from the embedding that it is tied to."""
        where = self.folder / "config.json"
        architecture, kind = family(self.config, str(where))
        head, embedding = lm_head(architecture)
        tied = self.config.get("tie_word_embeddings", architecture.defaults["tie_word_embeddings"])
        if kind == "lm" and tied and head in self.tensors:
            shape = self.tensors[head].shape
            whole = [self.read(Window(name, shape, 0, 0, shape[0])) for name in (head, embedding)]
            if not torch.equal(*(tensor.double() if whole[0].dtype != whole[1].dtype else tensor for tensor in whole)):
                raise ConfigError(untied(where, head, embedding))
            del self.tensors[head]

    def _load_bin(self, path: Path) -> dict[str, Tensor]:
        if self._bin is None or self._bin[0] != path:
            mapped = zipfile.is_zipfile(path)  # files of torch < 1.6 are none
            try:
                self._bin = (path, torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
            except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(f"{path} cannot be read without running code from it: {reason}") from None
        return self._bin[1]


class PieceFile(io.FileIO):
    """Written in small pieces. A whole tensor at once would ask the page cache for huge pages, which in a virtual
    machine take three times as long to come by."""

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        for i in range(0, len(view), _PIECE):
            piece = view[i : i + _PIECE]
            while len(piece):
                piece = piece[super().write(piece) :]
        return len(view)


class TensorFile:
    """A safetensors file that is written one tensor after the other, so that none but that is in memory; safetensors'
    own writer takes all at once.

    Args:
        tensors: those that will come, by their names and in their order, on any device. Where types differ the widest
            come first, so that each is aligned.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, tensor in tensors.items():
            place = [start, start + tensor.nbytes]
            header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
            start += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.file = PieceFile(path, "wb")
        self.file.write(len(text).to_bytes(8, "little") + text)

    def add(self, tensor: Tensor) -> None:
        """The next one, on any device."""
        self.file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *error: object) -> None:
        """All of it is on the disk then."""
        with self.file:
            if error[0] is None:
                os.fsync(self.file.fileno())


def write_files(folder: Path, files: Mapping[str, Mapping[str, Tensor]], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Safetensors files by their names.

    Args:
        files: see `TensorFile`.
        tensors: of all of them in their order.
    """
    for name, wanted in files.items():
        with TensorFile(folder / name, wanted) as file:
            for expected in wanted:
                found, tensor = next(tensors)
                assert (found, tensor.shape, tensor.dtype) == (expected, wanted[expected].shape, wanted[expected].dtype)
                file.add(tensor)


def file_names(count: int) -> list[str]:
    """Of the weights of an HF folder."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def cut(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Consecutive names for each file, of `max_bytes` at most; one that is larger has its own."""
    files: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        if not files or size > left:
            files.append([])
            left = max_bytes
        files[-1].append(name)
        left -= size
    return files


def complete(folder: Path, names: Sequence[str], config: dict[str, Any]) -> None:
    """Their index, where there are several, put together from their headers, and config.json with their type."""
    weight_map: dict[str, str] = {}
    total, dtypes = 0, set()
    for file in names:
        for name, entry in stored_tensors(folder / file).items():
            weight_map[name] = file
            total += entry.stop - entry.start
            dtypes.add(entry.dtype)
    if len(names) > 1:
        listing = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", listing)
    if len(dtypes) == 1:
        (dtype,) = (dtype for dtype, name in _NAMES.items() if name in dtypes)
        key = "dtype" if "dtype" in config else "torch_dtype"
        config = config | {key: str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", config)


def copy_assets(source: Path, folder: Path) -> None:
    """What an HF folder holds of a model besides its weights and config.json."""
    for name in ASSETS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (templates := source / TEMPLATES).is_dir():
        shutil.copytree(templates, folder / TEMPLATES, ignore=lambda _, names: [n for n in names if n[-6:] != ".jinja"])


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes values as HF folders have them."""
    path.write_text(json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def whole_folder(target: Path, manifest: dict[str, Any] | None = None) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name once it is whole; an error leaves nothing behind.

    Args:
        manifest: what is being made. A process that was killed or interrupted leaves its folder, and one with the
            same manifest goes on in it; without a manifest it is emptied first, and nothing is left to go on with.
    """
    temporary = target.with_name(target.name + ".incomplete")
    listing = temporary / "manifest.json"
    if manifest is None or not listing.is_file() or listing.read_text() != json.dumps(manifest):
        shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True, exist_ok=True)
    if manifest is not None:
        listing.write_text(json.dumps(manifest))
    try:
        yield temporary
        listing.unlink(missing_ok=True)
        for path in (*temporary.rglob("*"), temporary):
            durable.sync(path)
    except BaseException as error:
        if manifest is None or isinstance(error, Exception):
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    replaced = target.with_name(target.name + ".replaced")
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(target, replaced)
    durable.move(temporary, target)
    shutil.rmtree(replaced, ignore_errors=True)
