"""The device "cuda" where there is none: a few lines of C++, compiled at first use and loaded before torch is."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from ..config import ConfigError

_SOURCE = Path(__file__).with_name("shim.cpp")


def load() -> None:
    """Loads the shim into this process, where torch must not have been imported yet.

    Raises:
        ConfigError: there is no C++ compiler, or it fails.
    """
    library = built()
    for own in (_torch() / "lib").glob("libtorch_cuda.so"):  # of a CUDA build: what comes later replaces it
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(own))
    ctypes.CDLL(str(library))


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def built() -> Path:
    """The compiled shim for the torch that is installed, made where it is not there.

    Raises:
        ConfigError: there is no C++ compiler, or it fails.
    """
    torch = _torch()
    version = importlib.metadata.version("torch")
    key = hashlib.sha256(f"{version} {torch}".encode() + _SOURCE.read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf_engine"
    library = cache / f"cuda_shim_{key}.so"
    if not library.is_file():
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        if compiler is None:
            raise ConfigError("a rehearsal needs a C++ compiler once, and there is none: install g++, or set CXX")
        cache.mkdir(parents=True, exist_ok=True)
        temporary = library.with_suffix(f".{os.getpid()}")
        command = [
            compiler, "-shared", "-fPIC", "-std=c++20", "-O1", f"-I{torch / 'include'}", str(_SOURCE),
            f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(temporary),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise ConfigError(f"{compiler} cannot compile {_SOURCE.name}: {_first_error(result.stderr)}")
        os.replace(temporary, library)  # another rank may have made the same
    return library


def _first_error(said: str) -> str:
    lines = said.strip().splitlines() or ["no reason given"]
    return next((line for line in lines if "error" in line), lines[-1])
