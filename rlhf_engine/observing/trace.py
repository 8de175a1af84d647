"""What each rank did and when: idle time of the pipelines, and a trace that Perfetto (ui.perfetto.dev) reads.

On a GPU it is the device's time that counts: the host is done with a forward when its kernels are queued, and with a
message before that has come. There a moment is an event in the device's stream, known when the device has passed it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..mesh import ParallelMesh
from ..surviving import durable
from .timeline import read_events

Kind = Literal["stage", "forward", "backward", "wait", "move"]
_NUM_MOMENTS = 9  # at which ranks compare their clocks
_CPU = torch.device("cpu")
Moment = Any  # seconds of the host's clock, or a torch.cuda.Event


@dataclass(frozen=True)
class Span:
    """Something that took a rank from `start` to `stop` (seconds of this machine's clock)."""

    name: str
    kind: Kind
    start: float
    stop: float


@dataclass(frozen=True)
class Stream:
    """A pipeline that a rank took part in: seconds from its first to its last action, and seconds spent waiting."""

    name: str
    seconds: float
    waited: float


class Trace:
    """Collects the spans of an iteration on this rank.

    Attributes:
        spans, streams: what there was before the last `finish`.
        flops: of the models in each stage's updates, over all ranks.

    Args:
        device: whose time it is.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        self.device, self._stage = device, ""
        self.clear()

    def clear(self) -> None:
        """Forgets what was noted."""
        self.spans: list[Span] = []
        self.streams: list[Stream] = []
        self.flops: Counter[str] = Counter()
        self._noted: list[tuple[str, Kind, Moment, Moment]] = []
        # stage, whether it has a backward, its part of what was noted, when it began and ended
        self._pipelines: list[tuple[str, bool, slice, Moment, Moment]] = []

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage, or several that run together; streams within it bear its name."""
        self._stage = name
        with self.span(name, "stage"):
            yield

    def count(self, flops: int) -> None:
        """FLOPs of an update in this stage."""
        self.flops[self._stage] += flops

    @contextlib.contextmanager
    def span(self, name: str, kind: Kind) -> Iterator[None]:
        """Notes what happens within."""
        started = self._moment()
        try:
            yield
        finally:
            self._noted.append((name, kind, started, self._moment()))

    @contextlib.contextmanager
    def stream(self, has_backward: bool) -> Iterator[None]:
        """A pipeline. What within it is neither a forward nor waiting for a neighbour is backward."""
        first, started = len(self._noted), self._moment()
        yield
        within = slice(first, len(self._noted))
        self._pipelines.append((self._stage, has_backward, within, started, self._moment()))

    def _moment(self) -> Moment:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def finish(self) -> None:
        """Works out `spans` and `streams`, once an iteration: it waits for the device."""
        last = self._moment()
        if self.device.type == "cuda":
            last.synchronize()
        now = time.perf_counter()

        def seconds(moment: Moment) -> float:
            return moment if self.device.type != "cuda" else now - moment.elapsed_time(last) / 1e3

        spans = [Span(name, kind, seconds(start), seconds(stop)) for name, kind, start, stop in self._noted]
        for name, has_backward, within, start, stop in self._pipelines:
            started, stopped = seconds(start), seconds(stop)
            found = sorted(spans[within], key=lambda span: span.start)
            if has_backward:
                ends = itertools.accumulate((span.stop for span in found), max, initial=started)
                gaps = zip(ends, [*(span.start for span in found), stopped], strict=True)
                self.spans += [Span("backward", "backward", end, begin) for end, begin in gaps if begin > end]
            waited = sum(span.stop - span.start for span in found if span.kind == "wait")
            self.streams.append(Stream(name, stopped - started, waited))
        self.spans += spans

    def idle_shares(self, mesh: ParallelMesh) -> dict[str, float]:
        """For each stream of the iteration, the mean share of its length that a rank had nothing to do.

        A stream is as long as for the rank that was in it longest: the last stage waits for the first before a forward
        pipeline, and the first is done before the last; in 1F1B the first stage begins and ends it.
        """
        shares: dict[str, list[float]] = {}
        for streams in zip(*mesh.all_gather_object(self.streams), strict=True):
            length = max(stream.seconds for stream in streams)
            busy = sum(stream.seconds - stream.waited for stream in streams) / len(streams)
            shares.setdefault(streams[0].name, []).append(1 - busy / length)
        return {f"idle/{name}": sum(found) / len(found) for name, found in shares.items()}


def cut_events(path: Path, iteration: int) -> None:
    """Leaves in a trace the whole lines of what lies before an iteration, which will be made once more."""
    if path.is_file():
        kept = [json.dumps(event) + ",\n" for event in read_events(path) if event["args"]["iteration"] < iteration]
        with durable.spared(path):
            durable.write(path, "".join(["[\n", *kept]))


def moments(mesh: ParallelMesh) -> list[float]:
    """By this rank's clock, the moments at which all ranks leave some barriers together, more or less."""
    found = []
    for _ in range(_NUM_MOMENTS):
        mesh.barrier()
        found.append(time.perf_counter())
    return found


def append_events(path: Path, ranks: Sequence[tuple[Sequence[Span], Sequence[float]]], iteration: int) -> None:
    """Adds an iteration to a trace in Chrome's event format: a process for each rank, a track for stages and one for
    what happens in them. The closing bracket is missing, which the format allows and readers take. An iteration that
    there is no room for is left out.

    Args:
        ranks: of each its spans and `moments`. Times become those of the first one, on which this runs.
    """
    to_epoch = time.time() - time.perf_counter()
    lines = [] if path.is_file() and path.stat().st_size else ["[\n"]
    for rank, (spans, seen) in enumerate(ranks):
        shift = to_epoch + statistics.median(first - mine for first, mine in zip(ranks[0][1], seen, strict=True))
        for span in spans:
            event = {
                "name": span.name,
                "cat": span.kind,
                "ph": "X",
                "ts": round((span.start + shift) * 1e6, 1),
                "dur": round((span.stop - span.start) * 1e6, 1),
                "pid": rank,
                "tid": 0 if span.kind == "stage" else 1,
                "args": {"iteration": iteration},
            }
            lines.append(json.dumps(event) + ",\n")
    with durable.spared(path):
        durable.append(path, "".join(lines))
