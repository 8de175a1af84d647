"""Pickles in other people's folders, read without running code from them: the names and shapes of the tensors of a
`.bin` file, and the index of a checkpoint. The standard library alone."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

from ..config import ConfigError

_LEGACY_HEADER = 3  # pickles before the tensors in files of torch < 1.6: a magic number, a version, the machine


class _Shapes(pickle.Unpickler):
    """Makes of a tensor its shape, and refuses to look up anything that is not part of one."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "OrderedDict":
            return OrderedDict
        if name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, *rest: tuple(size)
        if name == "_rebuild_parameter":
            return lambda shape, *rest: shape
        if module.partition(".")[0] == "torch":  # a kind of storage, whose name is all that is wanted of it
            return f"{module}.{name}"
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid


_IN_AN_INDEX = re.compile(
    r"torch\.distributed\.checkpoint\.(metadata\.(Metadata|StorageMeta|MetadataIndex|\w+StorageMetadata|TensorProperties"
    r"|_MEM_FORMAT_ENCODING)|planner\.(SavePlan|WriteItem|WriteItemType|TensorWriteData|BytesIOWriteData)"
    r"|filesystem\.(_StorageInfo|_StoragePrefix))|torch\.serialization\._get_layout|pathlib\.(_local\.)?PosixPath"
    r"|torch\.(Size|bool|bfloat16|(u?int|float|complex)\d+\w*)"
)


class _Index(pickle.Unpickler):
    """Knows torch's classes of a checkpoint's index, sizes and types alone."""

    def find_class(self, module: str, name: str) -> Any:
        if not _IN_AN_INDEX.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.known(module, name)

    known = pickle.Unpickler.find_class


class _Check(_Index):
    def known(self, module: str, name: str) -> Any:
        return type(name, (), dict.fromkeys(("__init__", "__setstate__"), lambda self, *args: None))


def load_index(file: IO[bytes], kind: type[_Index] = _Index) -> Any:
    """`read_index` of an open `.metadata`."""
    try:
        return kind(file).load()
    except Exception as error:  # whatever a pickle may bring about
        raise ConfigError(f"{file.name} cannot be read without running code from it: {error or 'cut off'}") from None


def read_index(folder: str | Path, is_wanted: bool = True) -> Any:
    """A checkpoint's `.metadata`: what it holds and where.

    Args:
        is_wanted: False looks at it without torch, and what it returns is of no use.

    Raises:
        ConfigError: it asks for code, or is no index.
    """
    with (Path(folder) / ".metadata").open("rb") as file:
        return load_index(file, _Index if is_wanted else _Check)


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor in the file.

    Raises:
        pickle.UnpicklingError: it asks for code.
        ValueError: it is cut off, or holds something other than tensors by name.
    """
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(path):
                _seek(file)
            else:
                for _ in range(_LEGACY_HEADER):
                    _Shapes(file).load()
            found = _Shapes(file).load()
    except (zipfile.BadZipFile, struct.error, TypeError, IndexError, EOFError, AttributeError, KeyError) as error:
        raise ValueError(str(error) or "cut off") from None
    named = isinstance(found, dict) and all(isinstance(key, str) and isinstance(v, tuple) for key, v in found.items())
    if not found or not named:
        raise ValueError("what it holds is not tensors by name")
    return dict(found)


def _seek(file: IO[bytes]) -> None:
    """To where the pickle in a torch archive begins. zipfile asks for its checksum, which torch need not write."""
    with zipfile.ZipFile(file) as archive:
        (info,) = (info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
    file.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    file.seek(name + extra, 1)
