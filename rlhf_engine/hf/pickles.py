"""Names and shapes of the tensors of a `.bin` file, by the standard library alone and without running code from it."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

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


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor in the file.

    Raises:
        pickle.UnpicklingError: it holds something other than named tensors.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                (listing,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
                with archive.open(listing) as file:
                    found = _Shapes(file).load()
        else:
            with path.open("rb") as file:
                found = _legacy(file)
    except (zipfile.BadZipFile, ValueError, TypeError, IndexError, EOFError, AttributeError, KeyError) as error:
        raise pickle.UnpicklingError(str(error) or "it is cut off") from None
    named = isinstance(found, dict) and all(isinstance(key, str) and isinstance(v, tuple) for key, v in found.items())
    if not found or not named:
        raise pickle.UnpicklingError("it holds something other than tensors by name")
    return dict(found)


def _legacy(file: IO[bytes]) -> Any:
    for _ in range(_LEGACY_HEADER):
        _Shapes(file).load()
    return _Shapes(file).load()
