"""Tensors of an HF folder, read by the slice and written in files of a limited size."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import ConfigError
from ..surviving import durable
from .config import family, read_json
from .index import SCORE_BIAS, index, lm_head, untied
from .rows import Window

# Besides weights and config.json, what an HF folder may hold that belongs to the model. Never code.
ASSETS = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
        if tensor.dtype not in _DTYPES:
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


class HFWriter:
    """Writes tensors as safetensors files of at most `max_bytes` each, with an index where there are several."""

    def __init__(self, folder: Path, max_bytes: int = 5 * 10**9):
        self.folder, self.max_bytes = folder, max_bytes
        self.score_bias: float | None = None
        self.pending: dict[str, Tensor] = {}
        self.files: list[list[str]] = []
        self.num_bytes = 0
        self.dtypes: set[torch.dtype] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """A whole tensor, on any device."""
        if name == SCORE_BIAS:
            self.score_bias = float(tensor)
            return
        if self.pending and sum(t.nbytes for t in self.pending.values()) + tensor.nbytes > self.max_bytes:
            self._flush()
        self.pending[name] = tensor.cpu().contiguous()
        self.num_bytes += tensor.nbytes
        self.dtypes.add(tensor.dtype)

    def _flush(self) -> None:
        try:
            save_file(self.pending, self.folder / f"part-{len(self.files)}", {"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{self.folder}: {error}") from None
        self.files.append(list(self.pending))
        self.pending = {}

    def close(self, config: dict[str, Any]) -> None:
        """The index, and config.json with the dtype that was written."""
        self._flush()
        total = len(self.files)
        names = [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
        if total == 1:
            names = ["model.safetensors"]
        else:
            weight_map = {tensor: name for name, part in zip(names, self.files, strict=True) for tensor in part}
            listing = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / "model.safetensors.index.json", listing)
        for i, name in enumerate(names):
            os.replace(self.folder / f"part-{i}", self.folder / name)
        if len(self.dtypes) == 1:
            (dtype,) = self.dtypes
            key = "dtype" if "dtype" in config else "torch_dtype"
            config = config | {key: str(dtype).removeprefix("torch.")}
        if self.score_bias:
            config = config | {"score_bias": self.score_bias}
        write_json(self.folder / "config.json", config)


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
