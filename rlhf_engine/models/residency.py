"""Tensors that leave the device while nobody needs them, and come back to where every view of them still looks.

A storage is emptied and later filled again. So parameters, megatron's flat buffers with their views, and the shards
that the optimizer keeps of them all stay the objects that they are. From a GPU they go to pinned memory, through a
stream of their own beside the computation; from a CPU, whose memory there is no other to relieve, to files.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from enum import IntEnum
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, UntypedStorage


class Presence(IntEnum):
    """How much of a role is on the device."""

    AWAY = 0
    WEIGHTS = 1
    TRAINING = 2  # gradients and optimizer state too


class Parcel:
    """Tensors that leave and arrive together.

    Args:
        find: lists them, before each departure: an optimizer may have been given new ones.
        contents: "constant" is copied off once, "changing" at each departure, "scratch" never and comes back undefined.
        path: of the files, to which a number is added; only read where the device is a CPU.
    """

    def __init__(
        self,
        find: Callable[[], Iterable[Tensor]],
        contents: Literal["constant", "changing", "scratch"],
        device: torch.device,
        path: Path,
    ):
        self.find, self.contents, self.device, self.path = find, contents, device, path
        self._away: list[tuple[UntypedStorage, int]] = []  # storages and their bytes
        self._pinned: list[Tensor] = []
        self._is_copied = False
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arrived: torch.cuda.Event | None = None

    def leave(self) -> None:
        """Copies what must be kept and frees the memory; on a GPU once the copy is through, which is not waited for."""
        self.wait()
        found = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in self.find()}
        self._away = [(storage, storage.nbytes()) for storage in found.values()]
        if self.contents == "changing" or (self.contents == "constant" and not self._is_copied):
            self._copy_off()
            self._is_copied = True
        for storage, _ in self._away:
            storage.resize_(0)

    def arrive(self) -> None:
        """Brings everything back. On a GPU the copies may still be under way: `wait` before they are used."""
        for storage, size in self._away:
            storage.resize_(size)
        if self.contents == "scratch":
            return
        if self._stream is None:
            for i, (storage, _) in enumerate(self._away):
                with self._file(i).open("rb") as file:
                    file.readinto(_memory(storage))
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # which had this memory before
        with torch.cuda.stream(self._stream):
            for (storage, _), pinned in zip(self._away, self._pinned, strict=True):
                _bytes(storage).copy_(pinned, non_blocking=True)
                _bytes(storage).record_stream(self._stream)
            self._arrived = self._stream.record_event()

    def wait(self) -> None:
        """Lets the current stream go on only behind the last arrival."""
        if self._arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived)
            self._arrived = None

    def _copy_off(self) -> None:
        if self._stream is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for i, (storage, _) in enumerate(self._away):
                self._file(i).write_bytes(_memory(storage))
            return
        if [pinned.nbytes for pinned in self._pinned] != [size for _, size in self._away]:
            self._pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _, size in self._away]
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # whose results are to be copied
        with torch.cuda.stream(self._stream):
            for (storage, _), pinned in zip(self._away, self._pinned, strict=True):
                pinned.copy_(_bytes(storage), non_blocking=True)
                _bytes(storage).record_stream(self._stream)  # the allocator keeps the memory until then

    def _file(self, i: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{i}")


def _memory(storage: UntypedStorage) -> ctypes.Array:
    """A buffer over it. numpy's view would do as well, but torch never resizes again what numpy has seen."""
    return (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
