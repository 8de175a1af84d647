"""Tensors that leave the device while nobody needs them, and come back to where every view of them still looks.

A storage is emptied and later filled again. So parameters, megatron's flat buffers with their views, and the shards
that the optimizer keeps of them all stay the objects that they are. From a GPU they go to page-locked memory, through
streams of their own beside the computation; from a CPU, whose memory there is no other to relieve, to files.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Iterable
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from ..signals import RunError
from ..surviving import durable


class Presence(IntEnum):
    """How much of a role is on the device."""

    AWAY = 0
    WEIGHTS = 1
    STATE = 2  # the optimizer's too: what a checkpoint holds
    TRAINING = 3  # gradients too


class Parcel:
    """Tensors that leave and arrive together.

    Args:
        find: lists them, before each departure: an optimizer may have been given new ones.
        path: of the files, to which a number is added; only read where the device is a CPU; None: nothing is copied,
            and they come back undefined.

    Attributes:
        is_copied: whether what was copied off last is what they hold. Whoever changes them says that it is not.
    """

    def __init__(self, find: Callable[[], Iterable[Tensor]], device: torch.device, path: Path | None):
        self.find, self.device, self.path = find, device, path
        self.is_copied = False
        self._away: list[tuple[UntypedStorage, int]] = []  # storages and their bytes
        self._host: list[Tensor] = []
        self._left: torch.cuda.Event | None = None
        self._arrived: torch.cuda.Event | None = None

    def leave(self) -> None:
        """Copies what must be kept and frees the memory; on a GPU once the copy is through, which is not waited for."""
        self.wait()
        found = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in self.find()}
        self._away = [(storage, storage.nbytes()) for storage in found.values()]
        if self.path is not None and not self.is_copied:
            self._copy_off(self.path)
            self.is_copied = True
        for storage, _ in self._away:
            storage.resize_(0)

    def arrive(self) -> None:
        """Brings everything back. On a GPU the copies may still be under way: `wait` before they are used."""
        if self.device.type == "cuda":
            _wait_for_room(self.device, sum(size for _, size in self._away))
        for storage, size in self._away:
            storage.resize_(size)
        if self.path is None:
            return
        if self.device.type != "cuda":
            for i, (storage, size) in enumerate(self._away):
                file = _file(self.path, i)
                with file.open("rb") as reader:
                    if (found := reader.readinto(_memory(storage))) != size:
                        raise RunError(f"{file} has {found} bytes of {size}: start the same again")
            return
        _, back = _streams(self.device)
        back.wait_stream(torch.cuda.current_stream(self.device))  # which had this memory before
        assert self._left is not None
        back.wait_event(self._left)
        with torch.cuda.stream(back):
            for (storage, _), host in zip(self._away, self._host, strict=True):
                _bytes(storage).copy_(host, non_blocking=True)
                _bytes(storage).record_stream(back)
            self._arrived = back.record_event()

    def wait(self) -> None:
        """Lets the current stream go on only behind the last arrival."""
        if self._arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived)
            self._arrived = None

    def _copy_off(self, path: Path) -> None:
        if self.device.type != "cuda":
            durable.make_folder(path.parent)
            with durable.needed(path):
                for i, (storage, _) in enumerate(self._away):
                    _file(path, i).write_bytes(_memory(storage))
            return
        sizes = [size for _, size in self._away]
        if [host.nbytes for host in self._host] != sizes:
            self._host = list(host_memory(sum(sizes), self.device).split(sizes))
        off, _ = _streams(self.device)
        off.wait_stream(torch.cuda.current_stream(self.device))  # whose results are to be copied
        with torch.cuda.stream(off):
            for (storage, _), host in zip(self._away, self._host, strict=True):
                host.copy_(_bytes(storage), non_blocking=True)
                _bytes(storage).record_stream(off)  # the allocator keeps the memory until then
            self._left = off.record_event()


def _file(path: Path, i: int) -> Path:
    return path.with_name(f"{path.name}.{i}")


def host_memory(size: int, device: torch.device) -> Tensor:
    """So many bytes, page-locked where they are copied to and from a GPU. torch's own page-locked memory would be
    rounded up to a power of two, and stay with the process."""
    memory = torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda" and size:
        runtime: Any = torch.cuda.cudart()
        torch.cuda.check_error(int(runtime.cudaHostRegister(memory.data_ptr(), size, 0)))
        weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, memory.data_ptr()).atexit = False
    return memory


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """For what leaves, and for what comes back: a GPU copies both ways at once."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def _wait_for_room(device: torch.device, size: int) -> None:
    """Waits for what is leaving, if without its memory there are not so many bytes: the allocator would give back all
    that it holds and ask the driver anew."""
    stats = torch.cuda.memory_stats(device)
    unused = stats.get("reserved_bytes.all.current", 0) - stats.get("active_bytes.all.current", 0)
    if torch.cuda.mem_get_info(device)[0] + unused < size:
        _streams(device)[0].synchronize()


def _memory(storage: UntypedStorage) -> ctypes.Array:
    """A buffer over it. numpy's view would do as well, but torch never resizes again what numpy has seen."""
    return (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
