"""The last traced iteration as a picture: for each rank its stages, and below them what it did when."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COLOURS = {"policy": 0, "critic": 1, "reference": 2, "reward": 3, "backward": 4, "teacher": 5}  # of report.css


class Timeline:
    """Where the events of one iteration stand in a viewBox of `width` x `height`. report.jinja draws them."""

    width, left, lane, gap = 1120, 48, 14, 8
    colours = COLOURS

    def __init__(self, events: list[dict[str, Any]]):
        self.start = min(event["ts"] for event in events)
        self.length = max(event["ts"] + event["dur"] for event in events) - self.start  # microseconds
        self.iteration = events[0]["args"]["iteration"]
        self.ranks = 1 + max(event["pid"] for event in events)
        self.height = self.ranks * (2 * self.lane + self.gap)
        self.boxes = [self.box(event) for event in sorted(events, key=lambda event: event["ts"])]

    def top(self, rank: int) -> int:
        return rank * (2 * self.lane + self.gap)

    def box(self, event: dict[str, Any]) -> dict[str, Any]:
        scale = (self.width - self.left) / self.length
        kind = {"stage": "rule", "wait": "wait"}.get(event["cat"], f"bar s{COLOURS.get(event['name'], 6)}")
        return {
            "x": round(self.left + (event["ts"] - self.start) * scale, 2),
            "y": self.top(event["pid"]) + (self.lane if event["tid"] else 0),
            "width": round(max(event["dur"] * scale, 0.3), 2),
            "kind": kind,
            "hint": f"{event['name']} ({event['cat']}), {event['dur'] / 1e3:.1f} ms",
            "text": event["name"] if kind == "rule" and len(event["name"]) * 6 < event["dur"] * scale else "",
        }


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Of a trace, which lacks its closing bracket, and has half a line where a run was killed; none where there is no
    trace."""
    for line in path.read_text().splitlines()[1:] if path.is_file() else ():
        with contextlib.suppress(ValueError):
            yield json.loads(line.rstrip().rstrip(","))


def read_trace(path: Path) -> Timeline | None:
    """The last iteration of a trace; None where there is none."""
    events = list(read_events(path))
    last = max((event["args"]["iteration"] for event in events), default=0)
    return Timeline([event for event in events if event["args"]["iteration"] == last]) if events else None
