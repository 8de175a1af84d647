"""The last traced iteration as a picture: for each rank its stages, and below them what it did when."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WIDTH, LEFT, LANE, GAP = 1120, 48, 14, 8
COLOURS = {"policy": 0, "critic": 1, "reference": 2, "reward": 3, "backward": 4}  # of report.py's style
WAIT = "fill:var(--rule)"


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Events of the last iteration in a trace, which lacks its closing bracket; none where there is no trace."""
    if not path.is_file():
        return []
    lines = (line.rstrip().rstrip(",") for line in path.read_text().splitlines()[1:])
    events = [json.loads(line) for line in lines if line.endswith("}")]
    last = max((event["args"]["iteration"] for event in events), default=0)
    return [event for event in events if event["args"]["iteration"] == last]


def draw_timeline(events: Iterable[dict[str, Any]]) -> str:
    """A figure of one iteration's events; empty without any."""
    events = sorted(events, key=lambda event: event["ts"])
    if not events:
        return ""
    start = events[0]["ts"]
    length = max(event["ts"] + event["dur"] for event in events) - start
    ranks = 1 + max(event["pid"] for event in events)
    scale = (WIDTH - LEFT) / length
    shapes = []
    for rank in range(ranks):
        y = rank * (2 * LANE + GAP)
        shapes.append(f"<text class=left x={LEFT - 6} y={y + LANE + 4}>rank {rank}</text>")
    for event in events:
        x, width = LEFT + (event["ts"] - start) * scale, event["dur"] * scale
        y = event["pid"] * (2 * LANE + GAP) + (LANE if event["tid"] else 0)
        name = html.escape(event["name"])
        hint = f"<title>{name} ({event['cat']}), {event['dur'] / 1e3:.1f} ms</title>"
        box = f'x="{x:.2f}" y="{y}" width="{max(width, 0.3):.2f}" height="{LANE - 1}"'
        if event["cat"] == "stage":
            shapes.append(f'<g><rect class=rule {box}/>{hint}<text x="{x + 2:.1f}" y="{y + 10}">')
            shapes.append(f"{name if len(name) * 6 < width else ''}</text></g>")
        elif event["cat"] == "wait":
            shapes.append(f'<g><rect style="{WAIT}" {box}/>{hint}</g>')
        else:
            shapes.append(f'<g><rect class="bar s{COLOURS.get(event["name"], 6)}" {box}/>{hint}</g>')
    legend = "".join(f'<span><i class="bar s{i}"></i>{name}</span>' for name, i in COLOURS.items())
    height = ranks * (2 * LANE + GAP)
    return (
        f"<figure><figcaption><b>Iteration {events[0]['args']['iteration']}, {length / 1e6:.2f} s</b>{legend}"
        f"<span>grey: waiting for a neighbouring stage</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height}" role=img aria-label="timeline">{"".join(shapes)}</svg></figure>'
    )
