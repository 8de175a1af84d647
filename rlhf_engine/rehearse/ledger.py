"""What a run did to a device, stage by stage: bytes by what they are for, waits of the host, kernels, collectives."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, UntypedStorage

from ..signals import RunError

KINDS = ("weights", "gradients", "optimizer", "activations", "kv_cache", "graphs")
_MOST_PLACES = 12
_BACKGROUND = ("site-packages/torch/", "/rehearse/", "lib/python3", "contextlib", "typing_extensions", "<")


class Refused(RunError):
    """What a GPU would not have done."""


@dataclass
class Stage:
    """What a stretch of the run did on the device.

    Attributes:
        peak: bytes by kind, at the moment when there were most.
        places: where most of them were asked for.
        moved: bytes copied between tensors of the host and of the device, both ways together.
        waits: of the host for the device, by place.
        replayed: of the kernels, those that were launched as parts of graphs.
        step: `launches` and `waits` of a decode step at most, a graph counting as one launch; of a step that is
            replayed, where there are any.
    """

    name: str
    phase: str = ""
    seconds: float = 0.0
    peak: dict[str, int] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    after: int = 0
    host: int = 0
    moved: int = 0
    kernels: int = 0
    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    captures: int = 0
    replays: int = 0
    replayed: int = 0
    step: dict[str, int] = field(default_factory=dict)


def place() -> str:
    """`file:line` of the code that asked, below what torch and the rehearsal have put on top of it."""
    frame = sys._getframe(1)
    while frame is not None and _is_background(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return "?"
    name = frame.f_code.co_filename.split("site-packages/")[-1]
    return f"{'/'.join(name.split('/')[-3:])}:{frame.f_lineno}"


@functools.cache
def _is_background(filename: str) -> bool:
    return "site-packages/megatron" not in filename and any(part in filename for part in _BACKGROUND)


class Ledger:
    """Of one rank's device.

    Args:
        memory: bytes that the device has.
        name: of it, for the refusal of a run that needs more.
    """

    def __init__(self, memory: float, name: str, rank: int):
        self.memory, self.name, self.rank = memory, name, rank
        self.held: dict[int, list] = {}  # storage -> bytes, kind, where it was made
        self.live = Counter(dict.fromkeys(KINDS, 0))
        self.total = self.reserved = self.host = 0
        self.captured = 0  # the most there was since a capture began
        self.places: Counter[str] = Counter()  # bytes by where they were asked for
        self.stages: list[Stage] = []
        self.stage = Stage("start")
        self.phase = ""

    # -- stages --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def at(self, name: str) -> Iterator[None]:
        """A stretch of the run that gets figures of its own."""
        before, started = self.stage, time.perf_counter()
        self.stage = Stage(name, self.phase, peak=dict(self.live), host=self.host)
        self._most, self._noted = self.total, 0
        try:
            yield
        finally:
            self.stage.seconds, self.stage.after = time.perf_counter() - started, self.total
            self.stages.append(self.stage)
            self.stage, self._most = before, self.total

    _most = _noted = 0

    def refusal(self, what: str) -> Refused:
        """What cannot be, and which rank, stage and line asked for it."""
        return Refused(f"rank {self.rank}, {self.stage.name}, {place()}: {what}")

    def wait(self, what: str) -> None:
        """The host waits for the device."""
        self.stage.waits[f"{what} {place()}"] += 1

    # -- memory --------------------------------------------------------------------------------------------------

    def note(self, tensor: Tensor) -> None:
        """Counts a tensor's memory, from now until it is gone."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.held:
            return
        self.held[key] = [0, "activations", place()]
        self._resize(key, storage.nbytes())
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._resize(key, 0)
        self.held.pop(key, None)

    def _resize(self, key: int, size: int) -> None:
        entry = self.held[key]
        size = (size + 511) // 512 * 512
        grown, entry[0] = size - entry[0], size
        self.live[entry[1]] += grown
        self.total += grown
        self.places[entry[2]] += grown
        self.captured = max(self.captured, self.total)
        if self.total > self._most:
            self._most = self.total
            self.stage.peak = dict(self.live)
            if self.total > 1.01 * self._noted:
                self._noted, self.stage.places = self.total, dict(self.places.most_common(_MOST_PLACES))
            self.reserved = max(self.reserved, self.total)
            if self.total > self.memory:
                held = ", ".join(f"{kind} {size / 1e9:.3g} GB" for kind, size in self.live.items() if size)
                raise Refused(
                    f"rank {self.rank} needs more than the {self.memory / 1e9:.3g} GB of {self.name} in"
                    f" {self.stage.name}, at {place()}: {held}"
                )

    def resized(self, storage: UntypedStorage, size: int) -> None:
        """A storage has another size."""
        if storage._cdata in self.held:
            self._resize(storage._cdata, size)

    def keep(self, kind: str, size: int) -> None:
        """Memory that is no tensor's."""
        key = -hash(kind)
        self.held.setdefault(key, [0, kind, kind])
        self._resize(key, self.held[key][0] + size)

    def mark(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Says what the memory of these tensors is for."""
        for tensor in tensors:
            entry = self.held.get(tensor.untyped_storage()._cdata)
            if entry is not None and entry[1] != kind:
                self.live[entry[1]] -= entry[0]
                self.live[kind] += entry[0]
                entry[1] = kind
                if self.total == self._most:
                    self.stage.peak = dict(self.live)

    def note_on_host(self, tensor: Tensor) -> None:
        """Counts a host tensor's memory until it is gone."""
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self.hold_on_host(size)
        weakref.finalize(storage, self.hold_on_host, -size)

    def hold_on_host(self, size: int) -> None:
        """Notes host memory for the device's numbers; less of it where `size` is negative."""
        self.host += size
        self.stage.host = max(self.stage.host, self.host)
