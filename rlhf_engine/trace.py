"""What each rank did and when: idle time of the pipelines, and a trace that Perfetto (ui.perfetto.dev) reads."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .mesh import ParallelMesh

Kind = Literal["stage", "forward", "backward", "wait", "move"]


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
    """Collects the spans of an iteration on this rank."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.streams: list[Stream] = []
        self.flops: Counter[str] = Counter()  # of the models in each stage's updates, over all ranks
        self._stage = ""

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
        started = time.perf_counter()
        try:
            yield
        finally:
            self.spans.append(Span(name, kind, started, time.perf_counter()))

    @contextlib.contextmanager
    def stream(self, has_backward: bool) -> Iterator[None]:
        """A pipeline. What within it is neither a forward nor waiting for a neighbour is backward."""
        name, first, started = self._stage, len(self.spans), time.perf_counter()
        yield
        stopped, last = time.perf_counter(), started
        gaps, waited = [], 0.0
        for span in sorted(self.spans[first:], key=lambda span: span.start):
            if has_backward and span.start > last:
                gaps.append(Span("backward", "backward", last, span.start))
            last = max(last, span.stop)
            waited += span.stop - span.start if span.kind == "wait" else 0.0
        if has_backward and stopped > last:
            gaps.append(Span("backward", "backward", last, stopped))
        self.spans += gaps
        self.streams.append(Stream(name, stopped - started, waited))

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

    def clear(self) -> None:
        self.spans, self.streams, self.flops = [], [], Counter()


def append_events(path: Path, ranks: Sequence[Sequence[Span]], iteration: int) -> None:
    """Adds an iteration to a trace in Chrome's event format: a process for each rank, a track for stages and one for
    what happens in them. The closing bracket is missing, which the format allows and readers take."""
    with path.open("a") as file:
        if not file.tell():
            file.write("[\n")
        for rank, spans in enumerate(ranks):
            for span in spans:
                event = {
                    "name": span.name,
                    "cat": span.kind,
                    "ph": "X",
                    "ts": round(span.start * 1e6, 1),
                    "dur": round((span.stop - span.start) * 1e6, 1),
                    "pid": rank,
                    "tid": 0 if span.kind == "stage" else 1,
                    "args": {"iteration": iteration},
                }
                file.write(json.dumps(event) + ",\n")
